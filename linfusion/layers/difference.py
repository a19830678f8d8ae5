"""A projection as what it adds to that of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """What a projection adds to that of the base model: W + B A, and its bias in full.

    Args:
        inputs, outputs: channels of the projection.
        bias: whether it has one.
        rank: columns of B.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, *, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=bias)


class Difference(NamedTuple):
    """A tensor as what it adds to the base model's: b a, or b where a is None."""

    b: Tensor
    a: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.b.shape if self.a is None else torch.Size((len(self.b), self.a.shape[1]))

    def onto(self, base: Tensor) -> Tensor:
        """base + b a, computed in float32, in the dtype of `base`."""
        b = self.b.to(base.device, torch.float32)
        added = b if self.a is None else b @ self.a.to(base.device, torch.float32)
        return (base.float() + added).to(base.dtype)


def differences(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Difference]:
    """Tensors of one layer, with those of its `LowRank` parts under the names they stand for."""
    found: dict[str, Tensor | Difference] = {}
    for name, tensor in tensors.items():
        linear, found_b, leaf = name.partition(".lora_B.")
        if found_b and leaf == "weight":
            found[f"{linear}.weight"] = Difference(tensor, tensors[f"{linear}.lora_A.weight"])
        elif found_b:
            found[f"{linear}.{leaf}"] = Difference(tensor, None)
        elif ".lora_A." not in name:
            found[name] = tensor
    return found
