"""Sampling DiT with the variance it has learned: against diffusers' pipeline and by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from diffusers import DiTPipeline as StockDiTPipeline

import linfusion
from linfusion.lit.authors_checkpoints import use_official_timesteps
from linfusion.pipelines import DiTPipeline
from tests.tiny import tiny_vae
from tests.tiny_dit import tiny_dit

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

NAMES = {0: "face", 1: "heart", 2: "food, meal", 3: "sky", 4: "sign"}


def learned_range(**changes):
    return DDPMScheduler(variance_type="learned_range", clip_sample=False, **changes)


def pipeline(scheduler=None, **changes):
    pipe = DiTPipeline(tiny_dit(**changes), tiny_vae(), scheduler or learned_range(), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, labels=(1, 4), seed=0, **options):
    options = {"num_inference_steps": 3, "output_type": "latent", **options}
    return pipe(labels, generator=torch.Generator().manual_seed(seed), **options).images


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_without_variance_it_is_diffusers_pipeline(kind, guidance):
    # diffusers' own has 1000 as the class of none.
    transformer = tiny_dit(num_embeds_ada_norm=1000)
    ours = DiTPipeline(transformer, tiny_vae(), kind())
    stock = StockDiTPipeline(transformer, tiny_vae(), kind())
    images = [
        p([1, 4], guidance, torch.Generator().manual_seed(0), 4, "np").images
        if p is stock
        else run(p, guidance_scale=guidance, num_inference_steps=4, output_type="np")
        for p in (ours, stock)
    ]
    assert abs(images[0] - images[1]).max() < 1e-5


def by_hand(pipe, labels, steps, guidance, channels, seed=0):
    """DDPM with learned variance after Nichol & Dhariwal, on the noise of the same generator."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 4, 8, 8, generator=g)
    abar = pipe.scheduler.alphas_cumprod.double()
    times = [t * (1000 // steps) for t in range(steps)][::-1]
    for t, before in zip(times, [*times[1:], None], strict=True):
        null = torch.full((len(labels),), 5)
        with torch.no_grad():
            both = [
                pipe.transformer(x, torch.full((len(labels),), t), y).sample.double()
                for y in (torch.tensor(labels), null)
            ]
        eps, raw = both[0].chunk(2, 1)
        other = both[1].chunk(2, 1)[0]
        guided = other + guidance * (eps - other)
        eps = torch.cat([guided[:, :channels], eps[:, channels:]], 1)
        prior = abar[before] if before is not None else torch.tensor(1.0).double()
        alpha = abar[t] / prior
        mean = (x - (1 - alpha) / (1 - abar[t]).sqrt() * eps) / alpha.sqrt()
        x = mean
        if before is not None:
            low, high = ((1 - prior) / (1 - abar[t]) * (1 - alpha)).log(), (1 - alpha).log()
            fraction = (raw + 1) / 2
            sigma = (0.5 * (fraction * high + (1 - fraction) * low)).exp()
            x = x + sigma * torch.randn(x.shape, generator=g)
        x = x.float()
    return x


@pytest.mark.parametrize("guidance, channels", [(1.0, 4), (2.5, 4), (2.5, 3)])
def test_with_variance_it_is_the_papers_formula(guidance, channels):
    pipe = pipeline()
    found = run(pipe, guidance_scale=guidance, cfg_channels=channels, num_inference_steps=5)
    torch.testing.assert_close(
        found, by_hand(pipe, [1, 4], 5, guidance, channels), atol=2e-4, rtol=1e-4
    )


def test_the_variance_half_is_not_thrown_away():
    pipe, stock = pipeline(), pipeline(DDPMScheduler(clip_sample=False))
    with torch.no_grad():
        pipe.transformer.proj_out_2.bias += 1
        stock.transformer.proj_out_2.bias += 1
    assert (run(pipe) - run(stock)).abs().max() > 1e-2


def test_the_papers_250_steps_are_evenly_spaced_from_first_to_last():
    pipe = pipeline(learned_range(timestep_spacing="linspace"), num_layers=1)
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda m, args: seen.append(int(args[1][0])))
    run(pipe, labels=0, guidance_scale=1.0, num_inference_steps=250)
    assert len(seen) == 250 and seen[0] == 999 and seen[-1] == 0


def test_the_fourth_channel_is_unguided_with_three_cfg_channels():
    pipe = pipeline(DDIMScheduler())
    one, three, four = (
        run(pipe, num_inference_steps=1, guidance_scale=s, cfg_channels=c)
        for s, c in ((1.0, None), (4.0, 3), (4.0, 4))
    )
    torch.testing.assert_close(three[:, 3], one[:, 3])
    torch.testing.assert_close(three[:, :3], four[:, :3])
    assert not torch.allclose(three[:, 3], four[:, 3], atol=1e-3)


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_solver_from_the_config_of_ddpm_gets_the_noise_alone(kind):
    # diffusers' solvers would cut the latents off at three channels.
    pipe = pipeline()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    fresh = pipeline(kind())
    assert torch.equal(run(pipe), run(fresh))


def test_names_stand_for_their_classes():
    pipe = pipeline()
    assert torch.equal(run(pipe, ["heart", "sign"]), run(pipe, [1, 4]))
    assert torch.equal(run(pipe, "meal"), run(pipe, 2))


def test_each_picture_may_have_its_own_generator():
    pipe = pipeline()

    def of(labels, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(
            labels, num_inference_steps=2, generator=generators, output_type="latent"
        ).images

    both, second = of([1, 4], [3, 5]), of([4], [5])
    torch.testing.assert_close(both[1:], second, atol=1e-5, rtol=1e-5)


def test_another_square_is_made_of_its_size():
    assert pipeline()(1, height=128, num_inference_steps=1).images[0].size == (128, 128)


def test_the_callback_sees_and_changes_every_step():
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append(i)
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    latents = run(pipeline(), callback_on_step_end=callback)
    assert seen == [0, 1, 2] and not latents.any()


def test_it_is_saved_and_loaded_with_its_names_and_by_diffusers(tmp_path):
    pipe = pipeline()
    use_official_timesteps(pipe.transformer)
    expected = run(pipe, "heart")
    pipe.save_pretrained(tmp_path)
    again = DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, "heart"), expected)
    assert StockDiTPipeline.from_pretrained(tmp_path).labels == pipe.labels


