"""ByTheWay on a real motion UNet: what it does to the maps, when, and that no trace is left."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    MotionAdapter,
    UNetMotionModel,
)

from linfusion.pipelines.bytheway import bytheway, energy, enhanced
from tests.tiny import (
    TEXT_WIDTH,
    tiny_image,
    tiny_motion_unet,
    tiny_sd_components,
    tiny_sd_pipeline,
)

FRAMES = 4
OFF = {"alpha": 0.0, "beta": 0.0, "tau": 1}  # β_c = 1: the identity
ON = {"alpha": 0.6, "beta": 1.5, "tau": 1}


def pipeline() -> AnimateDiffPipeline:
    """Three levels, so that maps of up_blocks.1 are interpolated for up_blocks.2."""
    torch.manual_seed(0)
    unet = UNetMotionModel(
        block_out_channels=(16, 16, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=4,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    components = tiny_sd_components()
    for name in ("safety_checker", "image_encoder", "feature_extractor"):
        components.pop(name)
    pipe = AnimateDiffPipeline(
        **{**components, "unet": unet.eval()},
        motion_adapter=MotionAdapter(block_out_channels=(8,), motion_norm_num_groups=4),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def run(pipe, steps=5, prompt="a red apple", **options):
    options = {"output_type": "latent", "num_frames": FRAMES, **options}
    g = torch.Generator().manual_seed(0)
    return pipe(
        prompt,
        height=64,
        width=64,
        num_inference_steps=steps,
        generator=g,
        **options,
    ).frames


def maps(b=2, p=6, h=3, f=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(b, p, h, f, f, generator=g, dtype=torch.float64)).softmax(-1)


# The maps


def test_energy_of_known_maps():
    even, sure = torch.full((1, 3, 2, 8, 8), 1 / 8), torch.eye(8).expand(1, 3, 2, 8, 8)
    assert energy(torch.cat([even, sure])).tolist() == pytest.approx([1 / 8, 1])


@pytest.mark.parametrize("frames, tau", [(16, 7), (16, 3), (15, 7), (4, 0), (2, 0)])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_what_was_lost_to_guidance_is_what_beta_c_gives_back(frames, tau, alpha):
    a, first = maps(f=frames), maps(f=frames, seed=1)
    out = enhanced(a, first, alpha=alpha, beta=0.0, tau=tau, guided=False)
    drawn = a + alpha * (first - a)
    assert (energy(drawn) < energy(a)).all() or not alpha
    # What the low band has gained on its own is not taken back: here it never has.
    torch.testing.assert_close(energy(out), energy(a), atol=1e-12, rtol=0)


@pytest.mark.parametrize("frames, tau", [(16, 7), (16, 2), (15, 7), (9, 3)])
def test_a_factor_raises_the_energy_of_the_high_band_by_its_square(frames, tau):
    a = maps(f=frames)
    e = [
        energy(enhanced(a, a, alpha=0, beta=beta, tau=tau, guided=False)) for beta in (1.0, 1.5, 3)
    ]
    high = (e[1] - e[0]) / (1.5**2 - 1)
    assert (high > 0).all() and (high < e[0]).all()
    torch.testing.assert_close(e[2] - e[0], (3**2 - 1) * high, atol=1e-12, rtol=0)


def test_all_but_the_mean_is_high_for_the_published_setting():
    a = maps(f=16)
    expected = 1 / 16 + 1.5 * (a - 1 / 16)
    out = enhanced(a, a, alpha=0, beta=1.5, tau=7, guided=False)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("frames, tau", [(16, 7), (15, 7), (8, 1)])
def test_rows_keep_their_sum(frames, tau):
    out = enhanced(maps(f=frames), maps(f=frames, seed=1), alpha=0.6, beta=4, tau=tau, guided=True)
    torch.testing.assert_close(out.sum(-1), torch.ones_like(out[..., 0]))


def test_only_the_conditional_half_decides():
    a, first = maps(b=4), maps(b=4, seed=1)
    other = torch.cat([maps(b=2, seed=2), a[2:]])
    settings = {"alpha": 0.6, "beta": 0.0, "tau": 3}
    one, two = (enhanced(x, first, **settings, guided=True) for x in (a, other))
    assert torch.equal(one[2:], two[2:])
    half = enhanced(a[2:], first[2:], **settings, guided=False)
    torch.testing.assert_close(one[2:], half, atol=1e-12, rtol=0)
    # the factor of the conditional half, not its own
    own = enhanced(a[:2], first[:2], **settings, guided=False)
    assert (one[:2] - own).abs().max() > 1e-4


def test_videos_of_a_batch_do_not_see_each_other():
    a, first = maps(b=6), maps(b=6, seed=1)
    settings = {"alpha": 0.6, "beta": 0.0, "tau": 3, "guided": True}
    whole = enhanced(a, first, **settings)
    for video in range(3):
        alone = enhanced(a[video::3], first[video::3], **settings)
        torch.testing.assert_close(whole[video::3], alone, atol=1e-12, rtol=0)


def test_a_map_without_high_band_stays_as_it_is():
    even = torch.full((1, 2, 2, 8, 8), 1 / 8, dtype=torch.float64)
    out = enhanced(even, even, alpha=0.5, beta=1.5, tau=3, guided=False)
    torch.testing.assert_close(out, even)


def test_a_low_band_that_gained_leaves_no_nan():
    """E(A) < E_low(A'): the square root would be of a negative number."""
    rows = 2 * torch.arange(8) / 8 * torch.pi
    slow = ((1 + rows.cos()) / 8).expand(1, 1, 1, 8, 8).double()
    quick = torch.full((1, 1, 1, 8, 8), 1 / 8).double()
    quick[..., ::2] += 0.01
    quick[..., 1::2] -= 0.01
    out = enhanced(quick, slow, alpha=0.9, beta=1.5, tau=1, guided=False)
    assert out.isfinite().all() and energy(out) > energy(quick)


@pytest.mark.parametrize("frames, tau", [(16, 8), (15, 8), (4, 7)])
def test_a_band_that_reaches_the_mean_is_refused(frames, tau):
    with pytest.raises(
        ValueError, match=rf"^tau: got {tau} for {frames} frames, accepted is below"
    ):
        enhanced(maps(f=frames), maps(f=frames), alpha=0, beta=1, tau=tau, guided=False)


# The model


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_without_guidance_and_factor_it_is_plain_attention(pipe, guidance):
    plain = run(pipe, guidance_scale=guidance)
    with bytheway(pipe, share=1.0, **OFF):
        found = run(pipe, guidance_scale=guidance)
    # with the settings ON: 0.3
    torch.testing.assert_close(found, plain, atol=5e-4, rtol=0)


@pytest.mark.parametrize("setting", [{"alpha": 0.6, "beta": 0.0, "tau": 0}, ON])
def test_guidance_and_factor_take_effect(pipe, setting):
    plain = run(pipe)
    with bytheway(pipe, share=1.0, **setting):
        assert (run(pipe) - plain).abs().max() > 0.05


def test_afterwards_the_bits_are_those_of_before(pipe):
    plain, processors = run(pipe), dict(pipe.unet.attn_processors)
    with bytheway(pipe, **ON):
        run(pipe)
    assert torch.equal(run(pipe), plain)
    assert all(pipe.unet.attn_processors[path] is p for path, p in processors.items())
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_after_an_exception_too(pipe):
    plain = run(pipe)

    def stop(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), bytheway(pipe, **ON):
        run(pipe, callback_on_step_end=stop)
    assert torch.equal(run(pipe), plain)
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


@pytest.fixture
def active_steps(monkeypatch):
    """A callback for the pipeline, and the numbers of the steps in which maps were changed."""
    found, step = set(), [0]

    def counted(*args, **kwargs):
        found.add(step[0])
        return enhanced(*args, **kwargs)

    def count(pipe, i, t, kwargs):
        step[0] = i + 1
        return {}

    monkeypatch.setattr("linfusion.pipelines.bytheway.enhanced", counted)
    return count, found


@pytest.mark.parametrize("steps, share, first", [(5, 0.2, 1), (5, 0.5, 3), (4, 0.2, 1), (5, 0, 0)])
def test_it_works_in_the_first_steps_alone(pipe, active_steps, steps, share, first):
    count, found = active_steps
    with bytheway(pipe, share=share, **ON):
        run(pipe, steps, callback_on_step_end=count)
    assert found == set(range(first))


def test_the_first_steps_are_those_of_the_run_where_it_begins_in_the_middle(pipe, active_steps):
    count, found = active_steps
    other = AnimateDiffVideoToVideoPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    with bytheway(other, share=0.4, **ON):
        other(
            [tiny_image()] * FRAMES,
            prompt="a red apple",
            num_inference_steps=10,
            height=64,
            width=64,
            strength=0.5,
            output_type="latent",
            callback_on_step_end=count,
        )
    assert found == {0, 1}  # of 5


def test_past_the_first_steps_the_bits_are_the_plain_ones(pipe):
    plain = run(pipe)
    with bytheway(pipe, share=0.0, **ON):
        assert torch.equal(run(pipe), plain)


def test_the_layers_are_those_of_the_decoder_but_its_first_level(pipe):
    before = dict(pipe.unet.attn_processors)
    with bytheway(pipe, **ON):
        taken = {
            p for p, processor in pipe.unet.attn_processors.items() if processor is not before[p]
        }
    expected = {
        path for path in before if path.startswith(("up_blocks.1.motion", "up_blocks.2.motion"))
    }
    assert taken == expected and len(taken) == 8  # 2 levels, 2 modules, 2 layers


def test_several_videos_are_what_they_are_alone(pipe):
    latents = torch.randn(2, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(3))
    with bytheway(pipe, share=1.0, **ON):
        both = run(pipe, prompt=["a red apple"] * 2, latents=latents)
        alone = [run(pipe, latents=part) for part in latents.split(1)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)


# Refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"beta": -1},
        {"beta": float("nan")},
        {"tau": -1},
        {"share": 2},
        {"share": True},
        {"alpha": "0.6"},
    ],
)
def test_an_argument_out_of_range_is_refused(pipe, wrong):
    with (
        pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got .*accepted is 0 to"),
        bytheway(pipe, **wrong),
    ):
        pass


