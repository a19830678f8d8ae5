"""The table of hosts in docs/support.md: which method takes which class of diffusers.

    python -m tests.hosts.support          prints it
    python -m tests.hosts.support --write  puts it into docs/support.md

Every class is built at tiny size and given to every method.
"""

from __future__ import annotations

import sys
from pathlib import Path

import diffusers
import torch

import linfusion
from linfusion.attention import names
from linfusion.layers.record import record_of
from tests.hosts.images import IMAGES
from tests.hosts.refused import REFUSED
from tests.hosts.unets import UNETS
from tests.hosts.videos import VIDEOS

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
START, END = "<!-- hosts: python -m tests.hosts.support --write -->", "<!-- /hosts -->"
PARTS = (("Pictures", IMAGES), ("Videos", VIDEOS), ("UNets and their ControlNets", UNETS))


def table() -> str:
    """Markdown: a row a class, a column a method, and why what is refused is refused."""
    methods = [name for name in names() if name in ("clear", "hybrid", "linfusion", "lit", "mate")]
    head = ["class", *(f'`"{method}"`' for method in methods)]
    lines = []
    for title, rows in PARTS:
        lines += [f"**{title}**", "", *_row(head), *_row(["---"] * len(head))]
        for name in sorted(rows):
            model = _build(name, rows[name].config)
            taken = ["yes" if _layers(model, method) else "–" for method in methods]
            lines += _row([f"`{name}`", *taken])
        lines.append("")
    lines += ["**No windows**", "", *_row(["class", "why", "taken by"]), *_row(["---"] * 3)]
    for name in sorted(REFUSED):
        model = _build(name, REFUSED[name][0])
        others = [f'`"{method}"`' for method in methods if _layers(model, method)]
        lines += _row([f"`{name}`", _reason(model), ", ".join(others) or "–"])
    return "\n".join(lines)


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _build(name: str, config: dict[str, object]) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**config)


def _layers(model: torch.nn.Module, method: str) -> int:
    """How many layers the method takes."""
    try:
        linfusion.linearize(model, method)
    except ValueError:
        return 0
    count = len(record_of(model).layers)
    linfusion.restore(model)
    return count


def _reason(model: torch.nn.Module) -> str:
    try:
        linfusion.linearize(model, "clear")
    except ValueError as error:
        return str(error).partition(" tokens of: ")[2].partition("; it knows")[0]
    raise AssertionError(f"{type(model).__name__} is taken")


def page() -> str:
    """docs/support.md with the table as it is now."""
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
    else:
        print(table())
