"""The house rule: a folder of linfusion imports only from the folders below it."""

from __future__ import annotations

import ast
from pathlib import Path

import linfusion

ROOT = Path(linfusion.__file__).parent
RANK = {
    "kernels": 0,
    "attention": 1,
    "layers": 2,
    "offload": 2,
    "entries": 2,
    "fitting": 2,
    "official": 2,
    "inherit": 2,
    "lowrank": 2,
    "official_dit": 2,
    "whole": 2,
    "fuse": 2,
    "summary": 2,
    "weights": 2,
    "linearize": 2,
    "models": 3,
    "zoo": 4,
    "pipelines": 4,
    "parallel": 4,
    "training": 5,
    "cli": 6,
}


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Full names of the modules that a file in `package` imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            home = ".".join((*base, *([node.module] if node.module else [])))
            # `from linfusion import zoo` imports linfusion.zoo
            names |= {f"{home}.{alias.name}" for alias in node.names}
    return names


def runs_up(source: str, path: Path) -> list[str]:
    """The imports of one file (path relative to the package) from folders above its own."""
    here = RANK[path.with_suffix("").parts[0]]
    names = imported(source, ("linfusion", *path.parts[:-1]))
    homes = {n: n.split(".")[1] for n in names if n.startswith("linfusion.")}
    return sorted(n for n, home in homes.items() if RANK.get(home, -1) > here)


def test_every_part_of_the_package_has_a_place():
    parts = {p.relative_to(ROOT).with_suffix("").parts[0] for p in ROOT.rglob("*.py")}
    assert parts - {"__init__", "__main__"} <= set(RANK)


def test_no_folder_imports_from_above():
    files = [p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p.parent != ROOT]
    files += [Path(f"{name}.py") for name in RANK if (ROOT / f"{name}.py").is_file()]
    found = {str(p): runs_up((ROOT / p).read_text(), p) for p in files}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_rule_sees_every_form_of_import():
    upward = {
        "import linfusion.training": ["linfusion.training"],
        "from linfusion import cli": ["linfusion.cli"],
        "from linfusion.linearize import restore": ["linfusion.linearize.restore"],
        "def f():\n    from ..weights import save": ["linfusion.weights.save"],
        "from ...linfusion import kernels": [],
        "from linfusion.kernels import linear_attention": [],
    }
    for source, expected in upward.items():
        assert runs_up(source, Path("attention/base.py")) == expected, source
