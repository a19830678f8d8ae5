"""What goes where: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


class Interrupted(Exception):
    """Ctrl-C; the message says what was kept, and how to go on."""


@contextlib.contextmanager
def keeping(what: Callable[[], str]) -> Iterator[None]:
    """Inside, Ctrl-C says what was kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(what()) from error


@contextlib.contextmanager
def working(what: str | None = None) -> Iterator[None]:
    """While a command works, what libraries print goes to stderr, where `what` is said first."""
    if what:
        say(what)
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries, imported before, say of every pipeline that is as it should be."""
    said = ("id2label", "kept in float32: []", "cannot run with `cpu`", "cannot run with cpu")

    def matters(record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in said)

    handlers = [
        h for name in ("diffusers", "transformers") for h in logging.getLogger(name).handlers
    ]
    for handler in handlers:
        handler.addFilter(matters)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(matters)


def say(message: str) -> None:
    """One line for the person who watches."""
    print(message, file=sys.stderr, flush=True)


def emit_json(result: dict[str, Any]) -> None:
    """The one JSON object of a command, on stdout; what JSON lacks (nan, infinity) is null."""
    print(json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table on stdout; columns after the first are figures and flush right."""
    # Text, not str: in those rich reads what is in brackets as markup, and paths have brackets.
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if title:  # not the table's own, which is folded to its width
        print(title)
    # Into a file or a pipe rich would fold at 80 columns.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def kept_in(state: Path | None) -> str:
    """What there is of a run that was stopped, and how to go on."""
    if state is None:
        return "nothing was kept; with --state DIR it could go on"
    return f"what is done is in {state}: the same command with --resume goes on"