def test_too_few_frames_are_refused_and_leave_no_trace(pipe):
    plain = run(pipe)
    with pytest.raises(ValueError, match=r"^tau: got 7 for 4 frames"), bytheway(pipe):
        run(pipe)
    assert torch.equal(run(pipe), plain)


def test_a_model_without_frames_is_refused():
    with pytest.raises(ValueError, match="UNet2DConditionModel, accepted is a UNetMotionModel"):
        bytheway(tiny_sd_pipeline()).__enter__()


def test_a_layer_with_a_processor_of_its_own_is_refused(pipe):
    with (
        bytheway(pipe, **ON),
        pytest.raises(
            ValueError, match=r"^pipe: a temporal layer of up_blocks\.1 has a _Processor"
        ),
    ):
        bytheway(pipe, **ON).__enter__()


def test_free_noise_is_refused():
    pipe = pipeline()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    with pytest.raises(ValueError, match=r"^pipe: .*FreeNoiseTransformerBlock"):
        bytheway(pipe).__enter__()


def test_two_levels_do(pipe):
    components = dict(pipe.components, unet=tiny_motion_unet())
    small = AnimateDiffPipeline(**components)
    small.set_progress_bar_config(disable=True)
    plain = run(small)
    with bytheway(small, share=1.0, **ON):
        assert (run(small) - plain).abs().max() > 1e-4
    assert torch.equal(run(small), plain)
