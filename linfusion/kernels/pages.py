"""Large outputs on a CPU, in huge pages where the system has them."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From this size on the C library maps an allocation afresh every time, and each of its pages of
# 4 KiB is faulted in as it is first written: half of the time of a linear read.
_MAPPED = 32 << 20


def empty_output(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux a large one on the CPU asks for huge pages, which may be refused."""
    out = torch.empty(size, dtype=dtype, device=device)
    if out.is_cpu and out.nbytes >= _MAPPED and (advise := _madvise()) is not None:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (out.data_ptr() + out.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, end - start, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise
