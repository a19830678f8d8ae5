"""What LinFusion learns before the projections of a layer (Liu et al. 2024, eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention.base import untouched
from linfusion.kernels.elementwise import norm_leaky_relu, one_pass

SLOPE = 0.01  # of leaky ReLU below 0
NAME = "linfusion"


class ResidualMLP(nn.Module):
    """x + W₃ lrelu(LN(W₀x + b₀)) + b₃, or x + x where there is no MLP.

    Args:
        dim: channels of x.
        mid: hidden channels; -1 means no MLP, which the authors' code computes as x + x.
    """

    def __init__(self, dim: int, mid: int) -> None:
        super().__init__()
        self.mid = mid
        if mid == -1:
            return
        self.first = nn.Linear(dim, mid)
        self.norm = nn.LayerNorm(mid)
        self.last = nn.Linear(mid, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.mid == -1:
            return x + x
        t = self.activated(self.first(x), self.norm)
        if torch.is_grad_enabled() or not one_pass(x) or not untouched(self.last, nn.Linear, x):
            return x + self.last(t)
        # The product adds itself to x and its bias: 8 bytes a channel instead of 10.
        out = x + self.last.bias
        out.flatten(0, -2).addmm_(t.flatten(0, -2), self.last.weight.t())
        return out

    @staticmethod
    def activated(t: Tensor, norm: nn.Module) -> Tensor:
        """lrelu(LN(t)); may be written over t."""
        if one_pass(t) and untouched(norm, nn.LayerNorm, t):
            assert isinstance(norm, nn.LayerNorm)
            return norm_leaky_relu(t, norm.weight, norm.bias, eps=norm.eps, slope=SLOPE)
        t = norm(t)
        # Not in place where there are gradients: checkpointing runs it twice. What stands for a
        # tensor, as in `bounded`, may be a view.
        alone = type(t) is Tensor and not torch.is_grad_enabled()
        return F.leaky_relu(t, SLOPE, inplace=alone)


class FeatureMap(nn.Module):
    """What LinFusion learns before the projections of a layer: one residual MLP each for q and k.

    A fresh one is the identity (its last Linear is zero) unless `projection_mid_dim` is -1.

    Args:
        dim: channels of the layer.
        projection_mid_dim: hidden channels of both MLPs; None means `dim`, -1 means no MLP.
    """

    def __init__(self, dim: int, projection_mid_dim: int | None = None) -> None:
        super().__init__()
        mid = dim if projection_mid_dim is None else projection_mid_dim
        if mid != -1 and mid < 1:
            raise ValueError(
                f"projection_mid_dim: got {projection_mid_dim}, expected None (= {dim}), -1 (no"
                " MLP) or a positive number of channels"
            )
        self.projection_mid_dim = projection_mid_dim
        self.map_q = ResidualMLP(dim, mid)
        self.map_k = ResidualMLP(dim, mid)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of `to_q` and `to_k`: [B, N, C] and [B, M, C]."""
        return self.map_q(x), self.map_k(context)
