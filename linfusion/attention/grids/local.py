"""The rows of a picture or video that one of several ranks has, in the place of its grid."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SHARED = "_linfusion_parallel"  # on a model whose rows are shared, what `linfusion.parallel` put


class LocalGrid(tuple[int, ...]):
    """The grid of this rank's tokens, which also knows whose the other rows are.

    It travels where a grid does, with the arguments of blocks.

    Args:
        sizes: (h, w) or (t, h, w) of the tokens that are here.
        shard: `linfusion.parallel.Shard` of the whole grid.
    """

    shard: Any

    def __new__(cls, sizes: Iterable[int], shard: Any) -> LocalGrid:
        grid = super().__new__(cls, sizes)
        grid.shard = shard
        return grid
