"""Rotary Major Scan (Wang et al. 2024, LinGen, arXiv:2412.09856): another order in every layer.

A scan has neighbours along one axis only. Layers take turns, so that each axis is the fastest
somewhere. An order is a view with its axes permuted: no index, no gather. The paper names four
orders but does not give their axes; what is here is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Spatial rows, spatial columns, temporal rows, temporal columns; slowest axis first.
ORDERS = ("thw", "twh", "hwt", "wht")


@dataclass(frozen=True)
class RotaryMajorScan:
    """Which order the tokens of a layer are scanned in.

    Args:
        orders: axes from the slowest to the fastest, any permutations of "thw"; layer l takes the
            one at l modulo their number.

    Raises:
        ValueError: there are none, or one is no permutation.
    """

    orders: tuple[str, ...] = ORDERS

    def __post_init__(self) -> None:
        wrong = [order for order in self.orders if sorted(order) != sorted("thw")]
        if isinstance(self.orders, str) or not self.orders or wrong:
            raise ValueError(
                f"orders: got {self.orders!r}, expected at least one permutation of 'thw'"
            )

    def for_layer(self, layer: int) -> str:
        """The order of a layer, counted from 0."""
        return self.orders[layer % len(self.orders)]


def flatten(x: Tensor, order: str) -> Tensor:
    """[B, T, H, W, C] as the sequence [B, T·H·W, C] in that order; a view for "thw"."""
    return x.permute(0, *(1 + "thw".index(axis) for axis in order), 4).flatten(1, 3)


def unflatten(sequence: Tensor, grid: tuple[int, int, int], order: str) -> Tensor:
    """What `flatten` undoes: [B, T·H·W, C] in that order as a view [B, T, H, W, C].

    Raises:
        ValueError: the grid has another number of tokens.
    """
    frames, height, width = grid
    if sequence.shape[1] != frames * height * width:
        raise ValueError(f"grid: got {tuple(grid)} for {sequence.shape[1]} tokens")
    x = sequence.unflatten(1, tuple(grid["thw".index(axis)] for axis in order))
    return x.permute(0, *(1 + order.index(axis) for axis in "thw"), 4)
