"""Float32 products of oneDNN, where torch would take MKL's.

On CPUs it was not made for, AMD's, MKL multiplies float32 with AVX2, in twice the time that oneDNN
takes with AVX-512. Torch asks oneDNN only where a user lets products have fewer bits. Fewer is what
oneDNN has on CPUs with AMX alone: without it, that permission changes who multiplies, not what.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

AVX512_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def serves() -> bool:
    """Whether this CPU has no shorter products for float32, which a product shows as well."""
    return AVX512_BF16 and not AMX and _is_exact()


@contextmanager
def float32_products() -> Iterator[None]:
    """Inside, oneDNN takes float32 products; ask `serves` before.

    The permission holds for all threads. A choice that the user has made is left alone.
    """
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if settings.fp32_precision != "none":
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = "none"


@functools.cache
def _is_exact() -> bool:
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9
        return False
    x = torch.full((1, 64, 64), 1 + 2.0**-20)
    with float32_products():
        return torch.equal(torch.bmm(x, torch.eye(64)[None]), x)
