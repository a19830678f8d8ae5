"""Decoding a video of any length a few frames at a time, equal to decoding it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor


class StreamingVAEDecoder:
    """Decodes latent frames as they come, in memory that does not grow with their number.

    The frames are those of `vae.decode` on the whole video, however it is split: a causal VAE
    keeps the last inputs of its convolutions from call to call (here, not in the VAE, which others
    may use meanwhile), an image VAE takes the frames one by one.

    - AutoencoderKLWan: a latent frame at a time; the first gives 1 frame, the others 4.
    - AutoencoderKLCogVideoX: two at a time, and the odd one of an odd number with the first two,
      since its group norms see what is decoded together; frames wait for their partner. This is
      why it needs `total`.
    - AutoencoderKL: a frame at a time.

    Args:
        vae: one of these three.
        total: latent frames in the whole video; needed for AutoencoderKLCogVideoX, checked for
            the others where given.

    Raises:
        ValueError: another VAE, or `total` missing or below 1.
    """

    def __init__(self, vae: Any, total: int | None = None) -> None:
        kind = next((kind for kind in _KINDS if isinstance(vae, kind)), None)
        if kind is None:
            raise ValueError(
                f"vae: {type(vae).__name__} cannot be streamed exactly; "
                f"accepted: {', '.join(kind.__name__ for kind in _KINDS)}"
            )
        whole = isinstance(total, int) and not isinstance(total, bool) and total > 0
        if not whole and (total is not None or kind is AutoencoderKLCogVideoX):
            raise ValueError(
                f"total: {total!r}; accepted: the latent frames of the whole video, from 1 on"
                + ("" if kind is AutoencoderKLCogVideoX else ", or None")
            )
        self.vae, self.total = vae, total
        self._kind = _KINDS[kind]
        self.reset()

    def reset(self) -> None:
        """Begin another video."""
        self.taken = 0  # latent frames so far, the waiting ones included
        self._waiting: Tensor | None = None  # [1, C, f, h, w], not decoded yet
        self._decoded = 0
        self._size: tuple[int, ...] | None = None
        self._cache: Any = None

    def frames(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decode the next latent frames of the video.

        What the iterator was not asked for, or failed at, waits and comes first the next time.

        Args:
            latents: [1, C, f, h, w] as `vae.decode` takes them: scaled and shifted back. With
                f = 0 only what waits is decoded.

        Yields:
            uint8 [frames, H, W, 3] on the CPU, after every call of the decoder.

        Raises:
            ValueError: another shape, frames beyond `total`, or a causal VAE with its own tiling
                on; before anything is decoded.
        """
        for sample in self.samples(latents):
            pixels = (sample[0].float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
            yield pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()

    def samples(self, latents: Tensor) -> Iterator[Tensor]:
        """As `frames`, but [1, 3, frames, H, W] where and as the VAE gives them, about -1 to 1."""
        self._check(latents)
        self._size = tuple(latents.shape[-2:])
        self.taken += latents.shape[2]
        if self._waiting is not None:
            latents = torch.cat([self._waiting, latents], 2)
        self._waiting = latents
        return self._samples()

    def state_dict(self) -> dict[str, Any]:
        """All that the next frames depend on, in tensors, numbers, strings, lists and dicts."""
        return {
            "vae": type(self.vae).__name__,
            "total": self.total,
            "taken": self.taken,
            "decoded": self._decoded,
            "size": None if self._size is None else list(self._size),
            "waiting": self._waiting,
            "cache": _mapped(self._cache, lambda t: t),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same VAE, on whatever device it is now.

        Raises:
            ValueError: a state of another VAE class or another `total`.
        """
        for name, ours in (("vae", type(self.vae).__name__), ("total", self.total)):
            if state[name] != ours:
                raise ValueError(f"state: {name} is {state[name]!r}; accepted here: {ours!r}")
        self.taken, self._decoded = state["taken"], state["decoded"]
        self._size = None if state["size"] is None else tuple(state["size"])
        self._waiting, self._cache = _mapped(
            [state["waiting"], state["cache"]], lambda t: t.to(self.vae.device)
        )

    def _check(self, latents: Tensor) -> None:
        channels = self.vae.config[self._kind.channels]
        if latents.ndim != 5 or latents.shape[:2] != (1, channels):
            raise ValueError(
                f"latents: got {list(latents.shape)}, accepted is [1, {channels}, f, h, w]"
            )
        size = tuple(latents.shape[-2:])
        if self._size not in (None, size):
            raise ValueError(f"latents: got frames of {size}, the ones before are {self._size}")
        if self.total is not None and self.taken + latents.shape[2] > self.total:
            raise ValueError(
                f"latents: got {latents.shape[2]} frames after {self.taken}; "
                f"the video has {self.total}"
            )
        if self._kind.decode is not _decode_image and self.vae.use_tiling:
            raise ValueError(
                "vae: its tiling is on, and tiles keep no state; "
                "accepted: vae.disable_tiling(), as one call decodes few frames"
            )

    def _samples(self) -> Iterator[Tensor]:
        while self._waiting is not None:
            count = self._kind.frames(self.vae, self._decoded, self.total)
            if self._waiting.shape[2] < count:
                return
            with torch.no_grad():  # not while the caller holds the frames
                sample, cache = self._kind.decode(
                    self.vae, self._waiting[:, :, :count], self._cache
                )
            # Not before it has succeeded: a call that ran out of memory can be made again.
            self._cache = cache
            self._decoded += count
            rest = self._waiting[:, :, count:]
            self._waiting = rest.clone() if rest.shape[2] else None
            yield sample


def _mapped(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested lists and dicts with other tensors."""
    match value:
        case Tensor():
            return of_tensor(value)
        case list():
            return [_mapped(item, of_tensor) for item in value]
        case dict():
            return {key: _mapped(item, of_tensor) for key, item in value.items()}
    return value


@apply_forward_hook  # as on `vae.decode`: an offloaded VAE comes to its device
def _decode_wan(vae: Any, z: Tensor, cache: list[Any] | None) -> tuple[Tensor, list[Any]]:
    first = cache is None
    if cache is None:
        cache = [None] * sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
    cache = list(cache)  # the decoder writes into it
    x = vae.post_quant_conv(z)
    x = vae.decoder(x, feat_cache=cache, feat_idx=[0], first_chunk=first)
    if vae.config.patch_size is not None:
        x = unpatchify(x, patch_size=vae.config.patch_size)
    return x.clamp(-1, 1), cache


@apply_forward_hook
def _decode_cogvideox(vae: Any, z: Tensor, cache: Any) -> tuple[Tensor, Any]:
    if vae.post_quant_conv is not None:
        z = vae.post_quant_conv(z)
    sample, cache = vae.decoder(z, conv_cache=cache)
    return sample, cache


def _decode_image(vae: Any, z: Tensor, cache: None) -> tuple[Tensor, None]:
    return vae.decode(z[:, :, 0], return_dict=False)[0][:, :, None], None


def _one(vae: Any, decoded: int, total: int | None) -> int:
    return 1


def _pairs(vae: Any, decoded: int, total: int | None) -> int:
    assert total is not None
    size: int = vae.num_latent_frames_batch_size
    return size if decoded else min(total, size + total % size)


class _Kind(NamedTuple):
    """How a class of VAE is streamed.

    Attributes:
        channels: name of the number of latent channels in its config.
        frames: how many latent frames the next call takes, after so many of so many.
        decode: latents [1, C, f, h, w] and the cache after the call before -> frames and cache.
    """

    channels: str
    frames: Callable[[Any, int, int | None], int]
    decode: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]


_KINDS = {
    AutoencoderKLWan: _Kind("z_dim", _one, _decode_wan),
    AutoencoderKLCogVideoX: _Kind("latent_channels", _pairs, _decode_cogvideox),
    AutoencoderKL: _Kind("latent_channels", _one, _decode_image),
}
