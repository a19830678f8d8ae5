"""HighResPipeline against the same thing done by hand with diffusers and formulas."""

from __future__ import annotations

import copy
import math
import re
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import (
    AutoencoderTiny,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FluxControlPipeline,
    FluxInpaintPipeline,
    HeunDiscreteScheduler,
    KandinskyV22Pipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPipeline,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import linfusion
from linfusion import HighResPipeline
from linfusion.files.enlarged import Enlarged
from linfusion.files.picture_reader import read, read_parameters
from linfusion.pipelines.highres import forecast, guided, pace
from linfusion.pipelines.highres.settings import split
from tests.compat.test_adapters import with_ip_adapter
from tests.student_files import student_for
from tests.tiny import (
    tiny_controlnet,
    tiny_image,
    tiny_scheduler,
    tiny_sd_pipeline,
    tiny_unet,
    tiny_vae,
    tiny_xl_pipeline,
    tiny_xl_unet,
)
from tests.tiny_joint import tiny_flux_pipeline

LEVEL = 1 / 255


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def draw(pipe, highres=None, **changes):
    """Pixels of a small run: a base of 64 px and one stage of 96 px, [3, H, W]."""
    arguments = {
        "prompt": "a red apple",
        "size": 96,
        "strengths": 0.75,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "generator": seeded(),
        "output_type": "pt",
        **changes,
    }
    made = (highres or HighResPipeline(pipe))(**arguments).images
    return made[0] if isinstance(made, torch.Tensor) else made


def with_scheduler(kind, **changes):
    return tiny_sd_pipeline(scheduler=kind.from_config(tiny_scheduler().config, **changes))


@torch.no_grad()
def decode(pipe, latents):
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0]
    return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def encode(pipe, picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


def test_sdedit_is_the_cascade_that_diffusers_gives_by_hand():
    pipe = linfusion.linearize(
        with_scheduler(EulerAncestralDiscreteScheduler), weights=student_for(tiny_unet())
    )
    call = {"prompt": "a red apple", "num_inference_steps": 4, "output_type": "latent"}
    call |= {"generator": seeded(), "guidance_scale": 5.0}
    latents = pipe(**call, height=64, width=64).images
    later = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    for side, strength in ((128, 0.75), (160, 0.25)):
        picture = Image.fromarray(decode(pipe, latents)).resize((side, side))
        start = encode(pipe, picture)
        latents = later(**call, image=start, strength=strength).images
    expected = torch.from_numpy(decode(pipe, latents)).permute(2, 0, 1) / 255
    ours = draw(pipe, size=160, strengths=[0.75, 0.25], guidance_scale=5.0)
    # Another seed is 0.5 away.
    assert (ours - expected).abs().max() < 2.5 * LEVEL


@torch.no_grad()
def by_hand(pipe, start, noise, strength, ratio, anchor, steps, prompt):
    """The stage as the authors write it: two steps of Euler's method and their blend."""
    unet, scheduler = pipe.unet, copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    first = steps - int(steps * strength)
    text = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    x = start + noise * scheduler.sigmas[first]
    for i in range(first, steps):
        t, sigma = scheduler.timesteps[i], scheduler.sigmas[i]
        f = 0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))
        c1, c2, c3 = f**3, f, 0.99 * f + 0.01
        x = (1 - c1) * x + c1 * (start + noise * sigma)
        scale = 1 / (sigma**2 + 1) ** 0.5
        plain = unet(x * scale, t, text).sample
        axis = torch.arange(1 - ratio, ratio).float()
        kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * (0.8 * c3) ** 2))
        kernel = (kernel / kernel.sum()).expand(4, 1, -1, -1)
        blurred = F.conv2d(x, kernel, padding=ratio - 1, groups=4)
        blurred = standard(blurred, *moments(x))
        wide_unet = copy.deepcopy(unet)
        for layer in wide_unet.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                layer.dilation, layer.padding = (ratio, ratio), (ratio, ratio)
        wide = wide_unet(blurred * scale, t, text).sample
        step = scheduler.sigmas[i + 1] - sigma
        x = (1 - c2) * (x + step * plain) + c2 * (x + step * wide)
    return standard(x, *moments(anchor))


