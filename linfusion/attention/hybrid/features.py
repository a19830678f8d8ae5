"""Feature maps of the linear part: φ(q)·φ(k) in the place of exp(q·k), a map of each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("elu1", "hedgehog", "poly2")


class PerHead(nn.Module):
    """A linear map of each head, as a grouped convolution over tokens.

    Args:
        heads: H.
        inputs, outputs: channels of a head.
        bias: whether it has one.
    """

    def __init__(self, heads: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(heads * inputs, heads * outputs, 1, groups=heads, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, F]."""
        out: Tensor = self.conv(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return out.unflatten(2, (x.shape[2], -1))


def fresh_map(heads: int, channels: int) -> PerHead:
    """A linear map of each head that gives zero until it is trained."""
    made = PerHead(heads, channels, channels)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


class FeatureMap(nn.Module):
    """φ, which is never negative.

    "elu1" is elu(x) + 1 and learns nothing. "hedgehog" is softmax([W x, -W x]) (Zhang et al. 2024,
    arXiv:2402.04347), fresh with W = 1. "poly2" is [softplus(ψ₁(x)), ψ₂(x)²] with two layers each,
    as Attention Surgery has polynomials of degree 2 (arXiv:2509.24899).

    Args:
        kind: one of `KINDS`.
        heads: H.
        head_dim: D, channels of x and of each half of the features.
    """

    def __init__(self, kind: str, heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.count = head_dim if kind == "elu1" else 2 * head_dim
        if kind == "hedgehog":
            self.map = PerHead(heads, head_dim, head_dim)
            with torch.no_grad():
                eye = torch.eye(head_dim).repeat(heads, 1)[:, :, None]
                self.map.conv.weight.copy_(eye)
                assert self.map.conv.bias is not None
                self.map.conv.bias.zero_()
        elif kind == "poly2":
            self.first = nn.ModuleList(PerHead(heads, head_dim, head_dim) for _ in range(2))
            self.second = nn.ModuleList(PerHead(heads, head_dim, head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, F], in the dtype of `x`."""
        if self.kind == "elu1":
            # exp for the negative half: elu(x) + 1 has no small numbers in half precision.
            x32 = x.float()
            return torch.where(x32 > 0, x32 + 1, x32.clamp(max=0).exp()).to(x.dtype)
        if self.kind == "hedgehog":
            mapped = self.map(x).float()
            return torch.cat([mapped, -mapped], -1).softmax(-1).to(x.dtype)
        one, two = (
            second(F.gelu(first(x))).float()
            for first, second in zip(self.first, self.second, strict=True)
        )
        return torch.cat([F.softplus(one), two.square()], -1).to(x.dtype)
