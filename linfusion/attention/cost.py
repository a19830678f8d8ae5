"""What attention costs on a GPU by the bytes it moves and the products it takes: a roofline.

Computed, never measured. A pass over memory takes the time of its bytes or that of its products,
whichever is longer, at the part of the card's peak that its kind of kernel is assumed to reach
(`Card.reached`); a layer is its passes one after another. Python, launches and caches are left out:
at few tokens they decide, and a layer of 15 launches loses then to one of 6.

Counted is what a layer does besides the projections that it has either way. Numbers are bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

_BYTES = 2  # of a number

# Elementwise bytes a token and channel, of operators of PyTorch one after another. LinFusion's two
# maps: LayerNorm and leaky ReLU read and write (8 a map), the residual reads two and writes (6).
LINFUSION_ELEMENTWISE = 28.0
# The same where the library's kernels run: norm and activation are one pass (4 a map), and the last
# product adds itself to x and its bias (6 a map).
LINFUSION_ONE_PASS = 20.0
# MATE around its scan: convolution, gates, norms, turning and joining of directions.
MATE_ELEMENTWISE = 395.0
# The same where the library's kernels run.
MATE_ONE_PASS = 101.0
# Rotary embedding of queries and keys as diffusers writes it, an element of either.
ROTARY_ELEMENTWISE = 54.0


class Card(NamedTuple):
    """A GPU.

    Attributes:
        bandwidth: bytes a second, at most.
        flops: of bfloat16 products summed in float32, without sparsity, a second, at most.
        reached: kind of kernel -> the part of the peak that it is assumed to reach. "stream" is one
            of ours that reads and writes once, "elementwise" an operator of PyTorch, "gemm" a
            product of matrices, "softmax 64" and "softmax 128" FlashAttention with heads of up to
            64 and up to 128 columns.
    """

    name: str
    bandwidth: float
    flops: float
    reached: dict[str, float]


_REACHED = {"stream": 0.9, "elementwise": 2 / 3, "gemm": 0.7}
# Peaks: NVIDIA, H100 Tensor Core GPU data sheet (SXM: 3.35 TB/s, 989 TFLOPS dense) and Ada GPU
# architecture white paper (RTX 4090: 1,008 GB/s, 165.2 TFLOPS with float32 sums). FlashAttention-3
# is published at 497 and 648 TFLOPS for 64 and 128 columns on an H100 (Shah et al. 2024, forward,
# 16k tokens): 0.50 and 0.66. Of 64 columns more is assumed, so that softmax is not painted slow.
H100 = Card("H100", 3.35e12, 989e12, {**_REACHED, "softmax 64": 0.60, "softmax 128": 0.66})
RTX_4090 = Card(
    "RTX 4090", 1.008e12, 165.2e12, {**_REACHED, "softmax 64": 0.85, "softmax 128": 0.9}
)
CARDS = (H100, RTX_4090)


class Pass(NamedTuple):
    """One sweep over memory: what it moves, what it multiplies, what kind of kernel does it."""

    kind: str
    bytes: float
    flops: float = 0.0

    def seconds(self, card: Card) -> float:
        """By the slower of both on this card."""
        return max(self.bytes / card.bandwidth, self.flops / card.flops) / card.reached[self.kind]


def seconds(passes: Iterable[Pass], card: Card) -> float:
    """One pass after another."""
    return sum(one.seconds(card) for one in passes)


def softmax(
    batch: int, queries: int, heads: int, head_dim: int, keys: float | None = None
) -> list[Pass]:
    """Attention of `queries` to `keys` tokens each (None: as many), head_dim at most 128.

    4·N·M·D multiply-adds twice a head, with columns padded to 64 or 128 as kernels do.
    """
    if not 0 < head_dim <= 128:
        raise ValueError(f"head_dim: got {head_dim}; expected 1 to 128")
    padded = 64 if head_dim <= 64 else 128
    keys = queries if keys is None else keys
    moved = _BYTES * batch * heads * head_dim * 4 * queries
    return [Pass(f"softmax {padded}", moved, 4 * batch * heads * queries * keys * padded)]


def softmax_of_any(tokens: int, heads: int, head_dim: int, keys: float | None = None) -> list[Pass]:
    """The same for heads of any width: those above 128 columns are counted as several."""
    parts = math.ceil(head_dim / 128)
    return softmax(1, tokens, heads * parts, math.ceil(head_dim / parts), keys)


def linfusion(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    mid: int | None = None,
    elementwise: float = LINFUSION_ELEMENTWISE,
) -> list[Pass]:
    """A LinFusion layer: the linear core, the products of its two maps, their elementwise sweeps.

    Args:
        mid: hidden channels of the maps, as in `projection_mid_dim`: None is the layer's, -1 none.
        elementwise: bytes a token and channel.
    """
    channels = heads * head_dim
    numbers = batch * tokens * channels
    core = Pass("stream", 4 * _BYTES * numbers, 4 * numbers * head_dim)  # reads q, k, v; writes o
    if mid == -1:
        return [core, Pass("elementwise", 2 * 2 * _BYTES * numbers)]  # x + x, twice
    hidden = channels if mid is None else mid
    # Two maps of two products each; each reads its input and writes its output.
    products = Pass("gemm", 4 * _BYTES * batch * tokens * (channels + hidden), 8 * numbers * hidden)
    return [core, products, Pass("elementwise", elementwise * numbers)]


def window(
    batch: int,
    grid: tuple[int, int],
    radius: float,
    heads: int,
    head_dim: int,
    text: int = 0,
) -> list[Pass]:
    """A layer in CLEAR's window: pixels see their window and the text, text sees everything.

    At the rate of FlashAttention, which no window reaches.
    """
    tokens = grid[0] * grid[1]
    passes = softmax(batch, tokens, heads, head_dim, keys_visited(grid, radius) + text)
    return passes + (softmax(batch, text, heads, head_dim, tokens + text) if text else [])


def rotary(batch: int, tokens: int, heads: int, head_dim: int) -> list[Pass]:
    """Rotary embedding of queries and keys, which softmax has as well."""
    return [Pass("elementwise", ROTARY_ELEMENTWISE * 2 * batch * tokens * heads * head_dim)]


def keys_visited(grid: tuple[int, int], radius: float, tile: int = 8) -> float:
    """Keys in the tiles that a tile of queries touches, on average over a grid of whole tiles.

    A disc sees a pixel at a distance below the radius (CLEAR, eq. 5); a kernel takes the whole tile
    if any of its pixels is seen from any of the queries.
    """
    rows, columns = (side // tile for side in grid)
    if min(rows, columns) < 1 or grid != (rows * tile, columns * tile):
        raise ValueError(f"grid: got {grid}; expected multiples of the tile, {tile}")
    reach = math.ceil(radius / tile)
    pairs = 0
    for dy in range(-min(reach, rows - 1), min(reach, rows - 1) + 1):
        for dx in range(-min(reach, columns - 1), min(reach, columns - 1) + 1):
            gaps = (max(0, (abs(step) - 1) * tile + 1) for step in (dy, dx))
            if sum(gap * gap for gap in gaps) < radius * radius:
                pairs += (rows - abs(dy)) * (columns - abs(dx))
    return pairs * tile * tile / (rows * columns)


def scan(
    batch: int, tokens: int, heads: int, channels: int, features: int, chunk: int, groups: int = 1
) -> list[Pass]:
    """A state-space scan in chunks (Dao & Gu 2024, §6): sums, states, their pass, what reads them.

    Values are read twice and written once; a state a chunk, in float32, is written, passed on (read
    and written) and read.
    """
    positions = batch * tokens * heads
    states = 4 * 4 * batch * math.ceil(tokens / chunk) * heads * channels * features
    values = 3 * _BYTES * positions * channels
    keys = 4 * _BYTES * batch * tokens * groups * features
    steps = 6 * 4 * positions  # float32 steps and their sums
    within = 2 * min(chunk, tokens) * (features + channels)
    flops = positions * (within + 4 * channels * features)
    return [Pass("stream", values + keys + steps + states, flops)]


def mate(
    batch: int,
    tokens: int,
    heads: int,
    channels: int,
    features: int,
    chunk: int,
    elementwise: float = MATE_ELEMENTWISE,
) -> list[Pass]:
    """A MATE branch: its scan, and what surrounds it."""
    around = Pass("elementwise", elementwise * batch * tokens * heads * channels)
    return [*scan(batch, tokens, heads, channels, features, chunk), around]


def break_even_tokens(
    card: Card,
    heads: int,
    head_dim: int,
    mid: int | None = None,
    elementwise: float = LINFUSION_ELEMENTWISE,
) -> int:
    """Tokens from which on a LinFusion layer takes less time than softmax, by this model.

    Heads wider than 128 columns, which FlashAttention does not take at this rate, are counted as
    several of 128 or fewer.
    """
    parts = math.ceil(head_dim / 128)
    columns = math.ceil(head_dim / parts)
    many = 1 << 20  # one grows with the tokens, the other with their square
    linear = seconds(linfusion(1, many, heads, head_dim, mid, elementwise), card) / many
    square = seconds(softmax(1, many, heads * parts, columns), card) / many**2
    return math.ceil(linear / square)