def moments(x):
    return x.mean((-2, -1), keepdim=True), x.std((-2, -1), keepdim=True)


def standard(x, mean, deviation):
    own = moments(x)
    return (x - own[0]) / own[1] * deviation + mean


@pytest.mark.parametrize("strategy", ["guided", "superres"])
def test_guided_stages_are_those_of_the_authors_formulas(strategy, tmp_path):
    pipe = with_scheduler(EulerDiscreteScheduler, timestep_spacing="leading")
    given = {"strategy": strategy, "size": 128, "state": tmp_path / "run", "output_type": "latent"}
    if strategy == "superres":
        given |= {"image": tiny_image(size=64)}
    generator = seeded()
    ours = draw(pipe, generator=generator, **given)
    kept = tmp_path / "run"
    first = 0 if strategy == "superres" else 1
    start = load_file(kept / f"start-{first:02}.safetensors")["latents"]
    before = seeded()
    if first:
        base = load_file(kept / "stage-00.safetensors")
        before.set_state(base["generator"])
        anchor = base["latents"]
    else:
        anchor = start
    noise = torch.randn(start.shape, generator=before)
    expected = by_hand(pipe, start, noise, 0.75, 2, anchor, 4, "a red apple")
    torch.testing.assert_close(ours, expected[0], atol=2e-4, rtol=0)


def test_guided_differs_from_sdedit():
    pipe = tiny_sd_pipeline()
    assert (draw(pipe, strategy="guided", size=128) - draw(pipe, size=128)).abs().max() > LEVEL * 5


@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_dilation_is_there_within_and_in_this_thread_alone(padding):
    near = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode=padding)
    far = torch.nn.Conv2d(2, 3, 3, padding=4, padding_mode=padding, dilation=4)
    far.load_state_dict(near.state_dict())
    x = torch.randn(1, 2, 12, 12)
    before, wide, elsewhere = near(x), far(x), []
    thread = threading.Thread(target=lambda: elsewhere.append(near(x)))
    with pytest.raises(ZeroDivisionError), guided.Dilated(4):
        thread.start()
        thread.join()
        assert torch.equal(near(x), wide) and not torch.equal(near(x), before)
        raise ZeroDivisionError
    assert torch.equal(near(x), before) and torch.equal(elsewhere[0], before)


@pytest.mark.parametrize("budget", ["25MB", "200MB"])
def test_the_budget_does_not_change_the_picture(budget):
    pipe = tiny_sd_pipeline()
    bounded = HighResPipeline(pipe, memory_budget=budget)
    assert (draw(pipe, bounded) - draw(pipe)).abs().max() <= 1.5 * LEVEL


def test_noise_comes_from_the_generator_alone():
    pipe = with_scheduler(EulerAncestralDiscreteScheduler)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draw(pipe)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(pipe), first)
    assert not torch.equal(draw(pipe, generator=seeded(4)), first)


