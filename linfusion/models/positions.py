"""Where tokens of a video are, as learned tables along its three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Positions(nn.Module):
    """Learned positions, the sum of a table along each axis.

    Fresh, each holds sines and cosines in a third of the channels, so that axes can be told apart.

    Args:
        width: C, at least 6.
        sizes: rows of the tables along (t, h, w).
        block: frames of a block, where time is counted within it. None: from the first frame.
    """

    def __init__(self, width: int, sizes: Sequence[int], block: int | None = None) -> None:
        super().__init__()
        if width < 6:
            raise ValueError(f"width: got {width}, expected at least 6 channels")
        if block is not None and sizes[0] < 3 * block - 1:
            raise ValueError(
                f"pos_embed_size: got {sizes[0]} rows in time, expected at least {3 * block - 1}"
                f" for blocks of {block}"
            )
        self.sizes, self.block = tuple(sizes), block
        self.t, self.h, self.w = (
            nn.Parameter(_waves(size, width, axis)) for axis, size in enumerate(sizes)
        )

    def forward(
        self,
        grid: tuple[int, int, int],
        start: int,
        stretch: bool,
        blocks: Sequence[int] | None = None,
    ) -> Tensor:
        """[1, T·H·W, C].

        Args:
            grid: (T, H, W).
            start: the first frame; 0 with `stretch`.
            stretch: whether the table is interpolated to a longer clip, or that is refused.
            blocks: frames of each block, where time is counted within them.

        Raises:
            ValueError: the clip or a block is refused.
        """
        frames, height, width = grid
        end = start + frames
        if self.block is not None and blocks is not None:
            t = self.t[self._places(start, blocks, self.block)]
        elif end > len(self.t) and not stretch:
            raise ValueError(
                f"pos_embed_size: the model knows {len(self.t)} frames of tokens, got frame {end}"
            )
        else:
            t = _resized(self.t, frames) if end > len(self.t) else self.t[start:end]
        h, w = _resized(self.h, height), _resized(self.w, width)
        return (t[:, None, None] + h[:, None] + w).flatten(0, 2)[None]

    def _places(self, start: int, blocks: Sequence[int], block: int) -> list[int]:
        """A row for each frame: the first block from the front, later ones among the last rows."""
        rows: list[int] = []
        for frames in blocks:
            first = start == 0 and not rows
            room = 2 * block - 1 if first else block
            if frames > room:
                raise ValueError(
                    f"hidden_states: got {frames} frames of tokens in "
                    f"{'the first' if first else 'a later'} block, expected at most {room}"
                )
            rows += range(frames) if first else range(len(self.t) - block, len(self.t))[:frames]
        return rows


def _resized(table: Tensor, size: int) -> Tensor:
    """[n, C] -> [size, C], rows being the middles of cells of one extent."""
    if len(table) == size:
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).T[None]
    return F.interpolate(wide, size=size, mode="linear")[0].T.to(table.dtype)


def _waves(size: int, width: int, axis: int) -> Tensor:
    """[size, C], sines and cosines in the third of the channels that is the axis's own."""
    half = width // 6
    angles = torch.arange(size)[:, None] * 10000 ** (-torch.arange(half) / half)
    table = torch.zeros(size, width)
    table[:, 2 * half * axis : 2 * half * (axis + 1)] = torch.cat([angles.sin(), angles.cos()], 1)
    return table
