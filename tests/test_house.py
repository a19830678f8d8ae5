"""The house rule: a folder of linfusion imports only from the folders below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import linfusion

ROOT = Path(linfusion.__file__).parent
# From the ground up; each has a floor of its own.
FLOORS = (
    "_version",
    "kernels",
    "files",
    "attention",
    "models",
    "layers",
    "bands",
    "students",
    "fuse",
    "summary",
    "linearize",
    "authors_api",
    "lit",
    "pipelines",
    "parallel",
    "zoo",
    "training",
    "evaluation",
    "cli",
)
RANK = {name: rank for rank, name in enumerate(FLOORS)}


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
    """The imports of one file (path relative to the package) from folders above its own.

    `import linfusion` is one of them: the front door is above everything.
    """
    here = RANK[path.with_suffix("").parts[0]]
    names = imported(source, ("linfusion", *path.parts[:-1]))
    homes = {n: n.split(".")[1] for n in names if n.startswith("linfusion.")}
    up = [n for n, home in homes.items() if RANK.get(home, len(RANK)) > here]
    return sorted(up + (["linfusion"] if "linfusion" in names else []))


def test_every_part_of_the_package_has_a_floor_of_its_own():
    parts = {p.relative_to(ROOT).with_suffix("").parts[0] for p in ROOT.rglob("*.py")}
    assert parts - {"__init__", "__main__"} <= set(RANK)
    assert len(set(FLOORS)) == len(FLOORS)


def test_no_folder_imports_from_above():
    files = [p.relative_to(ROOT) for p in ROOT.rglob("*.py")]
    files = [p for p in files if p.name not in ("__main__.py",) and p != Path("__init__.py")]
    found = {str(p): runs_up((ROOT / p).read_text(), p) for p in files}
    assert {path: names for path, names in found.items() if names} == {}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan 1972), those of one module left out."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def imports_of(name: str, path: Path, known: set[str], *, lazy: bool) -> set[str]:
    """Modules of the package that one imports; names that only a type checker reads left out."""
    package = tuple(name.split(".") if path.name == "__init__.py" else name.split(".")[:-1])
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = [ast.Pass()]
        if not lazy and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    names = imported(ast.unparse(tree), package)
    # Of `from package.module import name` both are in there; the longest that is a module counts.
    found = {n if n in known else n.rpartition(".")[0] for n in names if n.startswith("linfusion.")}
    return (found & known) - {name}


@pytest.mark.parametrize("lazy", [False, True], ids=["at the top of files", "anywhere"])
def test_no_modules_import_each_other_in_a_circle(lazy):
    there = modules()
    graph = {n: imports_of(n, p, set(there), lazy=lazy) for n, p in there.items()}
    # The front doors of packages load by name, which is no import of theirs.
    graph = {n: {m for m in found if m != n} for n, found in graph.items()}
    assert circles(graph) == []


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_file_is_longer_than_a_few_screens():
    long = {p: len(p.read_text().splitlines()) for p in ROOT.rglob("*.py")}
    assert {str(p.relative_to(ROOT)): n for p, n in long.items() if n > 400} == {}


def test_no_folder_shows_more_than_fourteen_files_or_folders():
    for folder in {p.parent for p in ROOT.rglob("*.py")}:
        files = {p.name for p in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
        packages = {p.parent.name for p in folder.glob("*/__init__.py")}
        assert len(files) <= 14 and len(packages) <= 14, folder


def test_the_rule_sees_every_form_of_import():
    upward = {
        "import linfusion": ["linfusion"],
        "import linfusion.training": ["linfusion.training"],
        "from linfusion import cli": ["linfusion.cli"],
        "from linfusion.linearize import restore": ["linfusion.linearize.restore"],
        "def f():\n    from ..students import save": ["linfusion.students.save"],
        "from ...linfusion import kernels": [],
        "from linfusion.kernels import linear_attention": [],
    }
    for source, expected in upward.items():
        assert runs_up(source, Path("attention/method.py")) == expected, source