def test_a_run_leaves_the_pipeline_as_it_was():
    pipe = tiny_sd_pipeline()
    bar, attributes = dict(pipe._progress_bar_config), dict(vars(pipe.unet))
    stop = {"callback_on_step_end": lambda *_: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        draw(pipe, strategy="guided", **stop)
    assert vars(pipe.unet) == attributes
    assert pipe._progress_bar_config == bar


def test_the_callback_sees_every_step_of_every_stage():
    seen = []

    def callback(pipe, i, t, given):
        seen.append((type(pipe).__name__, i, tuple(given["latents"].shape[2:])))
        return {}

    draw(tiny_sd_pipeline(), callback_on_step_end=callback)
    base = [("StableDiffusionPipeline", i, (8, 8)) for i in range(4)]
    assert seen == base + [("StableDiffusionImg2ImgPipeline", i, (12, 12)) for i in range(3)]


def test_xl_draws_from_a_picture():
    picture = tiny_image(size=64)
    pipe = tiny_xl_pipeline()
    ours = draw(pipe, image=picture, strengths=0.25)
    assert ours.shape == (3, 96, 96)
    other = draw(pipe, image=tiny_image(9, size=64), strengths=0.25)
    assert (ours - other).abs().max() > LEVEL


@pytest.mark.parametrize("control", ["picture", "previous"])
def test_a_controlnet_looks_at_every_stage(control):
    pipe = tiny_sd_pipeline(StableDiffusionControlNetPipeline, controlnet=tiny_controlnet())
    given = {"control_image": tiny_image(2, 48) if control == "picture" else control}
    ours = draw(pipe, **given)
    off = draw(pipe, control_image=tiny_image(2, 48), controlnet_conditioning_scale=0.0)
    assert (ours - off).abs().max() > LEVEL


def test_a_controlnet_looks_at_every_stage_of_xl():
    pipe = tiny_xl_pipeline(
        StableDiffusionXLControlNetPipeline, controlnet=tiny_controlnet(tiny_xl_unet())
    )
    ours, off = (
        draw(pipe, control_image=tiny_image(2, 48), controlnet_conditioning_scale=scale)
        for scale in (1.0, 0.0)
    )
    assert ours.shape == (3, 96, 96) and (ours - off).abs().max() > LEVEL


def test_a_lora_draws_as_when_it_is_fused():
    pipe = linfusion.linearize(tiny_sd_pipeline(), weights=student_for(tiny_unet()))
    without = draw(pipe)
    torch.manual_seed(9)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    apart = draw(pipe)
    pipe.fuse_lora(components=["unet"])
    assert (apart - without).abs().max() > 5 * LEVEL
    assert (apart - draw(pipe)).abs().max() < 2.5 * LEVEL


def test_an_ip_adapter_is_given_its_picture_at_every_stage():
    pipe = with_ip_adapter(tiny_sd_pipeline())
    one, other = (draw(pipe, ip_adapter_image=tiny_image(i, 32)) for i in (3, 4))
    assert (one - other).abs().max() > 0


def test_a_file_holds_the_same_picture_and_what_made_it(tmp_path):
    pipe = tiny_sd_pipeline()
    draw(pipe, output=tmp_path / "x.png")
    whole = draw(pipe).permute(1, 2, 0).mul(255).round()
    assert np.array_equal(read(tmp_path / "x.png"), whole.numpy())
    about = read_parameters(tmp_path / "x.png")
    assert about["prompt"] == "a red apple"
    assert about["seed"] == 3
    assert [s["width"] for s in about["stages"]] == [64, 96]


@pytest.mark.parametrize("stage", [0, 1])
def test_an_interrupted_run_gives_the_picture_it_has_and_writes_no_file(stage, tmp_path):
    def stop(runs, i, t, given):
        seen.append(i)
        runs._interrupt = len(seen) == (2 if stage == 0 else 6)
        return {}

    seen, pipe = [], tiny_sd_pipeline()
    given = {"output": tmp_path / "x.png", "state": tmp_path / "run"}
    ours = draw(pipe, callback_on_step_end=stop, **given)
    assert ours.shape == ((3, 64, 64), (3, 96, 96))[stage]
    if stage == 0:  # as diffusers gives it
        seen.clear()
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
        theirs = pipe("a red apple", generator=seeded(), callback_on_step_end=stop, **call).images
        assert (ours - theirs[0]).abs().max() < 1.5 * LEVEL
    assert not list(tmp_path.glob("x*"))
    draw(pipe, resume=True, **given)  # the flag of before is not in the way
    whole = draw(pipe).permute(1, 2, 0).mul(255).round()
    assert np.array_equal(read(tmp_path / "x.png"), whole.numpy())


def test_without_a_budget_the_denoiser_runs_as_it_is():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    pipe = tiny_sd_pipeline()
    call = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    with Count() as ours:
        HighResPipeline(pipe)(**call, size=64)
    with Count() as theirs:
        pipe(**call)
    assert ours.calls <= 1.05 * theirs.calls


def test_a_compiled_pipeline_draws_the_same_with_and_without_a_budget():
    pipe = tiny_sd_pipeline()
    call = {"size": 64, "num_inference_steps": 1}
    whole = draw(pipe, **call)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert (draw(pipe, **call) - whole).abs().max() < 1.5 * LEVEL
    bounded = HighResPipeline(pipe, memory_budget="1GB")
    assert (draw(pipe, bounded, **call) - whole).abs().max() < 1.5 * LEVEL


def test_linear_layers_under_perturbed_guidance_are_linear_in_every_stage(recwarn):
    unet = tiny_unet()
    pipe = tiny_sd_pipeline(StableDiffusionPAGPipeline, pag_applied_layers="mid")
    highres = HighResPipeline(pipe)
    linfusion.linearize(pipe, weights=student_for(unet))
    seen = set()

    def callback(runs, i, t, given):
        seen.update(type(p).__name__ for p in runs._pag_attn_processors)
        return {}

    ours = draw(pipe, highres, pag_scale=3.0, callback_on_step_end=callback)
    bounded = HighResPipeline(pipe, memory_budget="1GB")
    assert (draw(pipe, bounded, pag_scale=3.0) - ours).abs().max() < 1.5 * LEVEL
    assert seen == {"LinFusionPAGCFGProcessor", "LinFusionPAGProcessor"}
    assert not [w for w in recwarn if "run PAG" in str(w.message)]


def test_weights_that_are_offloaded_one_by_one_draw_the_same(tmp_path):
    pipe = tiny_sd_pipeline()
    whole = draw(pipe)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, torch.device("cpu"))
    assert torch.equal(draw(pipe, state=tmp_path / "run"), whole)