def test_diffusers_pipeline_is_taken_over_with_its_names():
    stock = StockDiTPipeline(tiny_dit(), tiny_vae(), learned_range(), NAMES)
    pipe = DiTPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == stock.labels
    assert torch.equal(run(pipe, "heart"), run(pipeline(), 1))


def test_it_samples_from_a_linear_student():
    pipe = pipeline()
    softmax = run(pipe)
    linfusion.linearize(pipe, "lit", heads=2)
    assert not torch.equal(run(pipe), softmax)
    linfusion.restore(pipe)
    assert torch.equal(run(pipe), softmax)


@pytest.mark.parametrize(
    "labels, options, message",
    [
        (5, {}, "class_labels: got 5, expected a number from 0 to 4 or a name"),
        ([0, -1], {}, "class_labels: got -1"),
        (True, {}, "class_labels: got True"),
        ("dog", {}, "class_labels: there is no class 'dog'; there are face, heart"),
        ([], {}, "class_labels: got none"),
        (0, {"height": 64, "width": 128}, "height, width: got 64 by 128; .* squares alone"),
        (0, {"height": 60}, "height: got 60, expected a positive multiple of 16"),
        (0, {"cfg_channels": 2}, "cfg_channels: got 2, expected 3, 4 or None"),
        (0, {"guidance_scale": 0.5}, "guidance_scale: got 0.5"),
        (0, {"num_inference_steps": 0}, "num_inference_steps: got 0"),
        (0, {"output_type": "jpeg"}, "output_type: got 'jpeg'"),
        (0, {"latents": torch.zeros(1, 4, 4, 4)}, r"latents: got \(1, 4, 4, 4\)"),
        (0, {"generator": [torch.Generator()] * 2}, "generator: got 2, expected one"),
        (0, {"callback_on_step_end_tensor_inputs": ["eps"]}, "callback_on_.*: got 'eps'"),
    ],
)
def test_bad_input_is_refused_before_any_work(labels, options, message):
    pipe = pipeline()
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        pipe(labels, **{"num_inference_steps": 1, **options})


def test_a_learned_variance_needs_a_model_that_has_one():
    with pytest.raises(ValueError, match="scheduler: variance_type is 'learned_range', but"):
        run(pipeline(out_channels=4))
