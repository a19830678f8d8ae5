"""examples/demo.py, what `make demo` runs, with a tiny model in the zoo's place."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import linfusion
from linfusion import weights, zoo
from linfusion.cli.measure import human_bytes, measure
from tests.tiny import tiny_sd_pipeline


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The module examples/demo.py; `zoo:emoji` is a tiny pipeline, drawn at two sizes."""
    pipe = tiny_sd_pipeline(image_encoder=None)
    pipe.save_pretrained(tmp_path / "emoji")
    weights.save(linfusion.linearize(pipe), tmp_path / "emoji" / "linfusion")
    monkeypatch.setattr(zoo, "_ROOT", tmp_path)
    file = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PLAN", {64: (2, 1), 128: (1, 1)})
    return module


def test_the_demo_draws_both_sides_and_prints_their_cost(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "out")])
    demo.main()
    pictures = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert pictures == [
        "a-pizza-64-linear.png",
        "a-pizza-64-softmax.png",
        "a-red-heart-128-linear.png",
        "a-red-heart-128-softmax.png",
        "a-red-heart-64-linear.png",
        "a-red-heart-64-softmax.png",
        "contact-sheet.png",
    ]
    assert Image.open(tmp_path / "out" / "a-red-heart-128-linear.png").size == (128, 128)
    out = capsys.readouterr().out
    assert "128 px" in out
    assert "6 pictures and contact-sheet.png" in out


def test_the_peak_of_memory_is_what_the_work_allocates():
    size = 64 * 2**20
    _, seconds, peak = measure(lambda: torch.ones(size, dtype=torch.uint8))
    assert seconds > 0
    assert 0.95 * size < peak < 1.3 * size


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (999, "999 B"), (1500, "1.5 kB"), (2_345_678, "2.35 MB"), (3e9, "3 GB")],
)
def test_bytes_are_told_with_three_digits(count, text):
    assert human_bytes(count) == text
