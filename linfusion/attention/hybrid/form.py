"""What a token sees near, and what sums up the rest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from linfusion.attention.hybrid.features import KINDS, FeatureMap, fresh_map
from linfusion.kernels import hybrid_attention, window_attention
from linfusion.kernels.hybrid_attention.parts import join, state_of
from linfusion.kernels.window_attention import pool
from linfusion.kernels.window_attention.arguments import implementation

NAME = "hybrid"


@dataclass(frozen=True)
class Rest:
    """A window, and what stands for the tokens that it does not see.

    Args:
        window: tokens nearer than this are seen as softmax sees them, dt² + dy² + dx² < window².
        cell: side of the cells of tokens that are averaged, and enter the softmax with the number
            of their tokens that the window does not see; 0 is no cells. It need not divide the
            grid. Their cost is that of softmax over 1/cell² of the tokens of a picture, 1/cell³ of
            a video.
        maps: whether keys and values of cells are corrected by a learned map of each head; fresh,
            it is no correction.
        features: None, or the map of a linear state that sums up what the window does not see, one
            of "elu1", "hedgehog", "poly2", whose weight in each head is learned. With cells it
            starts at next to nothing.

    Raises:
        ValueError: a value that is out of range.
    """

    window: float = 8
    cell: int = 4
    maps: bool = False
    features: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.window, int | float) and not isinstance(self.window, bool)
        if not number or not 0 < self.window < math.inf:
            raise ValueError(f"window: got {self.window!r}, expected a number of tokens above 0")
        if type(self.cell) is not int or self.cell < 0 or self.cell == 1:
            raise ValueError(f"cell: got {self.cell!r}, expected 0 (no cells), 2, 3, ...")
        if type(self.maps) is not bool:
            raise ValueError(f"maps: got {self.maps!r}, expected True or False")
        if self.maps and self.cell == 0:
            raise ValueError("maps: got True without cells, whose keys and values they are for")
        if self.features is not None and self.features not in KINDS:
            raise ValueError(f"features: got {self.features!r}, expected None or one of {KINDS}")
        if self.cell == 0 and self.features is None:
            raise ValueError(
                'cell: got 0 without features: nothing sums up the rest; method "clear" is windows'
                " alone"
            )


class Summarised(nn.Module):
    """What hangs on a layer as `attn.hybrid`: near exactly, the rest summed up.

    Args:
        heads, head_dim: of the queries of the layer.
        setting: fields of a `Rest`.
    """

    def __init__(self, heads: int, head_dim: int, setting: Mapping[str, Any]) -> None:
        super().__init__()
        names = {field.name for field in fields(Rest)}
        if not isinstance(setting, Mapping) or not set(setting) <= names:
            raise ValueError(f"rest: got {setting!r}, expected some of {sorted(names)} by name")
        self.rest = Rest(**setting)
        self.map_k = self.map_v = None
        if self.rest.maps:
            self.map_k, self.map_v = (fresh_map(heads, head_dim) for _ in range(2))
        self.phi_q = self.phi_k = self.log_weight = None
        if self.rest.features is not None:
            self.phi_q = FeatureMap(self.rest.features, heads, head_dim)
            self.phi_k = FeatureMap(self.rest.features, heads, head_dim)
            # A Linear of one input, so that offloading and casting treat it as one.
            self.log_weight = nn.Linear(1, heads, bias=False)
            nn.init.constant_(self.log_weight.weight, 0.0 if self.rest.cell == 0 else -6.0)

    def keys(self, grid: tuple[int, ...]) -> float:
        """Keys, or what costs as much, of a query of a picture or video of `grid`, but for text."""
        rest = self.rest
        count = min(float(math.prod(grid)), window_keys(rest.window, len(grid)))
        if rest.cell:
            count += math.prod(-(-side // rest.cell) for side in grid)
        if self.phi_q is not None:  # a state of F by D is made and read
            count += self.phi_q.count
        return count

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: tuple[int, ...],
        context: tuple[Tensor, Tensor] | None,
        scale: float | None,
    ) -> Tensor:
        """Attention of the tokens of one picture or video.

        Args:
            q, k, v: [B, N, H, D], N tokens of `grid` in raster order.
            grid: (h, w) or (t, h, w).
            context: keys and values [B, T, H, D] of all other tokens, seen exactly.
            scale: of the scores; None is D^-½.

        Returns:
            [B, N, H, D].
        """
        size: Any = grid
        near: dict[str, Any] = {"grid": size, "radius": self.rest.window, "scale": scale}
        near["context"] = context
        if self.rest.cell:
            cells = (self.rest.cell,) * len(grid)
            pooled = pool(k, grid, cells), pool(v, grid, cells)
            if self.map_k is not None and self.map_v is not None:
                pooled = pooled[0] + self.map_k(pooled[0]), pooled[1] + self.map_v(pooled[1])
            near |= {"cells": cells, "pooled": pooled}
        out: Any
        if self.phi_q is None or self.phi_k is None or self.log_weight is None:
            out = window_attention(q, k, v, **near)
            return out
        # Features are of queries and keys whose product is the score.
        root = math.sqrt(q.shape[3] ** -0.5 if scale is None else scale)
        phi_q, phi_k = self.phi_q(q * root), self.phi_k(k * root)
        log_weight = self.log_weight(q.new_ones(1))
        if not self.rest.cell:
            out = hybrid_attention(q, k, v, phi_q, phi_k, log_weight=log_weight, **near)
            return out
        # The state is of all tokens, as cells have counted those that are far already: it learns
        # what they miss.
        o, lse = window_attention(q, k, v, **near, return_lse=True)
        impl = implementation(None, q)
        out, _ = join(
            (o, lse), phi_q, phi_q, state_of(phi_k, phi_k, v, impl), log_weight, None, impl
        )
        return out


def window_keys(radius: float, axes: int) -> float:
    """Tokens nearer than `radius` on a grid without borders."""
    last = math.ceil(radius) - 1
    steps = range(-last, last + 1)
    return float(
        sum(sum(x * x for x in at) < radius**2 for at in itertools.product(steps, repeat=axes))
    )
