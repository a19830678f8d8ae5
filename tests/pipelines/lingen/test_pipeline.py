"""LinGenPipeline: a call, the same as a stream, and what both refuse."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback

from linfusion import LinGenPipeline, LinGenTransformer3DModel
from linfusion.models.stream import split_blocks
from linfusion.pipelines.lingen.denoise import block_seed
from tests.tiny import TEXT_WIDTH, tiny_image, tiny_text_encoder, tiny_tokenizer
from tests.tiny_joint import tiny_t5, tiny_t5_tokenizer
from tests.tiny_video import (
    CHANNELS,
    tiny_cogvideox,
    tiny_image_vae,
    tiny_lingen,
    tiny_transformer,
    tiny_wan,
)

PROMPT = "a waving hand"
VAES = [tiny_image_vae, tiny_wan, tiny_cogvideox]
CALL = {"num_frames": 9, "num_inference_steps": 2}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def call(pipe, prompt=PROMPT, **options):
    options = {**CALL, "generator": seeded(), **options}
    return pipe(prompt, **options).frames


def stream(pipe, prompt=PROMPT, **options):
    options = {**CALL, "generator": seeded(), **options}
    return list(pipe.stream(prompt, **options))


def as_bytes(frames):
    return np.round(frames * 255).astype(np.uint8)


def embeds(count=1, length=5, width=TEXT_WIDTH, seed=0):
    return torch.randn(count, length, width, generator=seeded(seed))


# What is drawn


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("causal", [True, False])
def test_a_stream_gives_the_bits_of_a_call(make, causal):
    pipe = tiny_lingen(causal, make)
    frames = np.concatenate(stream(pipe))
    assert frames.dtype == np.uint8 and len(frames) == 9
    assert frames.std() > 10
    assert np.array_equal(frames, as_bytes(call(pipe)[0]))


def test_frames_come_with_every_block():
    assert [len(part) for part in stream(tiny_lingen(), num_frames=11)] == [5, 3, 3]
    assert [len(part) for part in stream(tiny_lingen(True, tiny_wan), num_frames=25)] == [13, 12]


@torch.no_grad()
def test_blocks_are_those_of_the_block_causal_model_at_once():
    """One forward over the clean past and the noisy block, with a level of noise a frame."""
    pipe = tiny_lingen()
    x = call(pipe, num_frames=10, num_inference_steps=3, guidance_scale=2.0, output_type="latent")
    text, mask, other, other_mask = pipe.encode_prompt(PROMPT)
    seed = int(torch.randint(2**63 - 1, (), generator=seeded()))
    past = x[:, :, :0]
    alone = None
    for index, frames in enumerate(split_blocks(10, 3)):
        g = torch.Generator().manual_seed(block_seed(seed, index))
        block = torch.randn(1, CHANNELS, frames, 8, 8, generator=g)
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            clip = torch.cat([past, block], 2)
            levels = torch.zeros(1, clip.shape[2])
            levels[:, past.shape[2] :] = t
            v = pipe.transformer(clip, levels, text, mask).sample
            v0 = pipe.transformer(clip, levels, other, other_mask).sample
            v = (v0 + 2 * (v - v0))[:, :, past.shape[2] :]
            block = pipe.scheduler.step(v, t, block).prev_sample
        alone = past.shape[2]
        past = torch.cat([past, block], 2)
    # without a past the last block differs by 0.1 and more
    torch.testing.assert_close(x, past, atol=1e-5, rtol=0)
    lone = call(pipe, num_frames=3, guidance_scale=2.0, output_type="latent")
    assert (lone - x[:, :, alone:]).abs().max() > 0.1


@torch.no_grad()
def test_a_clip_at_once_is_a_plain_loop():
    pipe = tiny_lingen(causal=False)
    found = call(pipe, guidance_scale=1.0, output_type="latent")
    text, mask, *_ = pipe.encode_prompt(PROMPT, False)
    x = torch.randn(1, CHANNELS, 9, 8, 8, generator=seeded())
    pipe.scheduler.set_timesteps(2)
    for t in pipe.scheduler.timesteps:
        v = pipe.transformer(x, t, text, mask).sample
        x = pipe.scheduler.step(v, t, x).prev_sample
    assert torch.equal(found, x)


@pytest.mark.parametrize("causal", [True, False])
def test_a_batch_is_each_video_alone(causal):
    pipe, prompts = tiny_lingen(causal), [PROMPT, "a face"]
    both = call(pipe, prompts, generator=[seeded(1), seeded(2)], output_type="latent")
    for i, prompt in enumerate(prompts):
        one = call(pipe, prompt, generator=[seeded(i + 1)], output_type="latent")
        torch.testing.assert_close(both[i : i + 1], one, atol=1e-4, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.1  # float32 in another order: 2e-5


def test_videos_of_a_prompt_follow_one_another():
    pipe = tiny_lingen()
    generators = [seeded(i) for i in range(4)]
    four = call(
        *(pipe, [PROMPT, "a face"]),
        num_videos_per_prompt=2,
        generator=generators,
        output_type="latent",
    )
    assert len(four) == 4
    second = call(pipe, generator=[seeded(1)], output_type="latent")
    torch.testing.assert_close(four[1:2], second, atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_guidance_moves_away_from_what_is_not_wanted(causal):
    pipe = tiny_lingen(causal)
    plain = call(pipe, guidance_scale=1.0, output_type="latent")
    guided = call(pipe, guidance_scale=4.0, output_type="latent")
    other = call(pipe, guidance_scale=4.0, negative_prompt="a face", output_type="latent")
    same = call(pipe, guidance_scale=4.0, negative_prompt=PROMPT, output_type="latent")
    assert (guided - plain).abs().max() > 0.01 and (other - guided).abs().max() > 0.01
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_noise_comes_from_the_generator_alone(causal):
    pipe = tiny_lingen(causal)
    torch.manual_seed(0)
    first = call(pipe)
    torch.manual_seed(1)
    assert np.array_equal(call(pipe), first)
    assert not np.array_equal(call(pipe, generator=seeded(4)), first)
    generator = seeded()
    assert np.array_equal(call(pipe, generator=generator), first)
    assert not np.array_equal(call(pipe, generator=generator), first)


def test_the_seed_of_a_block_is_the_same_everywhere():
    assert block_seed(7, 0) == 6967742470526479194
    assert len({block_seed(s, i) for s in range(9) for i in range(9)}) == 81


@pytest.mark.parametrize("causal", [True, False])
def test_given_noise_is_used(causal):
    pipe = tiny_lingen(causal)
    noise = torch.randn(1, CHANNELS, 9, 8, 8, generator=seeded(5))
    kept = noise.clone()
    one, two = (call(pipe, latents=noise, generator=seeded(i)) for i in (1, 2))
    assert np.array_equal(one, two) and torch.equal(noise, kept)


SCHEDULERS = [
    UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    FlowMatchHeunDiscreteScheduler(),
    FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_schedulers_of_flow_matching_stream_to_the_bit(scheduler):
    pipe = tiny_lingen(scheduler=scheduler)
    frames = call(pipe, num_inference_steps=4)
    assert np.isfinite(frames).all()
    streamed = np.concatenate(stream(pipe, num_inference_steps=4))
    assert np.array_equal(streamed, as_bytes(frames[0]))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
def test_a_scheduler_carries_nothing_from_block_to_block(scheduler):
    """The first block of a long clip is a short clip."""
    pipe = tiny_lingen(scheduler=scheduler)
    long = call(pipe, num_frames=6, num_inference_steps=4, output_type="latent")
    short = call(pipe, num_frames=3, num_inference_steps=4, output_type="latent")
    assert torch.equal(long[:, :, :3], short)


def test_outputs_are_as_of_other_video_pipelines():
    pipe = tiny_lingen()
    arrays = call(pipe)
    assert arrays.shape == (1, 9, 16, 16, 3) and 0 <= arrays.min() < arrays.max() <= 1
    tensors = call(pipe, output_type="pt")
    assert np.array_equal(tensors.permute(0, 1, 3, 4, 2).numpy(), arrays)
    pictures = call(pipe, output_type="pil")
    assert np.array_equal(np.asarray(pictures[0][4]), as_bytes(arrays[0, 4]))
    (alone,) = pipe(PROMPT, **CALL, generator=seeded(), return_dict=False)
    assert np.array_equal(alone, arrays)


def test_tiles_of_a_causal_vae_are_left_to_it():
    pipe = tiny_lingen(make_vae=tiny_wan)
    whole = call(pipe)
    pipe.vae.enable_tiling(tile_sample_min_height=512, tile_sample_min_width=512)
    np.testing.assert_allclose(call(pipe), whole, atol=1e-5)
    with pytest.raises(ValueError, match="vae: its tiling is on"):
        stream(pipe)


ROUNDED = [(tiny_wan, 10, 9), (tiny_wan, 8, 9), (tiny_wan, 3, 1)]
ROUNDED += [(tiny_cogvideox, 13, 9), (tiny_cogvideox, 5, 1)]


@pytest.mark.parametrize("make, wanted, made", ROUNDED)
def test_frames_that_the_vae_cannot_make_are_rounded_with_a_warning(make, wanted, made, caplog):
    pipe = tiny_lingen(make_vae=make)
    logger = logging.getLogger("linfusion.pipelines.lingen.pipeline")
    logger.addHandler(caplog.handler)
    try:
        frames = call(pipe, num_frames=wanted, num_inference_steps=1)
    finally:
        logger.removeHandler(caplog.handler)
    assert frames.shape[1] == made
    assert f"num_frames: {wanted} does not fit the VAE; rounded to {made}" in caplog.text


def test_tokens_of_several_frames_round_too():
    model = tiny_transformer(patch_size=(2, 2, 2), block_frames=4)
    assert call(tiny_lingen(transformer=model), num_frames=7).shape[1] == 6


# Texts


def test_what_only_fills_up_a_text_is_not_seen():
    pipe = tiny_lingen()
    text, mask, other, other_mask = pipe.encode_prompt(PROMPT)
    assert text.shape == (1, 77, TEXT_WIDTH) and 0 < mask.sum() < 77
    expected = call(pipe)
    given = {
        "prompt_embeds": text,
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": other,
        "negative_prompt_attention_mask": other_mask,
    }
    assert np.array_equal(call(pipe, None, **given), expected)
    changed = given | {"prompt_embeds": text + 9 * (1 - mask[..., None])}
    np.testing.assert_allclose(call(pipe, None, **changed), expected, atol=1e-6)
    unmasked = given | {"prompt_attention_mask": None}
    assert np.abs(call(pipe, None, **unmasked) - expected).max() > 1e-3


def test_two_encoders_match_two_text_dims():
    pipe = tiny_lingen(
        transformer=tiny_transformer(text_dims=(TEXT_WIDTH, TEXT_WIDTH)),
        tokenizer_2=tiny_t5_tokenizer(),
        text_encoder_2=tiny_t5(),
    )
    text, mask, *_ = pipe.encode_prompt(PROMPT, max_sequence_length=20)
    assert [t.shape for t in text] == [(1, 20, TEXT_WIDTH)] * 2
    assert [m.shape for m in mask] == [(1, 20)] * 2
    frames = call(pipe, max_sequence_length=20)
    embedded = call(
        *(pipe, None),
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt="",
        max_sequence_length=20,
    )
    assert np.array_equal(embedded, frames)


def test_a_t5_encoder_alone_will_do():
    pipe = tiny_lingen(tokenizer=tiny_t5_tokenizer(), text_encoder=tiny_t5())
    assert call(pipe, max_sequence_length=20).shape == (1, 9, 16, 16, 3)


def test_a_text_that_is_cut_off_is_said(caplog):
    pipe = tiny_lingen()
    logger = logging.getLogger("linfusion.pipelines.lingen.text")
    logger.addHandler(caplog.handler)
    pipe.encode_prompt(PROMPT, False, max_sequence_length=5)
    logger.removeHandler(caplog.handler)
    assert "prompt: 13 tokens, of which 5 are read" in caplog.text


def test_prompts_switch_where_a_block_begins():
    pipe = tiny_lingen()
    one = call(pipe, "a hand", output_type="latent")
    switched = call(pipe, [(0, "a hand"), (4, "a face")], output_type="latent")
    assert torch.equal(one[:, :, :6], switched[:, :, :6])
    assert (one - switched)[:, :, 6:].abs().max() > 0.01
    parts = stream(pipe, [(0, "a hand"), (4, "a face")])
    frames = call(pipe, [(0, "a hand"), (4, "a face")])
    assert np.array_equal(np.concatenate(parts), as_bytes(frames[0]))


PAIRS = [
    ([(0, "a"), "b"], r"prompt: got 'b' among pairs"),
    ([(0, "a"), (3,)], r"prompt: got \(3,\) among pairs"),
    ([("a", 0)], r"prompt: got \('a', 0\) among pairs"),
    ([(1, "a")], r"prompt: got first frames \[1\], expected 0"),
    ([(0, "a"), (3, "b"), (3, "c")], r"prompt: got first frames \[0, 3, 3\]"),
    ([(0, "a"), (9, "b")], "prompt: got first frame 9 of 9 frames"),
    ([(0, "a"), (7, "b")], "prompt: no block begins in the time of the one from frame 7 on"),
    ([(0, "a"), (1, "b"), (2, "c")], "prompt: no block begins in the time of the one from frame 1"),
]


@pytest.mark.parametrize("prompt, message", PAIRS)
def test_prompts_and_frames_that_do_not_pair_up_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_lingen(), prompt)


def test_what_is_not_wanted_is_one_for_all_prompts_over_time():
    pairs = [(0, "a hand"), (4, "a face")]
    with pytest.raises(ValueError, match="negative_prompt: got 2, expected one"):
        call(tiny_lingen(), pairs, negative_prompt=["a", "b"])


def test_a_model_without_blocks_has_one_prompt():
    with pytest.raises(ValueError, match="prompt: got pairs, expected one text"):
        call(tiny_lingen(causal=False), [(0, "a"), (4, "b")])


# Pictures and clips to begin with


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_picture_is_the_first_frame(make, causal):
    pipe, image = tiny_lingen(causal, make), tiny_image(size=64)
    latents = call(pipe, image=image, output_type="latent")
    side = 16 if make is tiny_image_vae else 32
    pixels = torch.from_numpy(np.array(image.resize((side, side), 1))).permute(2, 0, 1)
    z = pipe.vae.encode(_as_video(pipe, pixels / 127.5 - 1)).latent_dist.mode()
    first = latents[:, :, :1] * _std(pipe.vae) + _mean(pipe.vae)
    torch.testing.assert_close(first.flatten(), z.flatten(), atol=1e-4, rtol=0)
    assert (latents - call(pipe, output_type="latent"))[:, :, 1:].abs().max() > 0.01
    assert np.array_equal(
        np.concatenate(stream(pipe, image=image)), as_bytes(call(pipe, image=image)[0])
    )


def _as_video(pipe, pixels):
    return pixels[None] if pipe.vae_scale_factor_temporal == 1 else pixels[None, :, None]


def _std(vae):
    if "latents_std" in vae.config and vae.config.latents_std is not None:
        return torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return 1 / vae.config.scaling_factor


def _mean(vae):
    if vae.config.get("latents_mean") is not None:
        return torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    return vae.config.get("shift_factor") or 0.0


def test_pictures_of_any_kind_are_one():
    pipe, image = tiny_lingen(), tiny_image(size=16)
    array = np.asarray(image)
    expected = call(pipe, image=image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    alike = (array, array.astype(np.float32) / 255, tensor, tensor / 255, [image])
    for same in (*alike, image.convert("RGBA")):
        np.testing.assert_allclose(call(pipe, image=same), expected, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_given_frames_are_told_to_be_clean(causal):
    pipe, seen = tiny_lingen(causal), []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], torch.as_tensor(args[1]))), with_kwargs=True
    )
    call(pipe, num_frames=3, image=tiny_image(), guidance_scale=1.0)
    clean = [x[:, :, 0] for x, _ in seen[:2]]
    assert torch.equal(clean[0], clean[1])
    for _, levels in seen[:2]:
        assert levels.shape == (1, 3) and levels[0, 0] == 0 and (levels[0, 1:] > 0).all()


def test_a_picture_for_each_prompt():
    pipe = tiny_lingen()
    prompts, images = [PROMPT, "a face"], [tiny_image(1), tiny_image(2)]
    generators = [seeded(1), seeded(2)]
    both = call(pipe, prompts, image=images, generator=generators, output_type="latent")
    one = call(pipe, prompts[1], image=images[1], generator=[seeded(2)], output_type="latent")
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="image: got 3, expected one, or one for each"):
        call(pipe, prompts, image=[tiny_image(i) for i in range(3)])


@pytest.mark.parametrize("make", [tiny_image_vae, tiny_wan])
@pytest.mark.parametrize("causal", [True, False])
def test_a_clip_is_continued(make, causal):
    pipe = tiny_lingen(causal, make)
    given = np.concatenate(stream(pipe, "a face", num_frames=9 if make is tiny_wan else 4))
    options = {"num_frames": 17 if make is tiny_wan else 7, "video": given}
    latents = call(pipe, **options, output_type="latent")
    kept = 3 if make is tiny_wan else 4
    other = call(pipe, "a star", **options, generator=seeded(8), output_type="latent")
    assert torch.equal(latents[:, :, :kept], other[:, :, :kept])
    assert (latents - other)[:, :, kept:].abs().max() > 0.1
    changed = call(pipe, **{**options, "video": 255 - given}, output_type="latent")
    assert (latents - changed)[:, :, kept:].abs().max() > 0.01
    whole = call(pipe, **options)[0]
    assert np.array_equal(np.concatenate(stream(pipe, **options)), as_bytes(whole))


def test_no_gradient_is_kept_and_the_callers_mode_is_left_alone():
    kept = []

    def keep(_, i, t, tensors):
        kept.append(tensors["latents"].requires_grad)
        return tensors

    pipe = tiny_lingen()
    for _ in pipe.stream(PROMPT, **CALL, image=tiny_image(), callback_on_step_end=keep):
        assert torch.is_grad_enabled()
    assert kept and not any(kept)


def test_given_blocks_are_committed_and_not_denoised():
    pipe, steps = tiny_lingen(), []

    def count(_, i, t, tensors):
        steps.append(tensors["latents"].shape[2])
        return tensors

    given = np.concatenate(stream(pipe, num_frames=7))
    call(pipe, num_frames=12, video=given, callback_on_step_end=count)
    assert steps == [3] * 4  # two of the blocks of 3, in two steps each


# The rest of diffusers' ways


def test_a_saved_pipeline_draws_the_same(tmp_path):
    pipe = tiny_lingen(make_vae=tiny_wan)
    pipe.save_pretrained(tmp_path)
    loaded = LinGenPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.tokenizer_2 is None
    # Weights in a file are not aligned, which moves the last bits: copies are.
    for module in (loaded.transformer, loaded.vae, loaded.text_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
    np.testing.assert_allclose(call(loaded), call(pipe), atol=1e-5)


def test_offloading_covers_every_model():
    pipe = tiny_lingen(tokenizer_2=tiny_tokenizer(), text_encoder_2=tiny_text_encoder())
    models = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == models
    assert issubclass(LinGenPipeline, DiffusionPipeline)


def test_a_callback_sees_and_changes_every_step():
    pipe, seen = tiny_lingen(), []

    def callback(of, i, t, tensors):
        seen.append((i, float(t), of.num_timesteps, sorted(tensors)))
        tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = LinGenPipeline._callback_tensor_inputs
    latents = call(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
        output_type="latent",
    )
    assert [i for i, *_ in seen] == [0, 1] * 3
    assert all(number == 2 and given == sorted(names) for *_, number, given in seen)
    assert not latents.any()


def test_a_callback_that_ends_guidance_ends_it():
    class Cut(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._guidance_scale = 0.0
            return callback_kwargs

    pipe, calls = tiny_lingen(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    call(pipe, num_frames=3, callback_on_step_end=Cut(cutoff_step_ratio=1.0))
    assert len(calls) == 2 + 1
    assert pipe(PROMPT, **CALL).frames.shape[1] == 9  # and guides again


def stop_after(count):
    """A callback that interrupts after so many steps."""
    steps = []

    def callback(pipe, i, t, tensors):
        steps.append(i)
        pipe._interrupt = len(steps) >= count
        return tensors

    return callback


def test_an_interrupted_call_ends_with_the_block_it_was_at():
    pipe = tiny_lingen()
    frames = call(pipe, callback_on_step_end=stop_after(3))
    assert frames.shape[1] == 6
    assert np.array_equal(frames[:, :3], call(pipe)[:, :3])


def test_an_interrupted_stream_ends_with_a_whole_block():
    pipe = tiny_lingen()
    parts = stream(pipe, callback_on_step_end=stop_after(3))
    assert np.array_equal(np.concatenate(parts), stream(pipe)[0])


def test_streams_of_one_pipeline_do_not_disturb_each_other():
    pipe = tiny_lingen()
    options = [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "generator": seeded(4)}]
    expected = [stream(pipe, **o) for o in options]
    options[1]["generator"] = seeded(4)
    streams = [pipe.stream(PROMPT, **{**CALL, "generator": seeded(), **o}) for o in options]
    for parts in zip(*streams, *expected, strict=True):
        assert np.array_equal(parts[0], parts[2]) and np.array_equal(parts[1], parts[3])


def test_a_half_precision_model_keeps_its_latents_in_float32(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    half = LinGenTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    options = {"guidance_scale": 1.0, "output_type": "latent"}
    latents = call(tiny_lingen(transformer=half), **options)
    assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16().float())
    whole = call(tiny_lingen(), **options)
    assert 0 < (latents - whole).square().mean() / whole.var() < 0.01


# Refused


REFUSED = [
    ({"height": 17}, "height: got 17, expected a positive multiple of 4"),
    ({"width": 6}, "width: got 6, expected a positive multiple of 4"),
    ({"num_frames": 0}, "num_frames: got 0"),
    ({"num_frames": 161}, "num_frames: got 161, the positions of this model .* reach 160"),
    ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
    ({"guidance_scale": float("nan")}, "guidance_scale: got nan"),
    ({"num_videos_per_prompt": 0}, "num_videos_per_prompt: got 0"),
    ({"output_type": "mp4"}, "output_type: got 'mp4'"),
    ({"prompt_embeds": embeds()}, "prompt: got both it and prompt_embeds"),
    ({"prompt": None}, "prompt: got neither it nor prompt_embeds"),
    ({"prompt": 3}, "prompt: got 3, expected a text"),
    ({"prompt": []}, r"prompt: got \[\], expected a text"),
    ({"prompt_attention_mask": torch.ones(1, 5)}, "prompt_attention_mask: got one without"),
    ({"prompt": None, "prompt_embeds": embeds(width=7)}, r"prompt_embeds: got \[\(1, 5, 7\)\]"),
    (
        {"prompt": None, "prompt_embeds": embeds(), "prompt_attention_mask": torch.ones(1, 4)},
        r"prompt_attention_mask: got \[\(1, 4\)\], expected \(1, 5\)",
    ),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt: got 2, expected as many as prompts: 1"),
    ({"negative_prompt": 3}, "negative_prompt: got 3"),
    ({"generator": [seeded(), seeded()]}, "generator: got 2, expected one, or one for each of 1"),
    ({"latents": torch.zeros(1, 4, 8, 8, 8)}, r"latents: got .*expected \(1, 4, 9, 8, 8\)"),
    (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        "callback_on_step_end_tensor_inputs: got 'noise'",
    ),
    ({"image": tiny_image(), "video": [tiny_image()]}, "image: got one beside a video"),
    ({"video": [tiny_image()] * 9}, "video: got 9 frames, expected fewer than the 9"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=lambda v: str(v)[:40])
def test_a_wrong_call_is_refused_before_any_work(options, message):
    pipe, calls = tiny_lingen(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        call(pipe, **{"prompt": PROMPT, **options})
    assert not calls


def test_given_frames_that_the_vae_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"video: got 6 frames.*1 more than a multiple of 4"):
        call(tiny_lingen(make_vae=tiny_wan), video=[tiny_image()] * 6)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="vae: got NoneType, expected one of AutoencoderKLWan"):
        tiny_lingen(vae=None)
    with pytest.raises(ValueError, match="scheduler: got DDIMScheduler, expected one of flow"):
        call(tiny_lingen(scheduler=DDIMScheduler()))
    with pytest.raises(ValueError, match=r"text_encoder: got encoders of \[32\] channels"):
        call(tiny_lingen(transformer=tiny_transformer(text_dims=(TEXT_WIDTH, 8))))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt": ["a", "b"]}, "prompt: got a list of 2 texts, expected one video"),
        ({"prompt": None, "prompt_embeds": embeds(2)}, "prompt_embeds: got several prompts"),
        ({"resume": True}, "resume: got True without state"),
        ({"replay": True}, "replay: got True without state"),
        ({"height": 17}, "height: got 17"),
    ],
)
def test_a_wrong_stream_is_refused_when_it_is_called(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_lingen().stream(**{"prompt": PROMPT, **CALL, **options})
