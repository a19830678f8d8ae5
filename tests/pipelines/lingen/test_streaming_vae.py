"""A video decoded as it comes is the video decoded at once."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)

from linfusion.pipelines.lingen.streaming_vae import StreamingVAEDecoder

CHANNELS = 4
SPLITS = [(7,), (1,) * 7, (3, 4), (2, 1, 4), (1, 5, 1), (6,), (1, 1, 4), (1,), (2,), (3,)]
WAN = {"base_dim": 4, "z_dim": CHANNELS, "dim_mult": [1, 2], "num_res_blocks": 1}


def wan(**config):
    config = {**WAN, "temperal_downsample": [True], **config}
    return AutoencoderKLWan(latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS, **config)


def wan_2_2():
    """The residual blocks and the patches of Wan 2.2."""
    return wan(is_residual=True, dim_mult=[1, 1], patch_size=2, in_channels=12, out_channels=12)


def cogvideox():
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )


def image():
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS,
        norm_num_groups=4,
    )


VAES = [wan, wan_2_2, cogvideox, image]


def tiny(make, seed=0):
    torch.manual_seed(seed)
    return make().eval()


def latents(frames, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(1, CHANNELS, frames, 4, 6, generator=g)


@torch.no_grad()
def at_once(vae, z):
    if isinstance(vae, AutoencoderKL):
        return torch.stack([vae.decode(frame).sample for frame in z.unbind(2)], 2)
    return vae.decode(z).sample


def streamed(decoder, z, split):
    parts = (part for piece in z.split(split, 2) for part in decoder.samples(piece))
    return torch.cat(list(parts), 2)


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_gives_the_frames_of_the_whole(make, split):
    vae, z = tiny(make), latents(sum(split))
    whole = at_once(vae, z)
    found = streamed(StreamingVAEDecoder(vae, sum(split)), z, split)
    # frames decoded without the ones before: 0.4 and more
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [wan, wan_2_2, cogvideox])
def test_frames_depend_on_the_ones_before(make):
    """What the test above has to see."""
    vae, z = tiny(make), latents(4)
    whole, alone = at_once(vae, z), at_once(vae, z[:, :, 2:])
    assert (whole[:, :, -1] - alone[:, :, -1]).abs().max() > 0.1


@pytest.mark.parametrize("make", VAES)
def test_frames_are_bytes_of_the_samples(make):
    vae, z = tiny(make), latents(3)
    found = np.concatenate(list(StreamingVAEDecoder(vae, 3).frames(z)))
    expected = (at_once(vae, z)[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 0.5 + 1e-2


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_state_that_was_saved_goes_on_with_the_same_bits(make, cut):
    vae, z = tiny(make), latents(6)
    one = StreamingVAEDecoder(vae, 6)
    head = list(one.samples(z[:, :, :cut]))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    rest = list(one.samples(z[:, :, cut:]))
    other = StreamingVAEDecoder(tiny(make), 6)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(
        torch.cat(head + list(other.samples(z[:, :, cut:])), 2), torch.cat(head + rest, 2)
    )
    assert other.taken == 6


@pytest.mark.parametrize("make", VAES)
def test_a_state_is_not_changed_by_what_comes_after(make):
    decoder, z = StreamingVAEDecoder(tiny(make), 8), latents(8)
    list(decoder.samples(z[:, :, :2]))
    state = decoder.state_dict()
    first = list(decoder.samples(z[:, :, 2:4]))
    decoder.load_state_dict(state)
    assert torch.equal(torch.cat(first, 2), torch.cat(list(decoder.samples(z[:, :, 2:4])), 2))


def nbytes(value):
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    items = value.values() if isinstance(value, dict) else value
    return sum(map(nbytes, items)) if isinstance(value, dict | list) else 0


@pytest.mark.parametrize("make", VAES)
def test_the_state_does_not_grow(make):
    decoder, sizes = StreamingVAEDecoder(tiny(make), 40), []
    for _ in range(10):
        list(decoder.samples(latents(4)))
        sizes.append(nbytes(decoder.state_dict()))
    assert sizes[2:] == sizes[1:-1]
    assert sizes[0] > 0 or make is image


@pytest.mark.parametrize("make", VAES)
def test_two_videos_and_a_whole_decoding_do_not_disturb_each_other(make):
    vae = tiny(make)
    videos = [latents(4, seed) for seed in (1, 2)]
    decoders = [StreamingVAEDecoder(vae, 4) for _ in videos]
    found = [[], []]
    for i in range(4):
        for parts, decoder, z in zip(found, decoders, videos, strict=True):
            parts += decoder.samples(z[:, :, i : i + 1])
        at_once(vae, latents(2))
    for parts, z in zip(found, videos, strict=True):
        torch.testing.assert_close(torch.cat(parts, 2), at_once(vae, z), atol=1e-5, rtol=0)


def test_reset_begins_another_video():
    vae, z = tiny(wan), latents(3)
    decoder = StreamingVAEDecoder(vae, 3)
    first = streamed(decoder, z, 1)
    decoder.reset()
    assert torch.equal(streamed(decoder, z, 1), first)


@pytest.mark.parametrize("make", VAES)
def test_a_call_that_failed_can_be_made_again(make):
    vae, z = tiny(make), latents(4)
    decoder = StreamingVAEDecoder(vae, 4)
    found = list(decoder.samples(z[:, :, :2]))

    def out_of_memory(*_):
        raise MemoryError

    conv_out = vae.decoder.conv_out
    hook = conv_out.register_forward_pre_hook(out_of_memory)
    with pytest.raises(MemoryError):
        list(decoder.samples(z[:, :, 2:]))
    hook.remove()
    found += decoder.samples(z[:, :, :0])
    torch.testing.assert_close(torch.cat(found, 2), at_once(vae, z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", VAES)
def test_an_offloaded_vae_is_brought_back(make):
    vae, z = tiny(make), latents(2)
    whole = at_once(vae, z)
    vae, _ = cpu_offload_with_hook(vae, "cpu")
    calls = []
    before = vae._hf_hook.pre_forward
    vae._hf_hook.pre_forward = lambda *args, **kwargs: (
        calls.append(1),
        before(*args, **kwargs),
    )[1]
    found = streamed(StreamingVAEDecoder(vae, 2), z, 2)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)
    assert calls


@pytest.mark.parametrize("make", VAES)
def test_what_was_not_asked_for_comes_first_the_next_time(make):
    vae, z = tiny(make), latents(6)
    decoder = StreamingVAEDecoder(vae, 6)
    found = [next(decoder.samples(z[:, :, :4]))]
    found += decoder.samples(z[:, :, 4:])
    torch.testing.assert_close(torch.cat(found, 2), at_once(vae, z), atol=1e-5, rtol=0)


def test_no_gradient_is_kept_and_the_callers_mode_is_left_alone():
    for sample in StreamingVAEDecoder(tiny(wan)).samples(latents(2)):
        assert not sample.requires_grad and torch.is_grad_enabled()


# Refused


def test_a_vae_that_cannot_be_streamed_is_refused():
    with pytest.raises(ValueError, match=r"^vae: AutoencoderKLLTXVideo cannot .*AutoencoderKLWan"):
        StreamingVAEDecoder(AutoencoderKLLTXVideo.__new__(AutoencoderKLLTXVideo))


def test_cogvideox_needs_the_number_of_frames():
    with pytest.raises(ValueError, match=r"^total: None; accepted: the latent frames"):
        StreamingVAEDecoder(tiny(cogvideox))


@pytest.mark.parametrize("total", [0, -1, 2.0, True])
def test_a_total_that_is_none_is_refused(total):
    with pytest.raises(ValueError, match=r"^total: "):
        StreamingVAEDecoder(tiny(wan), total)


@pytest.mark.parametrize("make", VAES)
def test_frames_beyond_the_total_are_refused_and_change_nothing(make):
    decoder = StreamingVAEDecoder(tiny(make), 3)
    list(decoder.samples(latents(2)))
    with pytest.raises(ValueError, match=r"^latents: got 2 frames after 2; the video has 3"):
        decoder.samples(latents(2))
    assert decoder.taken == 2


@pytest.mark.parametrize("shape", [(2, 4, 1, 4, 6), (1, 3, 1, 4, 6), (1, 4, 4, 6)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"^latents: got .*accepted is \[1, 4, f, h, w\]"):
        StreamingVAEDecoder(tiny(wan)).samples(torch.zeros(shape))


def test_frames_of_another_size_are_refused():
    decoder = StreamingVAEDecoder(tiny(wan))
    list(decoder.samples(latents(1)))
    with pytest.raises(ValueError, match=r"^latents: got frames of \(4, 4\), .*\(4, 6\)"):
        decoder.samples(latents(1)[..., :4])


@pytest.mark.parametrize("make", [wan, cogvideox])
def test_tiling_is_refused(make):
    vae = tiny(make)
    vae.enable_tiling()
    with pytest.raises(ValueError, match=r"^vae: its tiling is on.*disable_tiling"):
        StreamingVAEDecoder(vae, 1).samples(latents(1))


@pytest.mark.parametrize("other", [(image, 3), (wan, 4)])
def test_a_state_of_another_video_is_refused(other):
    make, total = other
    state = StreamingVAEDecoder(tiny(make), total).state_dict()
    with pytest.raises(ValueError, match=r"^state: (vae|total) is .*accepted here"):
        StreamingVAEDecoder(tiny(wan), 3).load_state_dict(state)
