"""Decode and encode pictures of any size with a stock VAE, in bands of rows."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import linfusion.bands.rules  # noqa: F401  fills the table of rules
from linfusion.bands.budget import Ledger, share_of, weight_bytes
from linfusion.bands.hollow import hollow
from linfusion.bands.hosts import execution_device
from linfusion.bands.rows import Engine, Node, Rows
from linfusion.bands.store import Policy, Store

WHOLE = 1 << 20  # pixels: without a budget more than these are too many for most cards at once


def decode_rows(
    vae: Any,
    latents: Tensor,
    *,
    memory_budget: int | str | None = None,
    ledger: Ledger | None = None,
    dry: bool = False,
) -> Iterator[np.ndarray]:
    """Decode a picture of any size, a band of rows at a time from top to bottom.

    There are no tiles: convolutions read beyond the band and group norms use the moments of the
    whole picture. What the budget cannot keep is computed again instead.

    Args:
        vae: an AutoencoderKL.
        latents: [1, C, H/8, W/8], as a pipeline returns them (times the scaling factor).
        memory_budget: bytes, or text like "12GB"; None keeps all that is wanted again, and decodes
            pictures of up to `WHOLE` pixels at once.
        ledger: to enter what it took into.
        dry: yield nothing; only fill the ledger.

    Yields:
        uint8 [rows, W, 3].
    """
    vae, config = _untiled(vae), vae.config
    device = execution_device(vae)
    if dry:
        latents = hollow(latents.shape, vae.dtype, device)
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        latents = latents.to(device, vae.dtype)
    factor = 2 ** (len(config.block_out_channels) - 1)
    whole = memory_budget is None and _is_small(latents.shape, factor)
    if whole and not dry:
        with torch.no_grad():
            yield _levels(vae.decode(latents, return_dict=False)[0])
        return

    def decoded(engine: Engine) -> Node:
        return vae.decode(engine.wrap(latents), return_dict=False)[0].node

    with torch.no_grad():
        engine = _vae_engine(vae, decoded, memory_budget, dry)
        node = decoded(engine)
    bands = engine.passes(node)
    while True:
        with torch.no_grad():  # not while the caller holds the band
            found = next(bands, None)
        if found is None:
            break
        _, _, (band,) = found
        yield _levels(band)
    if ledger is not None:
        ledger.in_bands = not whole
        ledger.add(engine)


def _is_small(shape: torch.Size, factor: int = 1) -> bool:
    return shape[-2] * shape[-1] * factor**2 <= WHOLE


def _levels(picture: Tensor) -> np.ndarray:
    """[1, 3, H, W] of -1 to 1 as uint8 [H, W, 3]."""
    pixels = (picture[0].float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


def encode_rows(
    vae: Any,
    picture: np.ndarray,
    *,
    memory_budget: int | str | None = None,
    generator: torch.Generator | None = None,
    ledger: Ledger | None = None,
    dry: bool = False,
) -> Tensor:
    """Encode a picture of any size, a band of rows at a time.

    Args:
        vae: an AutoencoderKL.
        picture: uint8 [H, W, 3], H and W multiples of the VAE's factor; may be a memory map.
        memory_budget: as for `decode_rows`.
        generator: to draw the latents with; None takes their mean.
        ledger, dry: as for `decode_rows`.

    Returns:
        [1, C, H/8, W/8] times the scaling factor, in the VAE's dtype.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"picture: got {picture.dtype} {picture.shape}, accepted is uint8 [H, W, 3]"
        )
    vae, config, device, dtype = _untiled(vae), vae.config, execution_device(vae), vae.dtype
    shape = (1, 3, *picture.shape[:2])
    whole = memory_budget is None and _is_small(torch.Size(shape))

    def pixels(start: int, stop: int, bands: list[Tensor]) -> Tensor:
        band = torch.from_numpy(np.ascontiguousarray(picture[start:stop]))
        band = band.to(device).permute(2, 0, 1)[None]
        return (band.float() / 127.5 - 1).to(dtype)

    def drawn(found: Any, generator: torch.Generator | None) -> Any:
        return found.mode() if generator is None else found.sample(generator)

    def encoded(engine: Engine, generator: torch.Generator | None = None) -> Node:
        source = Node(engine, shape, dtype, device, axis=2, line=1, compute=pixels)
        return drawn(vae.encode(Rows(source), return_dict=False)[0], generator).node

    with torch.no_grad():
        if whole and not dry:
            source = pixels(0, shape[2], [])
            latents = drawn(vae.encode(source, return_dict=False)[0], generator)
        else:
            engine = _vae_engine(vae, encoded, memory_budget, dry)
            latents = engine.whole(Rows(encoded(engine, None if dry else generator)))
            if ledger is not None:
                ledger.in_bands = not whole
                ledger.add(engine)
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents - shift) * config.scaling_factor


@contextlib.contextmanager
def full_precision(vae: Any) -> Iterator[None]:
    """A VAE that overflows in float16 runs in float32 meanwhile, as in SDXL's own pipeline."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def _vae_engine(
    vae: Any, build: Callable[[Engine], Node], memory_budget: int | str | None, dry: bool
) -> Engine:
    """The engine that does the least work within the budget, as far as dry runs find it.

    What is kept early leaves no room for what comes later: first the bound on the size of what is
    kept is chosen, then exceptions to it.
    """
    band_bytes, limit = share_of(memory_budget, weight_bytes(vae))

    def engine(policy: Policy | None, *, dry: bool) -> Engine:
        return Engine(Store(limit, policy=policy, dry=dry), band_bytes=band_bytes, dry=dry)

    @functools.cache
    def trial(policy: Policy | None) -> Engine:
        tried = engine(policy, dry=True)
        for _ in tried.passes(build(tried)):
            pass
        return tried

    def work(policy: Policy) -> int:
        return trial(policy).flops

    if limit is None:
        return engine(None, dry=dry)
    least = trial(None).flops  # with everything kept, whatever the budget
    sizes = sorted({0, *trial(Policy(largest=0)).store.asked}, reverse=True)
    found = []
    for best in [Policy(size) for size in sizes if size <= limit]:
        for index in range(len(trial(best).store.asked)):
            if work(best) == least:
                return engine(best, dry=dry)
            best = min(best, Policy(best.largest, best.exceptions | {index}), key=work)
        found.append(best)
    return engine(min(found, key=work), dry=dry)


def _untiled(vae: Any) -> Any:
    """The same VAE, weights and hooks, without tiles or slices; that of others keeps its own."""
    twin = copy.copy(vae)
    twin.use_tiling = twin.use_slicing = False
    return twin