def test_two_runs_on_one_unet_in_two_threads_are_as_alone():
    # What changes as it is called, a scheduler and a tokenizer, is each pipeline's own.
    first, other = tiny_sd_pipeline(), tiny_sd_pipeline()
    other.register_modules(unet=first.unet, vae=first.vae, text_encoder=first.text_encoder)
    pipes = [first, other]
    calls = [{"strategy": "guided", "size": 128}, {"size": 96}]
    alone = [draw(pipe, **call) for pipe, call in zip(pipes, calls, strict=True)]
    found = [None, None]

    def run(i):
        found[i] = draw(pipes[i], **calls[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(alone, found, strict=True))


# ---- sizes and pictures


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.floats(1.3, 8),
    st.integers(1, 12),
    st.booleans(),
)
def test_stages_grow_up_to_the_exact_size(base, factor, times, from_picture):
    base = tuple(8 * side for side in base)
    target = tuple(times * side for side in base)
    sizes = split(base, target, factor, 8, from_picture=from_picture)
    assert sizes[-1] == target
    assert (sizes[0] == base) or from_picture
    longest = [max(size) for size in sizes]
    assert longest == sorted(longest)
    assert all(side % 8 == 0 for size in sizes for side in size)


@pytest.mark.parametrize("height, width", [(130, 208), (24, 40), (40, 64)])
def test_bands_of_an_enlarged_picture_are_its_rows(height, width):
    noise = torch.randint(0, 256, (40, 64, 3), generator=seeded(), dtype=torch.uint8).numpy()
    enlarged = Enlarged(noise, height, width)
    resample = Image.Resampling.BICUBIC
    whole = Image.fromarray(noise).resize((width, 40), resample).resize((width, height), resample)
    bands = np.concatenate([enlarged[i : i + 7] for i in range(0, height, 7)])
    assert np.abs(bands.astype(int) - np.asarray(whole)).max() <= 1


