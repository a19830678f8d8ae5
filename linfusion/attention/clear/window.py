"""What an image token sees in CLEAR (Liu et al. 2024): its window, and pooled tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from linfusion.attention.grids.joint import refuse_undivided
from linfusion.kernels import window_attention

NAME = "clear"


@dataclass(frozen=True)
class Window:
    """What an image token of one layer sees, besides the text.

    Args:
        radius: tokens nearer than this, dy² + dx² < radius²; the authors trained 8, 16 and 32.
        down_factor: f > 1 adds the whole picture, with keys and values averaged over f by f tokens
            under learned weights; the authors trained 4. It has to divide height and width.
        proportional: scale scores by √(ln(length_factor·L) / ln(reference_tokens) / D) instead of
            √(1/D), L being the tokens of text and image: for pictures larger than in training.
        reference_tokens: tokens in training, for `proportional`: 64² + 512.
        length_factor: for `proportional`; None is the authors' 10 with pooling and 1 without.
        ntk: factor of the base of FLUX's rotary frequencies; the authors take 10 above 1024 px.

    Raises:
        ValueError: a value that is out of range.
    """

    radius: float = 8
    down_factor: int = 1
    proportional: bool = False
    reference_tokens: int = 4608
    length_factor: float | None = None
    ntk: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("radius", 0), ("reference_tokens", 1), ("ntk", 0), ("length_factor", 0)):
            value = getattr(self, name)
            if name == "length_factor" and value is None:
                continue
            if not _is_number(value) or not low < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected a number above {low}")
        if type(self.down_factor) is not int or self.down_factor < 1:
            raise ValueError(
                f"down_factor: got {self.down_factor!r}, expected 1 (no pooling) or a whole number"
                " above it"
            )
        if type(self.proportional) is not bool:
            raise ValueError(f"proportional: got {self.proportional!r}, expected True or False")

    def scale(self, tokens: int, head_dim: int) -> float:
        """Of the scores, where queries see text and image of `tokens` in all."""
        if not self.proportional:
            return head_dim**-0.5
        factor = self.length_factor or (10 if self.down_factor > 1 else 1)
        # One token has ln 1 = 0, and then no score matters.
        logarithm = max(math.log(factor * tokens), 0.0)
        return math.sqrt(logarithm / math.log(self.reference_tokens) / head_dim)


class Pool(nn.Linear):
    """Average of f by f tokens under learned weights, the same for all channels and heads.

    A Linear, so that offloading and casting treat it as one; fresh, it is the plain average.

    Args:
        factor: f.
    """

    def __init__(self, factor: int) -> None:
        super().__init__(factor * factor, 1, bias=False)
        self.factor = factor
        nn.init.constant_(self.weight, factor**-2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """[B, h·w, H, D], size (h, w) -> [B, h·w/f², H, D], summed in float32."""
        f = self.factor
        x = x.unflatten(1, (size[0] // f, f, size[1] // f, f))
        weight = self.weight.float().view(f, f)
        total: Tensor | None = None
        for row in range(f):  # one f²-th of the tokens at a time: no float32 copy of them all
            for column in range(f):
                part = x[:, :, row, :, column].float() * weight[row, column]
                total = part if total is None else total + part
        assert total is not None
        return total.flatten(1, 2).to(x.dtype)


class LocalWindow(nn.Module):
    """What hangs on a layer as `attn.clear`: its window, and with pooling the learned weights.

    It is the form of a layer of hosts whose own processor runs.

    Args:
        setting: fields of a `Window`.
    """

    def __init__(self, setting: Mapping[str, Any]) -> None:
        super().__init__()
        names = {field.name for field in fields(Window)}
        if not isinstance(setting, Mapping) or not set(setting) <= names:
            raise ValueError(f"window: got {setting!r}, expected some of {sorted(names)} by name")
        self.window = Window(**setting)
        self.pool = Pool(self.window.down_factor) if self.window.down_factor > 1 else None

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
            context: keys and values [B, T, H, D] of all other tokens.
            scale: of the scores; None is D^-½.

        Returns:
            [B, N, H, D].

        Raises:
            ValueError: `down_factor` does not divide height and width.
        """
        scale = q.shape[3] ** -0.5 if scale is None else scale
        if self.window.proportional:
            tokens = k.shape[1] + (0 if context is None else context[0].shape[1])
            scale = scale * math.sqrt(q.shape[3]) * self.window.scale(tokens, q.shape[3])
        pooled = None
        if self.pool is not None:
            refuse_undivided(self.window.down_factor, (grid[-2:],))
            size = (math.prod(grid[:-1]), grid[-1])  # frames under one another
            pooled = self.pool(k, size), self.pool(v, size)
        out: Tensor = window_attention(
            q,
            k,
            v,
            grid=grid,  # type: ignore[arg-type]
            radius=self.window.radius,
            context=context,
            pooled=pooled,
            scale=scale,
        )
        return out


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
