"""Whole pipelines on several ranks give the picture of one."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
)
from peft import LoraConfig
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from linfusion.linearize import linearize
from linfusion.parallel.parallelize import parallelize, unparallelize
from tests.compat.test_adapters import with_ip_adapter
from tests.parallel.pool import cases, run
from tests.parallel.sharing import shared
from tests.tiny import (
    tiny_controlnet,
    tiny_image,
    tiny_sd_pipeline,
    tiny_xl_pipeline,
)
from tests.tiny_joint import tiny_flux_pipeline, tiny_sd3_pipeline
from tests.tiny_video import tiny_lingen
from tests.tiny_video_pipelines import tiny_wan_pipeline
from tests.training.objectives.test_whole import pixart_pipeline


def lively(pipe):
    """What was learned does something, as it would in a student."""
    model = getattr(pipe, "unet", None) or pipe.transformer
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if any(f".{part}." in name for part in ("linfusion", "lit", "clear", "mate")):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipe


def controlled():
    return tiny_sd_pipeline(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())


def adapted():
    pipe = tiny_sd_pipeline()
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    )
    with_ip_adapter(pipe)
    return pipe


PROMPT = {"prompt": "a red apple", "num_inference_steps": 2, "output_type": "pt"}
CASES = {
    "sd": (tiny_sd_pipeline, "linfusion", {}, {"height": 80}),
    "xl": (tiny_xl_pipeline, "linfusion", {}, {}),
    "controlnet": (controlled, "linfusion", {}, {"image": tiny_image(1)}),
    "adapters": (adapted, "linfusion", {}, {"ip_adapter_image": tiny_image(3, 32)}),
    "flux": (tiny_flux_pipeline, "clear", {"radius": 4}, {"height": 36, "width": 24}),
    "sd3": (tiny_sd3_pipeline, "clear", {"radius": 3}, {"height": 28, "width": 32}),
    "pixart": (
        pixart_pipeline,
        "lit",
        {"heads": 2},
        {"height": 96, "width": 64, "use_resolution_binning": False},
    ),
    "wan": (
        tiny_wan_pipeline,
        "mate",
        {"window": (2, 2, 2)},
        {"height": 48, "width": 16, "num_frames": 5},
    ),
    "pag": (
        lambda: tiny_sd_pipeline(StableDiffusionPAGPipeline),
        "linfusion",
        {},
        {"pag_scale": 2.0},
    ),
    "inpaint": (
        lambda: tiny_sd_pipeline(StableDiffusionInpaintPipeline),
        "linfusion",
        {},
        {"image": tiny_image(0), "mask_image": tiny_image(1).convert("L"), "strength": 1.0},
    ),
    "lingen": (tiny_lingen, None, {}, {"height": 64, "width": 16, "num_frames": 8}),
}
ON_THREE = ("sd", "sd3", "wan")
RARE = ("pag", "inpaint")


def picture(pipe, call, seed=0):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    result = pipe(**{**PROMPT, **call}, generator=generator)
    return result.images if hasattr(result, "images") else result.frames


def pipeline_job(ranks, name):
    make, method, options, call = CASES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    if method is not None:
        linearize(pipe, method, **options)
        lively(pipe)
    cls = type(pipe)
    alone = picture(pipe, call)
    with shared(ranks, pipe):
        together = picture(pipe, call)
        assert type(pipe).__name__ == cls.__name__ and isinstance(pipe, cls)
    again = picture(pipe, call)
    assert type(pipe) is cls
    return (
        float((torch.as_tensor(together) - torch.as_tensor(alone)).abs().max()),
        bool((torch.as_tensor(again) == torch.as_tensor(alone)).all()),
    )


@pytest.mark.parametrize(
    "name, world",
    cases(
        [(name, 3 if name in ON_THREE else 2) for name in CASES if name not in RARE],
        [(name, 2 if name in ON_THREE else 3) for name in CASES],
    ),
)
def test_a_shared_pipeline_gives_the_picture_of_one(name, world):
    for error, undone in run(world, pipeline_job, name):
        assert error < 1e-4 and undone


# ---- guidance on two groups of ranks


def guided_job(ranks, name, sp):
    make, method, options, call = CASES[name]
    pipe = lively(linearize(make(), method, **options))
    alone = picture(pipe, call)
    parallelize(pipe, sp=sp, cfg=2)
    together = picture(pipe, call)
    unparallelize(pipe)
    return float((together - alone).abs().max())


@pytest.mark.parametrize("name", cases(["controlnet"], ["xl", "sd3"]))
def test_halves_of_guidance_are_computed_on_two_groups(name):
    assert max(run(4, guided_job, name, None)) < 1e-4


def unguided_job(ranks):
    pipe = linearize(tiny_sd_pipeline(), "linfusion")
    parallelize(pipe, sp=2, cfg=2)
    try:
        picture(pipe, {"guidance_scale": 1.0})
    except ValueError as error:
        return str(error)


def test_two_groups_without_guidance_are_refused():
    for message in run(4, unguided_job):
        assert message.startswith(
            "cfg: got 2, but UNet2DConditionModel is called with a batch of 1"
        )


# ---- one call on all ranks


def seedless_job(ranks):
    pipe = linearize(tiny_sd_pipeline(), "linfusion")
    torch.manual_seed(ranks.rank)  # what would have been drawn from
    with shared(ranks, pipe):
        return picture(pipe, {}, seed=None).numpy()


def test_ranks_agree_on_a_seed_that_nobody_gave():
    one, other = run(2, seedless_job)
    assert (one == other).all()


def differing_job(ranks, name):
    pipe = linearize(tiny_sd_pipeline(), "linfusion")
    differing = {
        "prompt": ["a", "b"],
        "height": [64, 80],
        "generator": [torch.Generator().manual_seed(i) for i in range(2)],
        "latents": [torch.full((1, 4, 8, 8), float(i)) for i in range(2)],
    }
    with shared(ranks, pipe):
        try:
            pipe(**{**PROMPT, name: differing[name][ranks.rank]})
        except ValueError as error:
            return str(error)


@pytest.mark.parametrize("name", ["prompt", "height", "generator", "latents"])
def test_ranks_that_are_called_differently_are_told_in_what(name):
    for message in run(2, differing_job, name):
        assert message.startswith(f"{name}: ranks 0 and 1 have different ones")


def failing_job(ranks):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    if ranks.rank > 1:
        return None
    pipe = linearize(tiny_sd_pipeline(), "linfusion")
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("sp",))
    parallelize(pipe, mesh=mesh)

    def fail(pipe, step, timestep, tensors):
        if ranks.rank == 1:
            raise OSError("the disk is full")
        return tensors

    start = time.monotonic()
    try:
        pipe(**PROMPT, callback_on_step_end=fail)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start


def test_a_rank_that_fails_ends_the_others_with_its_reason():
    waiting, failing, *_ = run(4, failing_job)
    assert failing[:2] == ("OSError", "the disk is full")
    assert waiting[0] == "RuntimeError" and waiting[2] < 60
    assert waiting[1] == "rank 1 failed, and with it this one: OSError: the disk is full"


# ---- streams


def streamed_job(ranks, folder, alone):
    """Frames of a video of which the first block was drawn, and the rest after a resumption."""
    call = {"height": 48, "width": 16, "num_frames": 9, "num_inference_steps": 2}
    pipe = tiny_lingen()
    if alone:
        seeded = torch.Generator().manual_seed(3)
        return list(pipe.stream("a red apple", generator=seeded, state=folder, **call))
    with shared(ranks, pipe):
        frames = pipe.stream(
            "a red apple", generator=torch.Generator().manual_seed(3), state=folder, **call
        )
        first = next(frames)
        frames.close()
        return [first, *pipe.stream("a red apple", state=folder, resume=True, **call)]


def test_a_stream_on_ranks_and_its_folder_are_those_of_one_process(tmp_path):
    one, several = tmp_path / "one", tmp_path / "several"
    (alone,) = run(1, streamed_job, str(one), True)
    for frames in run(2, streamed_job, str(several), False):
        assert len(frames) == len(alone)
        assert all(abs(a.astype(int) - b).max() <= 1 for a, b in zip(frames, alone, strict=True))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in several.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            a, b = (load_file(folder / name) for folder in (one, several))
            assert a.keys() == b.keys()
            for key, tensor in a.items():
                assert torch.allclose(tensor, b[key], atol=1e-4), key
