"""examples/demo.py, what `make demo` runs, with a tiny model in the zoo's place."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

import linfusion
from linfusion import zoo
from linfusion.cli.measure import human_bytes, measure
from linfusion.pipelines import DiTPipeline
from linfusion.students import saving as weights
from tests.tiny import tiny_sd_pipeline
from tests.tiny_dit import tiny_dit
from tests.tiny_joint import tiny_flux, tiny_flux_pipeline
from tests.tiny_video import tiny_image_vae, tiny_lingen


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The module examples/demo.py; the zoo's models are tiny, drawn at two sizes."""
    pipe = tiny_sd_pipeline(image_encoder=None)
    pipe.save_pretrained(tmp_path / "emoji")
    weights.save(linfusion.linearize(pipe), tmp_path / "emoji" / "linfusion")
    flux = tiny_flux_pipeline(transformer=tiny_flux(guidance_embeds=False))
    flux.save_pretrained(tmp_path / "emoji-flux")
    weights.save(linfusion.linearize(flux, "clear", radius=2), tmp_path / "emoji-flux" / "clear-2")
    whole = linfusion.linearize(tiny_dit(num_embeds_ada_norm=4), "lit", heads=2)
    names = dict(enumerate(("face", "heart", "person", "sign")))
    dit = DiTPipeline(whole, tiny_image_vae(), DDPMScheduler(), id2label=names)
    dit.save_pretrained(tmp_path / "emoji-lit")
    tiny_dit(num_embeds_ada_norm=4).save_pretrained(tmp_path / "emoji-lit" / "teacher")
    tiny_lingen().save_pretrained(tmp_path / "emoji-video")
    monkeypatch.setattr(zoo, "_ROOT", tmp_path)
    file = Path(__file__).parents[1] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    plan = {64: (2, 1), 128: (1, 1)}
    emoji, _, lit = module.MODELS
    sides = {"softmax": {"linear": False}, "clear-2": {"student": "clear-2"}}
    flux = module.Shown("emoji-flux", sides, {32: (1, 1)}, guidance=3.0, token=4)
    small = (replace(emoji, plan=plan), flux, replace(lit, plan={16: (1, 2)}))
    monkeypatch.setattr(module, "MODELS", small)
    monkeypatch.setattr(module, "VIDEOS", (module.Video("emoji-video", {9: ("bee",)}),))
    return module


def test_the_demo_draws_all_sides_and_prints_their_cost(demo, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(out)])
    demo.main()
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.*")) == [
        "emoji-flux/a-red-heart-32-clear-2.png",
        "emoji-flux/a-red-heart-32-softmax.png",
        "emoji-flux/contact-sheet.png",
        "emoji-lit/contact-sheet.png",
        "emoji-lit/face-16-linear.png",
        "emoji-lit/face-16-softmax.png",
        "emoji-video/bee-9.webp",
        "emoji-video/contact-sheet.png",
        "emoji/a-pizza-64-linear.png",
        "emoji/a-pizza-64-softmax.png",
        "emoji/a-red-heart-128-linear.png",
        "emoji/a-red-heart-128-softmax.png",
        "emoji/a-red-heart-64-linear.png",
        "emoji/a-red-heart-64-softmax.png",
        "emoji/contact-sheet.png",
    ]
    assert Image.open(out / "emoji" / "a-red-heart-128-linear.png").size == (128, 128)
    printed = capsys.readouterr().out
    assert "128 px" in printed and "zoo:emoji-flux" in printed
    assert "10 pictures and 1 clips are in" in printed
    with Image.open(out / "emoji-video" / "bee-9.webp") as clip:
        assert clip.n_frames == 9
        first = clip.convert("RGB")
    with Image.open(out / "emoji-video" / "contact-sheet.png") as shown:
        assert shown.size == (8 * first.width, first.height)


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