# ---- plans


def test_a_plan_names_every_piece_and_draws_nothing():
    highres = HighResPipeline(tiny_sd_pipeline())
    generator = torch.get_rng_state()
    plan = highres.plan("a", size=96, num_inference_steps=4, strengths=0.75, measure=False)
    assert [(w.what, w.width, w.steps) for w in plan.work] == [
        ("denoise", 64, 4),
        ("decode", 64, 1),
        ("encode", 96, 1),
        ("denoise", 96, 3),
        ("decode", 96, 1),
    ]
    assert plan.seconds is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_plan_estimates_time_and_is_json():
    plan = HighResPipeline(tiny_sd_pipeline()).plan("a", size=64, num_inference_steps=4)
    assert plan.to_dict()["seconds"] == sum(w.seconds for w in plan.work) > 0
    assert "64×64" in str(plan)


def test_the_budget_that_a_refusal_names_is_the_smallest_that_does(tmp_path):
    pipe = tiny_sd_pipeline()
    call = {"prompt": "a", "size": 256, "base_size": 256, "num_inference_steps": 4}
    call["output"] = tmp_path / "x.png"
    with pytest.raises(ValueError, match="memory_budget: got '1MB'") as error:
        HighResPipeline(pipe, memory_budget="1MB").plan(**call, measure=False)
    least = int(re.search(r"at least (\d+)MB", str(error.value))[1])
    HighResPipeline(pipe, memory_budget=f"{least}MB").plan(**call, measure=False)
    with pytest.raises(ValueError, match="at least"):
        HighResPipeline(pipe, memory_budget=int(least * 0.93e6)).plan(**call, measure=False)


def test_a_plan_of_a_gigapixel_makes_no_large_tensor():
    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor) and not t.is_meta:
                    self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
            return out

    pipe = tiny_sd_pipeline()
    call = {"base_size": 64, "size": 1 << 15, "factor": 600.0, "num_inference_steps": 4}
    with Largest() as seen:
        plan = HighResPipeline(pipe).plan("a", **call, measure=False)
    assert [w.width for w in plan.work] == [64, 64, *[1 << 15] * 3]
    assert seen.nbytes <= 1 << 26


def test_a_plan_does_not_carry_what_a_step_costs_at_any_size(monkeypatch):
    """On a machine where the smallest step takes longer than what is enough to measure."""

    def took(flops):
        return 5.0 + 2e-9 * flops

    real = pace.run_once

    def run_once(*args, dry):
        ledger, _ = real(*args, dry=True)
        return ledger, took(ledger.flops)

    monkeypatch.setattr(pace, "run_once", run_once)
    plan = HighResPipeline(tiny_sd_pipeline()).plan(
        "a", size=1024, num_inference_steps=4, strengths=0.5
    )
    expected = sum(w.steps * took(w.flops) for w in plan.work)
    assert plan.seconds == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "taken, at, seconds",
    [
        ([(1, 3.0), (4, 9.0)], 100, 201.0),
        ([(1, 3.0), (4, 9.0), (16, 33.0)], 0, 1.0),
        ([(4, 2.0)], 8, 4.0),
        ([(4, 2.0), (4, 2.0)], 8, 4.0),
        ([(1, 1.0), (4, 16.0)], 8, 32.0),  # no time below none: as the largest
        ([(1, 2.0), (4, 1.0)], 8, 2.0),
    ],
)
def test_the_pace_is_the_line_through_what_was_measured(taken, at, seconds):
    assert pace.line(taken)(at) == pytest.approx(seconds, rel=1e-6)


def test_a_clock_is_read_when_the_accelerator_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: done.append(str(device)))
    with forecast.Clock(torch.device("cuda")) as clock:
        done.append("work")
    assert done == ["cuda", "work", "cuda"] and clock.seconds >= 0


