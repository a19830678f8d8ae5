"""Emoji as vectors: what is drawn, what its caption says, and what is held out."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "zoo"
BODIES = {
    "red-disc": '<circle cx="16" cy="16" r="12" fill="#f00"/>',
    "blue-box": '<path fill="#00f" d="M4 4h24v24H4z"/>',
    "green-ash": '<path fill="#0a0" d="M16 2l14 28H2z"/>',
    "nothing": '<path fill="none" d="M0 0h1v1z"/>',
}


@pytest.fixture
def vectors(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("vectors")
    sys.modules.pop("vectors", None)


def test_a_scene_shows_what_its_caption_counts(vectors):
    scene = vectors.scene(["red-disc", "blue-box", "green-ash"], 7, seed=3)
    counted = {name: sum(t.name == name for t in scene.things) for name in BODIES}
    words = {1: ("a", "an"), 2: ("two",), 3: ("three",), 4: ("four",), 5: ("five",), 6: ("six",)}
    for name, many in counted.items():
        noun = name.replace("-", " ")
        said = [f"{word} {noun}" for word in words.get(many, ())]
        assert (many == 0) == (noun not in scene.caption)
        assert many == 0 or any(s in scene.caption for s in said)
    assert sum(counted.values()) == 7
    assert vectors.scene(["red-disc", "blue-box", "green-ash"], 7, seed=3) == scene


def test_nothing_lies_outside_of_the_canvas(vectors):
    for count in (2, 5, 12, 60):
        for thing in vectors.scene(list("abcdefghijklmnop"), count, seed=1).things:
            assert thing.side / 2 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= 1 - thing.side / 2


@pytest.mark.parametrize(
    "name, many, expected",
    [("castle", 1, "a castle"), ("umbrella", 1, "an umbrella"), ("cherry", 3, "three cherries"),
     ("fox", 2, "two foxes"), ("bowl-with-spoon", 4, "four bowls with spoon")],
)  # fmt: skip
def test_captions_count_in_english(vectors, name, many, expected):
    assert vectors._counted(name, many) == expected


def test_held_out_names_are_few_and_always_the_same(vectors):
    held = [n for n in range(2000) if vectors.is_held_out(f"emoji {n}")]
    assert 60 <= len(held) <= 140
    assert [n for n in range(2000) if vectors.is_held_out(f"emoji {n}")] == held


def test_a_file_that_is_cut_off_is_named(vectors, tmp_path):
    whole = json.dumps({"icons": {n: {"body": b} for n, b in BODIES.items()}})
    (tmp_path / "icons.json").write_text(whole)
    assert vectors.drawings(tmp_path) == BODIES
    (tmp_path / "icons.json").write_text(whole[:-9])
    with pytest.raises(ValueError, match=r"folder: .*icons\.json is cut off"):
        vectors.drawings(tmp_path)
    with pytest.raises(ValueError, match=r"folder: expected icons\.json of"):
        vectors.drawings(tmp_path / "none")


def test_without_node_it_says_what_is_missing(vectors, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="node is not installed: it draws @iconify-json"):
        vectors.render(["<svg/>"], 8)


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine")
def test_pictures_are_what_was_placed_and_empty_ones_are_left_out(vectors):
    documents = [vectors.svg(vectors.single(name), BODIES) for name in BODIES]
    pictures, places = vectors.render(documents, 32)
    assert places == [0, 1, 2]
    assert pictures.shape == (3, 3, 32, 32)
    assert pictures[0, :, 16, 16].tolist() == [255, 0, 0]
    assert pictures[1, :, 16, 16].tolist() == [0, 0, 255]
    assert pictures[1, :, 1, 1].tolist() == [255, 255, 255]
