"""HighResPipeline on FLUX and Stable Diffusion 3 against the same thing done by hand."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.hooks import HookRegistry
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from PIL import Image

import linfusion
from linfusion import HighResPipeline
from linfusion.layers.record import record_of
from linfusion.pipelines.highres.cascade import with_windows
from linfusion.pipelines.highres.hosts import unpacked
from linfusion.pipelines.highres.low_resolution_guidance import Projection, low_frequencies
from linfusion.pipelines.highres.stages import Stage
from linfusion.students import saving as weights
from tests.tiny import tiny_image, tiny_sd_pipeline
from tests.tiny_joint import (
    flux_inputs,
    forward,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

LEVEL = 1 / 255
TEXT = 9
WINDOW = {"radius": 2.5, "proportional": True}
HOSTS = {"flux": tiny_flux_pipeline, "sd3": tiny_sd3_pipeline}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def draw(pipe, highres=None, **changes):
    """Pixels of a small run: a base of 24 by 32 px and one stage of 48 by 64, [3, H, W]."""
    arguments = {
        "prompt": "a red apple",
        "size": (48, 64),
        "base_size": 32,
        "num_inference_steps": 4,
        "max_sequence_length": TEXT,
        "generator": seeded(),
        "output_type": "pt",
        **changes,
    }
    made = (highres or HighResPipeline(pipe, clear=WINDOW))(**arguments).images
    return made[0] if isinstance(made, torch.Tensor) else made


@torch.no_grad()
def decode(pipe, latents, height=None, width=None):
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(latents).sample[0]
    return (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


@torch.no_grad()
def encode(pipe, picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    mean = pipe.vae.encode(pixels).latent_dist.mode()
    return (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("host", HOSTS)
def test_the_cascade_is_the_one_that_diffusers_gives_by_hand(host):
    pipe = HOSTS[host]()
    later_class = FluxImg2ImgPipeline if host == "flux" else StableDiffusion3Img2ImgPipeline
    base_guidance = 3.5 if host == "flux" else 7.0
    generator = seeded()
    call = {"prompt": "a red apple", "num_inference_steps": 4, "output_type": "latent"}
    call |= {"generator": generator, "max_sequence_length": TEXT}
    latents = pipe(**call, height=24, width=32, guidance_scale=base_guidance).images
    scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, shift=3.0, use_dynamic_shifting=False
    )
    later = later_class(**{**pipe.components, "scheduler": scheduler})
    later.set_progress_bar_config(disable=True)
    ntk = {"ntk": 10.0} if host == "flux" else {}
    picture = Image.fromarray(decode(pipe, latents, 24, 32)).resize((64, 48))
    start = encode(pipe, picture)
    linfusion.linearize(pipe, "clear", **WINDOW, **ntk)
    size = {"height": 48, "width": 64}
    latents = later(**call, **size, image=start, strength=0.7, guidance_scale=7.5).images
    linfusion.restore(pipe)
    expected = torch.from_numpy(decode(pipe, latents, 48, 64)).permute(2, 0, 1) / 255
    ours = draw(pipe)
    assert ours.shape == (3, 48, 64)
    assert (ours - expected).abs().max() < 2.5 * LEVEL
    assert (draw(pipe, generator=seeded(4)) - expected).abs().max() > 20 * LEVEL


# ---- attention


def everything(model):
    """Weights, processors, hooks and modules, to compare by ==."""
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    kinds = {name: type(p) for name, p in model.attn_processors.items()}
    return weights, [hooks, kinds, [name for name, _ in model.named_modules()]]


def same(one, other):
    return one[1] == other[1] and all(torch.equal(v, other[0][k]) for k, v in one[0].items())


@pytest.fixture
def student(tmp_path):
    """Folder of a CLEAR student of the tiny FLUX, with attention weights of its own."""
    pipe = tiny_flux_pipeline(transformer=tiny_flux(7))
    weights.save(linfusion.linearize(pipe, "clear", radius=2.5), tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_windows_and_their_weights_are_gone_after_a_run(student, error):
    pipe = tiny_flux_pipeline()
    before, stock, scheduler = everything(pipe.transformer), draw(pipe), pipe.scheduler
    config = dict(scheduler.config)
    highres = HighResPipeline(pipe, clear={"weights": student})
    during = []

    def callback(runs, i, t, given):
        now = everything(runs.transformer)
        weights = all(torch.equal(v, now[0][k]) for k, v in before[0].items())
        kinds = now[1][1] == before[1][1]
        assert weights == kinds
        during.append(not weights)
        if error is not None and len(during) == 5:
            raise error
        return {}

    with pytest.raises(error) if error else contextlib.nullcontext():
        drawn = draw(pipe, highres, callback_on_step_end=callback)
        assert (drawn - stock).abs().max() > 5 * LEVEL
    # Four steps of the base have the model's own weights, those after it the student's.
    assert during == [False] * 4 + [True] * (len(during) - 4) and during[-1]
    assert same(everything(pipe.transformer), before)
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config


@pytest.mark.parametrize("linear", [False, True])
def test_others_who_call_the_transformer_during_a_run_find_it_as_it_was(student, linear):
    pipe = tiny_flux_pipeline()
    if linear:
        linfusion.linearize(pipe, "clear", weights=student, **({"ntk": 10.0} | WINDOW))
    highres = HighResPipeline(pipe, clear=True if linear else {"weights": student})
    alone, inputs = draw(pipe, highres), flux_inputs()

    def call():
        return forward(pipe.transformer, inputs)

    before, said = everything(pipe.transformer), call()
    calls = []

    def callback(runs, i, t, given):
        assert runs.transformer is not pipe.transformer
        with ThreadPoolExecutor(1) as other:
            calls.append(torch.equal(other.submit(call).result(), said))
        return {}

    assert torch.equal(draw(pipe, highres, callback_on_step_end=callback), alone)
    assert len(calls) > 4 and all(calls) and same(everything(pipe.transformer), before)


@pytest.mark.parametrize("how", ["offloaded", "hooked"])
def test_windows_and_weights_of_a_run_where_hooks_are_on_the_transformer(student, how):
    highres = HighResPipeline(pipe := tiny_flux_pipeline(), clear={"weights": student})
    want = draw(pipe, highres)
    if how == "offloaded":
        cpu_offload(pipe.transformer, torch.device("cpu"))
        assert any(p.is_meta for p in pipe.transformer.parameters())
    else:
        HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for _ in range(2):
        assert torch.equal(draw(pipe, highres), want)
        assert record_of(pipe.transformer) is None


def test_a_linearized_pipeline_keeps_its_own_windows_for_the_later_stages():
    expected = draw(tiny_flux_pipeline())
    pipe = linfusion.linearize(tiny_flux_pipeline(), "clear", **WINDOW, ntk=10.0)
    assert torch.equal(draw(pipe, HighResPipeline(pipe)), expected)
    assert linfusion.summary(pipe).layers
    with pytest.raises(ValueError, match=r"clear: got .* linearized already"):
        HighResPipeline(pipe, clear=WINDOW)


def test_without_windows_every_stage_is_as_the_pipeline_is():
    pipe = tiny_flux_pipeline()
    whole = draw(pipe, HighResPipeline(pipe, clear=False))
    # A window that sees everything is full attention, but for the table that is stretched.
    wide = {"radius": 99, "ntk": 1.0, "proportional": False}
    assert (draw(pipe, HighResPipeline(pipe, clear=wide)) - whole).abs().max() < 1.5 * LEVEL
    assert (draw(pipe) - whole).abs().max() > 2 * LEVEL


def test_pooled_windows_ask_for_sizes_they_divide():
    pipe = tiny_flux_pipeline()
    highres = HighResPipeline(pipe, clear={"radius": 2.5, "down_factor": 2})
    assert draw(pipe, highres).shape == (3, 48, 64)
    with pytest.raises(ValueError, match=r"height: got 52; .* multiples of 8 pixels.* 48 and 56"):
        draw(pipe, highres, size=(52, 64))
    linfusion.linearize(pipe, "clear", radius=2.5)  # nothing was left behind


# ---- schedule


@pytest.mark.parametrize("shift", [None, 3.0, 10.0])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("host", HOSTS)
def test_the_shift_reaches_the_later_stages_alone(host, dynamic, shift):
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=1.5)
    pipe = HOSTS[host](scheduler=own)
    seen = []

    def callback(runs, i, t, given):
        seen.append(float(t))
        return {}

    draw(pipe, shift=shift, callback_on_step_end=callback)
    alone = []
    pipe(
        "a", height=24, width=32, num_inference_steps=4, max_sequence_length=TEXT,
        output_type="latent", callback_on_step_end=lambda p, i, t, k: alone.append(float(t)) or k,
    )  # fmt: skip
    assert seen[:4] == alone
    expected = FlowMatchEulerDiscreteScheduler(shift=shift or 3.0)
    own_levels = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if host == "flux" else {}
    expected.set_timesteps(4, **own_levels)
    assert seen[4:] == pytest.approx(expected.timesteps[1:].tolist(), rel=1e-5)


def test_a_scheduler_without_a_shift_keeps_its_own_schedule():
    pipe = tiny_flux_pipeline()
    del_shift = {k: v for k, v in pipe.scheduler.config.items() if k != "shift"}
    pipe.scheduler._internal_dict = type(pipe.scheduler.config)(del_shift)
    with pytest.raises(ValueError, match=r"shift: got 2, but FlowMatchEuler.* has none"):
        draw(pipe, shift=2)


# ---- low-resolution guidance


def sides(host, size=(48, 64), steps=4):
    """A pipeline whose scheduler stands at the first of `steps`, and a stage of that size."""
    pipe = HOSTS[host]()
    pipe.scheduler.set_timesteps(steps)
    pipe.scheduler.set_begin_index(0)
    pipe._num_timesteps = steps
    return pipe, Stage(*size, 0.7, steps, 7.5, pull=1.0, enlarged=2.0)


@pytest.mark.parametrize("host", HOSTS)
def test_at_the_first_step_low_frequencies_are_those_of_the_picture_before(host):
    pipe, stage = sides(host)
    x, v, guide = torch.randn(3, 1, 4, 24, 32, generator=seeded()).unbind(0)
    sigma = float(pipe.scheduler.sigmas[0])
    tokens = (lambda t: pipe._pack_latents(t, *t.shape)) if host == "flux" else (lambda t: t)
    projection = Projection(pipe, stage, guide)
    (held,) = projection.follow(lambda hidden_states: (tokens(v),), hidden_states=tokens(x))
    clean = x - sigma * unpacked(pipe, held, 48, 64)
    torch.testing.assert_close(low_frequencies(clean, 2), low_frequencies(guide, 2))
    own = x - sigma * v
    high = own - low_frequencies(own, 2)
    torch.testing.assert_close(clean - low_frequencies(clean, 2), high)


def test_the_pull_falls_with_the_steps_as_a_cosine():
    pipe, stage = sides("sd3")
    x, v, guide = torch.randn(3, 1, 4, 24, 32, generator=seeded()).unbind(0)
    projection = Projection(pipe, stage, guide)
    left = []
    for step in range(4):
        pipe.scheduler._step_index = step
        sigma = float(pipe.scheduler.sigmas[step])
        (held,) = projection.follow(lambda _: (v,), x)
        moved = low_frequencies(held - v, 2) * -sigma
        full = low_frequencies(guide - (x - sigma * v), 2)
        left.append(float((moved * full).sum() / full.square().sum()))
    assert left == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-4)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([2, 4]))
def test_low_frequencies_of_low_frequencies_are_themselves(height, width, block):
    x = torch.randn(1, 2, height, width, generator=seeded(), dtype=torch.float32)
    low = low_frequencies(x, block)
    torch.testing.assert_close(low_frequencies(low, block), low)
    torch.testing.assert_close(low[..., :block, :block].mean(), x[..., :block, :block].mean())


@pytest.mark.parametrize("host", HOSTS)
def test_no_pull_changes_no_bit_and_a_full_one_does(host):
    pipe = HOSTS[host]()
    off = draw(pipe, low_resolution_guidance=0)
    assert torch.equal(draw(pipe), off)
    assert (draw(pipe, low_resolution_guidance=1.0) - off).abs().max() > 5 * LEVEL


def test_low_resolution_guidance_is_on_above_4096_pixels_alone():
    highres = HighResPipeline(tiny_flux_pipeline())
    call = {**highres.__call__.__kwdefaults__, "prompt": "a", "base_size": 1024, "size": (64, 8192)}
    stages = highres._job(call).stages
    assert [(s.width, s.pull) for s in stages] == [(1024, 0), (2048, 0), (4096, 0), (8192, 1)]


# ---- calls


def test_flux_reads_a_negative_prompt_with_true_guidance():
    pipe = tiny_flux_pipeline()
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = draw(pipe)
    once = len(calls)
    guided = draw(pipe, negative_prompt="a pear", true_cfg_scale=4.0)
    assert len(calls) == 3 * once
    assert (guided - plain).abs().max() > 5 * LEVEL


def test_guidance_may_differ_by_stage():
    pipe = tiny_flux_pipeline()
    assert torch.equal(draw(pipe, guidance_scale=[3.5, 7.5]), draw(pipe))
    assert not torch.equal(draw(pipe, guidance_scale=3.5), draw(pipe))


@pytest.mark.parametrize("host", HOSTS)
def test_a_picture_is_enlarged_by_both_strategies(host):
    pipe = HOSTS[host]()
    picture = tiny_image(size=32)
    one, other = (
        draw(pipe, image=picture, size=64, strategy=strategy, base_size=None)
        for strategy in ("sdedit", "superres")
    )
    assert one.shape == (3, 64, 64) and torch.equal(one, other)
    another = draw(pipe, image=tiny_image(9, 32), size=64, strategy="superres", base_size=None)
    assert not torch.equal(another, one)


@pytest.mark.parametrize("control", ["picture", "previous"])
def test_a_controlnet_of_flux_looks_at_every_stage(control):
    pipe = tiny_flux_pipeline(FluxControlNetPipeline, controlnet=tiny_flux_controlnet())
    given = {"control_image": tiny_image(2, 48) if control == "picture" else control}
    ours = draw(pipe, **given)
    off = draw(pipe, control_image=tiny_image(2, 48), controlnet_conditioning_scale=0.0)
    assert ours.shape == (3, 48, 64) and (ours - off).abs().max() > LEVEL


def test_a_controlnet_of_flux_is_refused_a_budget():
    pipe = tiny_flux_pipeline(FluxControlNetPipeline, controlnet=tiny_flux_controlnet())
    with pytest.raises(ValueError, match="memory_budget: FluxControlNetPipeline encodes"):
        HighResPipeline(pipe, memory_budget="1GB")


@pytest.mark.parametrize("host", HOSTS)
def test_a_run_goes_on_where_it_was_killed_bit_for_bit(host, tmp_path):
    given = {"low_resolution_guidance": 1.0, "size": (48, 64)}
    whole = draw(HOSTS[host](), **given)
    for stop in (2, 6):
        steps = []

        def callback(runs, i, t, kept, steps=steps, stop=stop):
            steps.append(i)
            return {} if len(steps) < stop else 1 / 0

        with pytest.raises(ZeroDivisionError):
            draw(HOSTS[host](), **given, state=tmp_path / str(stop), callback_on_step_end=callback)
        done = draw(HOSTS[host](), **given, state=tmp_path / str(stop), resume=True)
        assert torch.equal(done, whole)


def test_another_window_or_shift_is_another_run(tmp_path):
    pipe = tiny_flux_pipeline()
    draw(pipe, state=tmp_path / "run")
    for changes, named in (({"shift": 4.0}, "shift"), ({"low_resolution_guidance": 1.0}, "stages")):
        with pytest.raises(ValueError, match=rf"other parameters: .*{named} \("):
            draw(pipe, state=tmp_path / "run", resume=True, **changes)
    with pytest.raises(ValueError, match=r"other parameters: .*attention \("):
        draw(pipe, HighResPipeline(pipe, clear={"radius": 3}), state=tmp_path / "run", resume=True)


# ---- memory


@pytest.mark.parametrize("host", HOSTS)
def test_a_budget_does_not_change_the_picture(host):
    pipe = HOSTS[host]()
    bounded = HighResPipeline(pipe, clear=WINDOW, memory_budget="60MB")
    assert (draw(pipe, bounded) - draw(pipe)).abs().max() <= 1.5 * LEVEL


@pytest.mark.parametrize("host", HOSTS)
def test_a_plan_names_every_piece_and_the_least_budget_does(host):
    pipe = HOSTS[host]()
    call = {"prompt": "a", "size": 64, "base_size": 32, "max_sequence_length": TEXT}
    plan = HighResPipeline(pipe, clear=WINDOW).plan(**call, measure=False)
    assert [(w.what, w.width, w.strength, w.steps) for w in plan.work] == [
        ("denoise", 32, None, 20),
        ("decode", 32, None, 1),
        ("encode", 64, None, 1),
        ("denoise", 64, 0.7, 14),
        ("decode", 64, None, 1),
    ]
    with pytest.raises(ValueError, match="memory_budget: got '1MB'") as error:
        HighResPipeline(pipe, clear=WINDOW, memory_budget="1MB").plan(**call, measure=False)
    least = int(re.search(r"at least (\d+)MB", str(error.value))[1])
    HighResPipeline(pipe, clear=WINDOW, memory_budget=f"{least}MB").plan(**call, measure=False)
    assert record_of(pipe.transformer) is None


def test_weights_that_a_student_replaces_are_counted(student):
    pipe = tiny_flux_pipeline()
    call = {"prompt": "a", "size": 64, "base_size": 32, "measure": False}
    plain = HighResPipeline(pipe, clear=WINDOW).plan(**call).weights_bytes
    names = ("to_q", "to_k", "to_v", "to_out")
    own = {
        p.data_ptr(): p.nbytes
        for module in pipe.transformer.modules()
        if hasattr(module, "to_q")
        for name, p in module.named_parameters()
        if name.startswith(names)
    }
    with_student = HighResPipeline(pipe, clear={"weights": student}).plan(**call).weights_bytes
    assert with_student - plain == sum(own.values())


def test_true_guidance_is_counted_as_two_forwards():
    highres = HighResPipeline(tiny_flux_pipeline(), clear=WINDOW)
    call = {"prompt": "a", "size": 64, "base_size": 32, "measure": False}
    once = highres.plan(**call).work[0].flops
    assert highres.plan(**call, negative_prompt="b", true_cfg_scale=2.0).work[0].flops == 2 * once


def test_a_forecast_encodes_the_prompt_once_a_pipeline():
    pipe = tiny_flux_pipeline()
    calls = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="memory_budget"):  # after many dry runs
        HighResPipeline(pipe, clear=WINDOW, memory_budget="1MB").plan("a", size=64, measure=False)
    assert len(calls) == 2
    assert "encode_prompt" not in pipe.__dict__


def test_a_plan_of_flux_estimates_time():
    plan = HighResPipeline(tiny_flux_pipeline(), clear=WINDOW).plan("a", size=64, base_size=32)
    assert plan.seconds > 0


# ---- refusals


@pytest.mark.parametrize(
    "host, changes, message",
    [
        ("flux", {"size": 50}, "height: got 50; accepted are multiples of 4 pixels; the nearest"),
        ("sd3", {"size": (48, 50)}, "width: got 50; accepted are multiples of 4 pixels; the near"),
        ("sd3", {"size": 96}, "size: got 96×96; SD3Transformer2DModel knows positions of 16 tok"),
        ("flux", {"strategy": "guided"}, "strategy: 'guided' dilates convolutions"),
        ("flux", {"negative_prompt": "b"}, "negative_prompt: got 'b', which FluxPipeline would"),
        ("flux", {"shift": 0}, "shift: got 0; accepted are numbers above 0"),
        ("flux", {"low_resolution_guidance": 2}, "low_resolution_guidance: got 2; accepted are"),
        ("flux", {"guidance_scale": [1, 2, 3]}, "guidance_scale: got 3 for 2 stages"),
        ("flux", {"guidance_scale": "high"}, "guidance_scale: got 'h"),
        ("flux", {"strengths": 0}, "strengths: got 0"),
        ("flux", {"eta": 1}, "eta: FluxPipeline takes no such argument"),
        ("sd3", {"control_image": tiny_image()}, "control_image: StableDiffusion3Pipeline has no"),
    ],
)
def test_a_wrong_call_is_refused_before_any_work(host, changes, message):
    pipe = HOSTS[host]()
    pipe.transformer.forward = None  # whoever calls it fails
    with pytest.raises(ValueError, match=re.escape(message)):
        draw(pipe, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shift": 3.0}, "shift: got 3.0, but StableDiffusionPipeline has none"),
        ({"low_resolution_guidance": 1.0}, "low_resolution_guidance: got 1.0; StableDiffusionPi"),
    ],
)
def test_what_only_flows_have_is_refused_to_a_unet(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HighResPipeline(tiny_sd_pipeline())("a", size=64, **changes)


@pytest.mark.parametrize("clear", [False, {"radius": 8}])
def test_windows_are_refused_to_a_unet(clear):
    with pytest.raises(ValueError, match=r"clear: got .* has a UNet"):
        HighResPipeline(tiny_sd_pipeline(), clear=clear)


@pytest.mark.parametrize("clear", [8, {"size": 3}])
def test_no_such_window_is_refused(clear):
    with pytest.raises(ValueError, match=r"clear: got 8|size: "):
        draw(None, HighResPipeline(tiny_flux_pipeline(), clear=clear))


def test_kontext_is_refused():
    with pytest.raises(ValueError, match="FluxKontextPipeline is image-to-image"):
        HighResPipeline(tiny_flux_pipeline(FluxKontextPipeline))


def test_a_flux_without_a_guidance_embedding_takes_true_guidance_alone():
    pipe = tiny_flux_pipeline(transformer=tiny_flux(guidance_embeds=False))
    with pytest.raises(ValueError, match=r"guidance_scale: got 2.0, which .* true_cfg_scale"):
        draw(pipe, guidance_scale=2.0)
    assert draw(pipe, true_cfg_scale=2.0, negative_prompt="").shape == (3, 48, 64)


def test_a_student_keeps_the_radius_it_was_trained_with(student):
    pipe = tiny_flux_pipeline()
    with with_windows(pipe, pipe, {"weights": student}) as (drawing, _):
        (window,) = {tuple(s.items()) for s in record_of(drawing.transformer).settings.values()}
    assert dict(window) | {"radius": 2.5, "ntk": 10.0, "proportional": True} == dict(window)


def test_a_lora_of_flux_draws_in_every_stage(student):
    highres = HighResPipeline(pipe := tiny_flux_pipeline(), clear={"weights": student})
    without = draw(pipe, highres)
    torch.manual_seed(9)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.transformer.add_adapter(lora)
    weights_before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    assert (draw(pipe, highres) - without).abs().max() > 5 * LEVEL
    assert all(torch.equal(v, weights_before[k]) for k, v in pipe.transformer.state_dict().items())
