"""What `make test-gpu` relies on: tests made for the CPU run elsewhere, with the same numbers."""

from __future__ import annotations

import torch
from torch import nn

from tests.on_device import OnDevice


def test_tensors_and_modules_come_to_the_device():
    with OnDevice("meta"):
        drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
        made = nn.Linear(2, 2), torch.zeros(2), torch.tensor([1.0]), torch.arange(3)
        stays = torch.zeros(2, device="cpu")
    assert drawn.is_meta and all(t.is_meta for t in (made[0].weight, *made[1:]))
    assert not stays.is_meta


def test_numbers_are_those_of_the_cpu():
    expected = torch.randn(3, generator=torch.Generator().manual_seed(0))
    with OnDevice("cpu"):
        assert torch.equal(torch.randn(3, generator=torch.Generator().manual_seed(0)), expected)
