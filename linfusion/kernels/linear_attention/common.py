"""What every implementation means by a state, and by reading one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEATURE_MAPS = ("elu1", "relu", "relu_eps", "identity")
RELU_EPS = 1e-6  # what "relu_eps" adds; the Triton kernels have it as a literal
NORMALIZERS = ("mean", "sum", "none")


class Choices(NamedTuple):
    """How a state is read.

    Attributes:
        feature_map: of `FEATURE_MAPS`.
        normalizer: of `NORMALIZERS`.
        eps: added to the denominator.
    """

    feature_map: str
    normalizer: str
    eps: float


class LinearState(NamedTuple):
    """Everything linear attention remembers of its keys and values.

    States of disjoint sets of tokens form a commutative monoid under `merge`, so streaming, tiling
    and sequence parallelism are merges. An empty state (count 0) is all zeros.

    Attributes:
        kv: mean_j φ(k_j)ᵀ v_j, [B, H, D, E], float32 (float64 for float64 inputs).
        k_mean: mean_j φ(k_j), [B, H, D], same dtype.
        count: how many keys were averaged, or the sum of their weights, [B], same dtype.
    """

    kv: Tensor
    k_mean: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count, which no state needs

    def merge(self, other: LinearState) -> LinearState:
        """The state of both sets of tokens together: means weighted by their counts.

        Args:
            other: state of other tokens, with the same batch, heads and head dimensions.

        Raises:
            ValueError: the two states have different shapes.
        """
        if self.kv.shape != other.kv.shape or self.count.shape != other.count.shape:
            raise ValueError(
                f"other: expected a state with kv {tuple(self.kv.shape)} and count "
                f"{tuple(self.count.shape)}, got kv {tuple(other.kv.shape)} and count "
                f"{tuple(other.count.shape)}"
            )
        count = self.count + other.count
        # 0/0 of two empty states is an empty state.
        divisor = torch.where(count == 0, torch.ones_like(count), count)
        a, b = self.count / divisor, other.count / divisor  # [B]
        return LinearState(
            kv=a[:, None, None, None] * self.kv + b[:, None, None, None] * other.kv,
            k_mean=a[:, None, None] * self.k_mean + b[:, None, None] * other.k_mean,
            count=count,
        )
