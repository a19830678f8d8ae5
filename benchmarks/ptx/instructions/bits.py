"""Logic, shifts and permutations of bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.numbers import TYPES, UNSIGNED, Array, i4, i8, u4, u8
from benchmarks.ptx.operands import Operands, Step

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas

_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


def logic(o: Operands) -> Step:
    """Of bits or of predicates."""
    s = o.statement
    width, function = TYPES[s.modifiers[-1]].bits, _LOGIC[s.kind]
    read, write = [o.bits(x, width) for x in s.operands[1:]], o.write(s.operands[0])
    return lambda g: write(g, function(*(x(g) for x in read)))


def shift(o: Operands) -> Step:
    """`shl`, `shr`: an amount of the width or more shifts everything out."""
    s = o.statement
    type_ = s.modifiers[-1]
    bits = TYPES[type_].bits
    x, amount = o.values(s.operands[1], type_), o.bits(s.operands[2], 32)
    write, left, signed = o.result(s.operands[0], type_), s.kind == "shl", type_[0] == "s"

    def step(g: Ctas) -> None:
        value, by = x(g), amount(g)
        within = np.minimum(by, by.dtype.type(bits - 1)).astype(value.dtype)
        moved = value << within if left else value >> within
        write(g, moved if signed and not left else np.where(by < bits, moved, 0))

    return step


def funnel(o: Operands) -> Step:
    """`shf.l` and `shf.r`, wrapping: 32 of the 64 bits of two registers."""
    s = o.statement
    direction, mode, _ = s.modifiers
    if mode != "wrap":
        raise NotImplementedError("a funnel that clamps")
    low, high, amount = (o.bits(x, 32) for x in s.operands[1:4])
    write = o.write(s.operands[0])

    def step(g: Ctas) -> None:
        both = (high(g).astype(u8) << u8(32)) | low(g).astype(u8)
        by = (amount(g) & u4(31)).astype(u8)
        write(g, (both << by) >> u8(32) if direction == "l" else (both >> by) & u8(0xFFFF_FFFF))

    return step


def extract(o: Operands) -> Step:
    """`bfe`: some bits out of the middle, extended with zeros or the sign."""
    s = o.statement
    position, length = int(s.operands[2], 0), int(s.operands[3], 0)
    x, write = o.bits(s.operands[1], 32), o.write(s.operands[0])
    if s.modifiers == ("u32",):
        return lambda g: write(g, (x(g) >> u4(position)) & u4((1 << length) - 1))
    if s.modifiers == ("s32",):
        up, down = i4(32 - position - length), i4(32 - length)
        return lambda g: write(g, ((x(g).view(i4) << up) >> down).view(u4))
    raise NotImplementedError("bits of another type")


def insert(o: Operands) -> Step:
    """`bfi`: some bits into the middle."""
    s = o.statement
    width = TYPES[s.modifiers[-1]].bits
    position, length = int(s.operands[3], 0), int(s.operands[4], 0)
    unsigned = UNSIGNED[width]
    field = unsigned(((1 << length) - 1) << position)
    x, into = (o.bits(v, width) for v in s.operands[1:3])
    write = o.write(s.operands[0])
    return lambda g: write(g, ((x(g) << unsigned(position)) & field) | (into(g) & ~field))


def permute(o: Operands) -> Step:
    """`prmt`: four bytes out of eight, each named by four bits; the highest repeats the sign."""
    s = o.statement
    if s.modifiers != ("b32",):
        raise NotImplementedError("a mode of its own")
    a, b, select = (o.bits(x, 32) for x in s.operands[1:4])
    write = o.write(s.operands[0])

    def step(g: Ctas) -> None:
        x, y, names = np.broadcast_arrays(a(g), b(g), select(g))
        eight = np.stack([(half >> u4(8 * i)) & u4(255) for half in (x, y) for i in range(4)])
        result = np.zeros(len(x), u4)
        for i in range(4):
            name = (names >> u4(4 * i)) & u4(15)
            byte = np.take_along_axis(eight, (name & u4(7)).astype(i8)[None], 0)[0]
            sign = np.where(byte & u4(128), u4(255), u4(0))
            result |= np.where(name & u4(8), sign, byte) << u4(8 * i)
        write(g, result)

    return step


def any_logic(o: Operands) -> Step:
    """`lop3`: a function of three bits, given by its table."""
    s = o.statement
    table = int(s.operands[4], 0)
    read, write = [o.bits(x, 32) for x in s.operands[1:4]], o.write(s.operands[0])

    def step(g: Ctas) -> None:
        inputs = np.broadcast_arrays(*(x(g) for x in read))
        result = np.zeros(len(inputs[0]), u4)
        for row in range(8):
            if table >> row & 1:
                term = np.full(len(result), 0xFFFF_FFFF, u4)
                for x, bit in zip(inputs, (row >> 2, row >> 1 & 1, row & 1), strict=True):
                    term &= x if bit else ~x
                result |= term
        write(g, result)

    return step


BUILDERS: dict[str, Callable[[Operands], Step]] = {
    **dict.fromkeys(_LOGIC, logic),
    "shl": shift,
    "shr": shift,
    "shf": funnel,
    "bfe": extract,
    "bfi": insert,
    "prmt": permute,
    "lop3": any_logic,
}
