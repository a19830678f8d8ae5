"""Products that the tensor cores execute, against those that a kernel needs.

A product of an M × K by a K × N tile is shared out among the warps of a program by the layout of
its result. Where the warps laid along an axis reach further than the tile does, those beyond its
end start over: they repeat, for nothing, what other warps do. The compiler says in its last
layout-aware form (TTGIR) how the warps lie and how large an instruction is, so that is where the
products are counted: exactly, and before the instructions of one warp hide what the others do.

A tile that is wider than the head (72 columns in 128) is padding, not counted here: its products
are of a tile that was asked for.
"""

from __future__ import annotations

import math
import re

_LAYOUT = re.compile(r"^(#\w+) = #(?:ttg|ttng)\.(\w+)<\{(.*)\}>", re.M)
_TILE = r"tensor<(\d+)x(\d+)x\w+, (?:#ttg\.dot_op<\{[^}]*parent = )?(#\w+)"
_DOT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot) .*: (?:tensor|!ttg\.memdesc)<(\d+)x(\d+)x.*-> " + _TILE
)


def executed_for_each_needed(ttgir: str) -> float:
    """Multiply-adds of the tensor cores over those of the tiles' products, each product of the
    compiled code once; 1 without any.

    Raises:
        ValueError: a product whose layout is not one that this knows.
    """
    layouts = {name: (kind, text) for name, kind, text in _LAYOUT.findall(ttgir)}
    needed = executed = 0.0
    for line in ttgir.splitlines():
        if "tt.dot " not in line and "ttng.warp_group_dot " not in line:
            continue
        if not (found := _DOT.search(line)):
            raise ValueError(f"ttgir: a product that cannot be read: {line.strip()[:300]}")
        depth, rows, columns = int(found[2]), int(found[3]), int(found[4])
        kind, text = layouts[found[5]]
        if kind == "blocked":
            continue  # multiplied by the ordinary units
        products = depth * rows * columns
        needed += products
        executed += products * _repeated(kind, text, rows, columns)
    # One thread starts a tcgen05 product for the whole program: no warp can repeat it.
    return executed / needed if needed else 1.0


def _repeated(kind: str, text: str, rows: int, columns: int) -> float:
    """How often each element of a rows × columns result is computed."""
    if kind in ("nvidia_mma", "amd_mfma"):
        warps = _numbers("warpsPerCTA", text)
        instruction = _numbers("instrShape", text)
        sides = zip((rows, columns), warps, instruction[:2], strict=True)
        return math.prod(max(1.0, warp * step / side) for side, warp, step in sides)
    if kind == "amd_wmma":
        # A bit of the warp's number moves it by so many tiles of 16 × 16.
        moves = re.findall(r"\[(\d+), (\d+)\]", text[text.index("warp = ") :])
        idle = sum(
            (int(r), int(c)) == (0, 0) or int(r) * 16 >= rows or int(c) * 16 >= columns
            for r, c in moves
        )
        return 2.0**idle
    raise ValueError(f"ttgir: a product in a layout that is not known: {kind}<{text}>")


def _numbers(name: str, text: str) -> list[int]:
    if not (found := re.search(rf"\b{name} = \[([\d, ]+)\]", text)):
        raise ValueError(f"ttgir: no {name} in {text}")
    return [int(x) for x in found[1].split(",")]
