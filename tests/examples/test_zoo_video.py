"""The script that trains the zoo's video model, on three animations made here."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from linfusion.evaluation.video_metrics import ClipDistances
from linfusion.models import LinGenTransformer3DModel
from linfusion.pipelines.load import load

PICTURES = Path(__file__).parents[1] / "data" / "emoji"
SCRIPTS = Path(__file__).parents[2] / "examples" / "zoo"


@pytest.fixture
def video(monkeypatch, tmp_path):
    """The script with a small transformer and a cache of its own."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    module = importlib.import_module("train_video")
    monkeypatch.setattr(module, "PROMPTS", ["pizza"])
    monkeypatch.setattr(module, "build_transformer", small)
    yield module
    for name in ("judge_video", "train_video", "train_unet", "clips", "data", "text", "loop"):
        sys.modules.pop(name, None)


def small(size=64, mixer="mate"):
    return LinGenTransformer3DModel(
        in_channels=4,
        patch_size=(1, 2, 2),
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        text_dims=(128,),
        pos_embed_size=(12, 8, 8),
        d_state=4,
        causal_blocks=True,
        block_frames=4,
        time_positions="block",
        self_attention=mixer,
    )


@pytest.fixture
def flags(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i, name in enumerate(("1f400", "2764-fe0f", "1f355")):
        frames = [
            Image.fromarray(np.full((64, 64, 3), 40 * i + 5 * f, np.uint8)) for f in range(12)
        ]
        frames[0].save(folder / f"{name}.webp", save_all=True, append_images=frames[1:])
    return (
        *("--clips", folder, "--data", PICTURES, "--size", 64, "--batch-size", 2, "--stills", 2),
        *("--frames", 4, 8, "--steps", 2, "--checkpoint-every", 1),
    )


def run(module, monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    module.main()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("mixer", ["mate", "softmax"])
def test_a_stopped_training_goes_on_to_the_same_weights(video, flags, mixer, monkeypatch, tmp_path):
    flags += ("--mixer", mixer)
    run(video, monkeypatch, *flags, "--output", tmp_path / "whole")
    save = video.loop.save

    def save_and_stop(path, **state):
        save(path, **state)
        if path.name == "checkpoint.pt":
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(video.loop, "save", save_and_stop)
        with pytest.raises(StoppedError):
            run(video, patch, *flags, "--output", tmp_path / "stopped")
    run(video, monkeypatch, *flags, "--output", tmp_path / "stopped")
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        whole, stopped = (
            load_file(tmp_path / x / "pipeline" / f"{part}.safetensors")
            for x in ("whole", "stopped")
        )
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    sheet = Image.open(tmp_path / "whole" / "preview-2.png")
    assert sheet.size == (128 * 8 // 2, 128)


def test_what_is_left_behind_is_a_pipeline(video, flags, monkeypatch, tmp_path):
    run(video, monkeypatch, *flags, "--output", tmp_path)
    pipe = load(str(tmp_path / "pipeline"), torch_dtype=torch.float32)
    assert pipe.transformer.config.time_positions == "block"
    assert pipe.scheduler.config.shift == 2.0
    frames = pipe("pizza", num_frames=15, num_inference_steps=1).frames  # longer than the table
    assert frames.shape == (1, 15, 128, 128, 3)


def test_clean_frames_have_no_loss(video, monkeypatch):
    def transformer(x, t, states, mask, return_dict):
        return (torch.where(t[:, None, :, None, None] > 0, 0.0, torch.nan).expand_as(x),)

    levels = torch.tensor([[0.0] * 4 + [0.5] * 4])
    monkeypatch.setattr(video, "noise_levels", lambda batch, blocks, shift: levels)
    loss = video.flow_loss(transformer, torch.zeros(1, 8, 4, 8, 8), None, None)
    assert 0.8 < loss < 1.2  # the noise alone


def test_a_size_without_whole_tokens_is_refused(video, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(video, monkeypatch, "--size", 100)
    assert "--size: expected a multiple of 64, got 100" in capsys.readouterr().err


def test_model_and_twin_are_judged_beside_the_real_clips(video, flags, monkeypatch, tmp_path):
    for mixer in ("mate", "softmax"):
        run(video, monkeypatch, *flags, "--output", tmp_path / mixer, "--mixer", mixer)
    judge = importlib.import_module("judge_video")
    pipelines = ("--model", tmp_path / "mate/pipeline", "--twin", tmp_path / "softmax/pipeline")
    few = ("--count", 3, "--frames", 8, "--inference-steps", 1, "--clips", tmp_path / "clips")
    run(judge, monkeypatch, *pipelines, *few, "--output", tmp_path / "judged")
    found = json.loads((tmp_path / "judged/judgement.json").read_text())
    ratios = found["ratio"]
    assert set(ratios) == set(ClipDistances._fields)
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(found["model"][name] / found["twin"][name])
    # a clip's brightness goes up by 5 of 255 every three of its 36 frames, in frames 3 and 6
    assert found["figures"]["real"]["motion"] == pytest.approx(5 / 255 * 2 / 7, rel=0.01)
    with Image.open(tmp_path / "judged/clips.png") as shown:
        assert shown.size == (8 * 128, 9 * 128)  # the size of the transformer
