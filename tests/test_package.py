"""What an installation promises: light import, lazy names, metadata, the zoo's front door."""

from __future__ import annotations

import email
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import linfusion
from linfusion import zoo

HERE = Path(__file__).parent
ROOT = HERE.parent


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter once `code` has run."""
    code += "\nimport sys, json; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"diffusers", "triton", "transformers", "accelerate", "safetensors", "PIL", "typer"}


def test_import_takes_torch_and_nothing_else_heavy():
    alone = modules_after("import torch")
    ours = modules_after("import torch, linfusion, linfusion.kernels, linfusion.attention")
    assert not (ours - alone) & HEAVY
    # Everything torch does not bring along is ours or the standard library.
    assert {m for m in ours - alone if m not in sys.stdlib_module_names} == {"linfusion"}


def test_the_command_line_starts_without_torch():
    assert "torch" not in modules_after("import linfusion.cli")


@pytest.mark.parametrize("name", sorted(linfusion.__all__))
def test_public_names_are_there(name):
    assert getattr(linfusion, name) is not None
    assert name in dir(linfusion)


def test_dir_shows_public_names_alone():
    code = "import linfusion; print(linfusion.zoo.names()); print(*dir(linfusion))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    names = done.stdout.splitlines()[-1].split()
    packages = [p.parent.name for p in Path(linfusion.__file__).parent.glob("*/__init__.py")]
    assert set(names) <= {*linfusion.__all__, *packages} and "zoo" in names


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of this tree, and a wheel that was built from what the sdist holds."""
    root = tmp_path_factory.mktemp("build")
    tree = root / "tree"
    leave = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "demo", "site", "build")
    shutil.copytree(ROOT, tree, ignore=leave)
    code = (
        "import sys; from setuptools import build_meta as b;"
        "print(getattr(b, f'build_{sys.argv[1]}')(sys.argv[2]))"
    )

    def build(what, folder):
        done = subprocess.run(
            [sys.executable, "-c", code, what, str(root)],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return root / done.stdout.splitlines()[-1]

    sdist = build("sdist", tree)
    with tarfile.open(sdist) as tar:
        tar.extractall(root / "from", filter="data")
    [unpacked] = (root / "from").iterdir()
    return unpacked, build("wheel", unpacked)


def test_an_sdist_holds_what_the_tests_need(built):
    unpacked, _ = built
    for name in ("tests/conftest.py", "tests/tiny.py", "constraints.txt", "examples/demo.py"):
        assert (unpacked / name).is_file(), name
    there = {p.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("*") if p.is_file()}
    there = {p for p in there if "__pycache__" not in p.parts}
    assert {p for p in there if not (unpacked / "tests" / p).is_file()} == set()


def test_a_wheel_says_what_it_runs_on_and_holds_the_package_alone(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [about] = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(about))
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"linfusion"}
    package = Path(linfusion.__file__).parent
    wanted = {p.relative_to(package.parent) for p in package.rglob("*") if p.is_file()}
    wanted = {p for p in wanted if "__pycache__" not in p.parts}
    assert {str(p) for p in wanted} <= set(names)
    assert metadata["Version"] == linfusion.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier")
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    requires = metadata.get_all("Requires-Dist")
    # triton 3.7 is what torch 2.12 pins: an older torch would not resolve.
    assert "torch>=2.12" in requires and any(r.startswith("triton>=3.7;") for r in requires)


def test_functions_are_not_hidden_by_modules_of_their_name():
    loaded = (
        "import linfusion.linearize, linfusion.fuse, linfusion; "
        "assert callable(linfusion.linearize) and callable(linfusion.fuse)"
    )
    assert "linfusion" in modules_after(loaded)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match=r"'linear'.*linearize"):
        linfusion.linear  # noqa: B018  the access is what is tested


def test_the_version_is_that_of_the_metadata():
    assert linfusion.__version__ == importlib.metadata.version("linfusion")


def test_the_package_says_it_is_typed():
    assert (Path(linfusion.__file__).parent / "py.typed").is_file()


def test_every_requirement_is_pinned_in_a_version_it_allows():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = [*project["dependencies"], *extras["dev"], *extras["train"], *extras["docs"]]
    for requirement in map(Requirement, installed):
        pin = pins[requirement.name.lower()]
        assert requirement.specifier.contains(pin), f"{requirement} excludes {pin}"


def test_pins_resolve_with_any_build_of_torch():
    assert "+" not in (ROOT / "constraints.txt").read_text()


def test_the_zoo_names_what_it_has_when_asked_for_what_it_has_not():
    with pytest.raises(ValueError, match="name: no model 'cats' in the zoo, which has:"):
        zoo.path("cats")


def test_only_the_zoo_prefix_makes_a_name_a_folder():
    assert zoo.resolve("owner/name") == "owner/name"
    with pytest.raises(ValueError, match="no model 'cats'"):
        zoo.resolve("zoo:cats")
