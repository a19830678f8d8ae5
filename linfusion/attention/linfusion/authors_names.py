"""The names of the tensors in the files of LinFusion's authors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    pass
from linfusion.attention.linfusion.feature_map import NAME

_MLP = {0: "first", 1: "norm", 3: "last"}  # place in the authors' Sequential -> our name


# One layer of the authors' checkpoints: their names -> ours, below `attn1`.
_NUMBERED = {
    **{f"to_{x}_.{i}.": f"{NAME}.map_{x}.{ours}." for x in "qk" for i, ours in _MLP.items()},
    **{f"to_{x}.": f"to_{x}." for x in "qkv"},
    "to_out.0.": "to_out.0.",
}


def from_numbered(name: str) -> str:
    """`to_q_.0.weight` of the authors' files -> `linfusion.map_q.first.weight`."""
    head, _, leaf = name.rpartition(".")
    return _NUMBERED[f"{head}."] + leaf


def to_numbered(name: str) -> str:
    head, _, leaf = name.rpartition(".")
    return {ours: theirs for theirs, ours in _NUMBERED.items()}[f"{head}."] + leaf


def numbered_layer(dim: int, inner_dim: int, mid: int | None, bias: bool) -> nn.Module:
    """Holder of the tensors of one layer under the authors' names."""

    def mlp() -> nn.Module:
        hidden = dim if mid is None else mid
        if hidden == -1:
            return nn.Identity()
        return nn.Sequential(
            nn.Linear(dim, hidden),
            nn.LayerNorm(hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, dim),
        )

    layer = nn.Module()
    for x in "qkv":
        layer.add_module(f"to_{x}", nn.Linear(dim, inner_dim, bias=bias))
    layer.to_out = nn.ModuleList([nn.Linear(inner_dim, dim), nn.Dropout(0.0)])
    layer.to_q_, layer.to_k_ = mlp(), mlp()
    return layer
