"""The script that trains the zoo's video model, on three animations made here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from linfusion.models import LinGenTransformer3DModel

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
    for name in ("train_video", "train_unet", "clips", "data", "text", "loop"):
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
    assert sheet.size == (64 * 8 // 2, 64)


def test_the_components_of_a_pipeline_are_left_behind(video, flags, monkeypatch, tmp_path):
    run(video, monkeypatch, *flags, "--output", tmp_path)
    folder = tmp_path / "pipeline"
    transformer = LinGenTransformer3DModel.from_pretrained(folder / "transformer")
    assert transformer.config.time_positions == "block"
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift == 2.0
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    assert encoder.config.vocab_size == len(tokenizer)
    assert AutoencoderKL.from_pretrained(folder / "vae").config.latent_channels == 4


def test_every_block_has_one_noise_level_and_the_history_little(video):
    torch.manual_seed(0)
    t = video.noise_levels(4000, 18)
    blocks = t.split([6, 4, 4, 4], 1)  # the first takes the remainder
    assert all((block == block[:, :1]).all() for block in blocks)
    levels = torch.stack([block[:, 0] for block in blocks], 1)
    assert ((levels >= 0) & (levels < 1)).all()
    clean = (levels == 0).float().mean(0)
    # a block is in the past of the drawn one with chance 3/4, 2/4, 1/4, 0, and half of those clean
    torch.testing.assert_close(clean, torch.tensor([3, 2, 1, 0]) / 8, atol=0.03, rtol=0)
    assert not (video.noise_levels(4000, 1) == 0).any()


def test_clean_frames_have_no_loss(video, monkeypatch):
    def transformer(x, t, states, mask, return_dict):
        return (torch.where(t[:, None, :, None, None] > 0, 0.0, torch.nan).expand_as(x),)

    levels = torch.tensor([[0.0] * 4 + [0.5] * 4])
    monkeypatch.setattr(video, "noise_levels", lambda batch, frames: levels)
    loss = video.flow_loss(transformer, torch.zeros(1, 8, 4, 8, 8), None, None)
    assert 0.8 < loss < 1.2  # the noise alone


@torch.no_grad()
def test_sampling_goes_on_from_the_blocks_before(video):
    torch.manual_seed(0)
    model, scheduler = small(), FlowMatchEulerDiscreteScheduler(shift=2.0)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    states = torch.randn(2, 5, 128), torch.ones(2, 5)

    def sampled(blocks, seed=0):
        torch.manual_seed(seed)
        return video.sample(model, scheduler, states, (1, 4, 4, 8, 8), blocks=blocks, steps=2)

    two = sampled(2)
    assert two.shape == (1, 4, 8, 8, 8)
    assert torch.equal(two[:, :, :4], sampled(1))
    torch.manual_seed(0)
    torch.randn(1, 4, 4, 8, 8)
    alone = video.sample(model, scheduler, states, (1, 4, 4, 8, 8), blocks=1, steps=2)
    assert (alone - two[:, :, 4:]).abs().max() > 1e-2


def test_a_size_without_whole_tokens_is_refused(video, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(video, monkeypatch, "--size", 100)
    assert "--size: expected a multiple of 64, got 100" in capsys.readouterr().err
