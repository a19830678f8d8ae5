"""What an installation promises: light import, lazy names, metadata, the zoo's front door."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
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
