"""Huge pages for large outputs."""

import sys
from pathlib import Path

import pytest
import torch

from linfusion.kernels import pages
from linfusion.kernels.pages import empty_output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_is_what_empty_gives(dtype):
    out = empty_output((3, 5), dtype, torch.device("cpu"))
    assert out.shape == (3, 5) and out.dtype == dtype and out.is_contiguous()


def test_only_large_outputs_ask(monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: asked.append(args))
    empty_output((1 << 20,), torch.float32, torch.device("cpu"))
    assert not asked
    out = empty_output((1 << 24,), torch.float32, torch.device("cpu"))
    ((start, length, _),) = asked
    assert out.data_ptr() <= start and start + length <= out.data_ptr() + out.nbytes
    assert length > out.nbytes - 2 * 4096


def test_a_system_without_them_is_left_alone(monkeypatch):
    pages._madvise.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pages._madvise() is None
    assert empty_output((1 << 24,), torch.float32, torch.device("cpu")).numel() == 1 << 24
    pages._madvise.cache_clear()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="a system without transparent huge pages",
)
def test_the_system_has_heard_the_advice():
    out = empty_output((1 << 24,), torch.float32, torch.device("cpu"))
    middle = out.data_ptr() + out.nbytes // 2
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= middle < high
        elif inside and first == "VmFlags:":
            flags = rest
    assert "hg" in flags