# ---- refusals


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": 100}, "height: got 100; accepted are multiples of 8 pixels; the nearest are 96"),
        ({"size": 32}, "size: got 32×32, which is smaller than the 64 pixels"),
        ({"size": None}, "size: got size=None, height=None"),
        ({"base_size": 128}, "base_size: got 128×128; accepted is up to the size, 96×96"),
        ({"strengths": [0.5, 1.5]}, "strengths: got 1.5; accepted"),
        ({"strengths": 0.1}, "strengths: 0.1 of 4 steps is no step"),
        ({"strengths": []}, "strengths: got none"),
        ({"strategy": "tiles"}, "strategy: got 'tiles'; accepted are sdedit, guided, superres"),
        ({"strategy": "superres"}, "image: strategy 'superres' starts from a picture"),
        ({"image": tiny_image(size=128)}, "size: got 96×96, which is smaller than the image"),
        ({"image": tiny_image().crop((0, 0, 64, 32))}, "size: got 96×96, which would stretch"),
        ({"control_image": tiny_image()}, "control_image: StableDiffusionPipeline has no Contr"),
        ({"output": "x.gif"}, "path: suffix '.gif'"),
        ({"output": "/nowhere/x.png"}, "path: /nowhere is not a folder"),
        ({"output": "x.jpg", "size": 70_000 // 8 * 8}, "height: got 70,000; accepted are up to"),
        ({"prompt": ["a", "b"]}, "prompt: got 2 prompts"),
        ({"generator": [seeded(), seeded()]}, "generator: got 2"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"factor": 1.0}, "factor: got 1.0"),
        ({"factor": 1.000000001}, "factor: got 1.000000001, which makes 405,465,"),
        ({"factor": math.inf}, "factor: got inf"),
        ({"size": 2**20}, "height: got 1,048,576; accepted are up to 32,768 pixels"),
        ({"guidance_scale": math.inf}, "guidance_scale: got inf; accepted are finite numbers"),
        ({"guidance_scale": [1.0, math.nan]}, "guidance_scale: got nan; accepted are finite"),
        ({"gaussian_sigma": math.nan}, "gaussian_sigma: got nan; accepted are numbers from 0"),
        ({"image": 1}, "image: got 1; accepted are the path of a file, a Pillow image"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt: StableDiffusionPipeline takes no"),
        ({"output_type": "jpeg"}, "output_type: got 'jpeg'"),
    ],
)
def test_a_wrong_call_is_refused_before_any_work(changes, message):
    pipe = tiny_sd_pipeline()
    pipe.unet.forward = None  # whoever calls it fails
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(pipe, **changes)


def test_a_scheduler_of_two_calls_a_step_is_refused_for_guided():
    with pytest.raises(ValueError, match="strategy: 'guided' needs a scheduler"):
        draw(with_scheduler(HeunDiscreteScheduler), strategy="guided")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: object(), "pipe: got object"),
        (lambda: tiny_sd_pipeline(StableDiffusionImg2ImgPipeline), "is image-to-image"),
        (lambda: tiny_sd_pipeline(StableDiffusionInpaintPipeline), "fills masks"),
        (lambda: tiny_sd_pipeline(vae=AutoencoderTiny()), "has no AutoencoderKL as its vae"),
        (lambda: tiny_sd_pipeline(LatentConsistencyModelPipeline), "steps and a guidance of its"),
        (lambda: tiny_sd_pipeline(unet=tiny_unet(in_channels=9)), "denoises 9 channels"),
        (
            lambda: KandinskyV22Pipeline(tiny_unet(), tiny_scheduler(), tiny_vae()),
            "draws from no prompt",
        ),
        (lambda: tiny_flux_pipeline(FluxInpaintPipeline), "FluxInpaintPipeline fills masks"),
        (lambda: tiny_flux_pipeline(FluxControlPipeline), "draws after a control picture"),
    ],
)
def test_a_pipeline_that_does_not_draw_from_text_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        HighResPipeline(make())
