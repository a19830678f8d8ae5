"""Matrix instructions: `mma.sync` of a warp and `wgmma` of four.

Operands are multiplied as tensor cores do, bf16 and f16 exactly and TF32 without its low 13 bits,
and summed in float32. Where the elements of a fragment are is said by the PTX manual: a register of
a warp's 32 threads holds 8 rows, four threads a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.numbers import TYPES, Array, f4, i8, u2, u4
from benchmarks.ptx.operands import Operands, Read, Step
from benchmarks.ptx.parse import Statement
from benchmarks.ptx.shared import descriptor

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas

_INPUTS = ("bf16", "f16", "tf32")


def _quarter(bits: Array, type_: str) -> Array:
    """One register of an operand: [warps, 8, elements of a row]."""
    if type_ == "tf32":
        return TYPES[type_].values(bits).reshape(-1, 8, 4)
    return TYPES[type_].values(np.ascontiguousarray(bits).view(u2)).reshape(-1, 8, 8)


def _left(registers: list[Array], type_: str) -> Array:
    """The registers of a row-major operand [warps, 16, k]: first the rows, then the columns."""
    parts = [_quarter(bits, type_) for bits in registers]
    columns = [np.concatenate(parts[i : i + 2], 1) for i in range(0, len(parts), 2)]
    return np.concatenate(columns, 2)


def _right(registers: list[Array], type_: str) -> Array:
    """The registers of a column-major operand, transposed: [warps, 8, k]."""
    return np.concatenate([_quarter(bits, type_) for bits in registers], 2)


def _to_matrix(registers: list[Array]) -> Array:
    """Four registers for each 8 columns of a result: [warps, 16, columns]."""
    x = np.stack([bits.view(f4) for bits in registers])
    x = x.reshape(
        -1, 2, 2, x.shape[1] // 32, 8, 4
    )  # block, half of rows, column, warp, row, thread
    return x.transpose(3, 1, 4, 0, 5, 2).reshape(x.shape[3], 16, -1)


def _to_registers(matrix: Array) -> list[Array]:
    """The reverse."""
    warps, _, columns = matrix.shape
    x = matrix.astype(f4, copy=False).reshape(warps, 2, 8, columns // 8, 4, 2)
    x = x.transpose(3, 1, 5, 0, 2, 4).reshape(columns // 2, warps * 32)
    return list(np.ascontiguousarray(x).view(u4))


def _all(reads: list[Read], g: Ctas) -> list[Array]:
    return [np.broadcast_to(x(g), g.lanes) for x in reads]


def multiply(o: Operands) -> Step:
    """`mma.sync.aligned.m16n8k*.row.col`: d = a·b + c."""
    s = o.statement
    *_, shape, rows, columns, _, type_, _, to = s.modifiers
    if not shape.startswith("m16n8k") or (rows, columns, to) != ("row", "col", "f32"):
        raise NotImplementedError("a product of another form")
    if type_ not in _INPUTS or o.predicate is not None:
        raise NotImplementedError("a product of another type")
    a, b, c = ([o.bits(name, 32) for name in o.vector(i)] for i in (1, 2, 3))
    writes = [o.write(name) for name in o.vector(0)]

    def step(g: Ctas) -> None:
        left, right = _left(_all(a, g), type_), _right(_all(b, g), type_)
        result = np.matmul(left, right.transpose(0, 2, 1)) + _to_matrix(_all(c, g))
        for write, bits in zip(writes, _to_registers(result), strict=True):
            write(g, bits)

    return step


def warpgroup(o: Operands) -> Step:
    """The family of `wgmma`."""
    s = o.statement
    match s.modifiers[0]:
        case "commit_group":
            return lambda g: g.shared.commit_reads()
        case "wait_group":
            left = int(s.operands[0], 0)
            return lambda g: g.shared.wait_reads(left)
        case "fence":
            return lambda g: None
        case "mma_async":
            return _warpgroup_product(o)
    raise NotImplementedError("another one of the family")


def _warpgroup_product(o: Operands) -> Step:
    """d = a·b + d, or a·b where the scale is 0; of an async product the result is there at once.

    `wgmma_registers` in `benchmarks.ptx.program` looks for what touches it too early.
    """
    s = o.statement
    shape = next(re.fullmatch(r"m64n(\d+)k(\d+)", m) for m in s.modifiers if m.startswith("m64"))
    if shape is None:
        raise NotImplementedError("a shape of another form")
    columns, depth, type_ = int(shape[1]), int(shape[2]), s.modifiers[-1]
    if type_ not in _INPUTS:
        raise NotImplementedError("a product of another type")
    size = 4 if type_ == "tf32" else 2
    *signs, transposed_a, transposed_b = [int(x, 0) for x in s.operands[4:]] + (
        [0, 0] if len(s.operands) == 6 else []
    )
    in_registers = s.operands[1].startswith("{")
    if in_registers and len(signs) == 1:  # only b can be transposed then
        signs, transposed_a = [*signs, transposed_a], 0
    if signs != [1, 1]:
        raise NotImplementedError("an operand whose sign is changed")
    names = o.vector(0)
    old, writes = [o.maybe(name) for name in names], [o.write(name) for name in names]
    a = [o.bits(x, 32) for x in o.vector(1)] if in_registers else [o.bits(s.operands[1], 64)]
    b, scale = o.bits(s.operands[2], 64), o.bits(s.operands[3], 1)

    def step(g: Ctas) -> None:
        if in_registers:
            left = _left(_all(a, g), type_).reshape(-1, 64, depth)
        else:
            left = _from_shared(g, s, a[0](g), 64, depth, bool(transposed_a), type_, size)
        right = _from_shared(g, s, b(g), columns, depth, bool(transposed_b), type_, size)
        result = np.matmul(left, right.transpose(0, 2, 1)).reshape(-1, 16, columns)
        keep = np.broadcast_to(scale(g), g.lanes).reshape(-1, 32)[:, :1, None]
        result = np.where(keep, result + _to_matrix(_all(old, g)), result)
        for write, bits in zip(writes, _to_registers(result), strict=True):
            write(g, bits)

    return step


def _from_shared(
    g: Ctas,
    s: Statement,
    bits: Array,
    rows: int,
    depth: int,
    transposed: bool,
    type_: str,
    size: int,
) -> Array:
    """The operand [warpgroups, rows, depth] that a descriptor shows, in its canonical layout.

    Elements lie in lines of a swizzle's width, eight lines an atom. Along the depth an operand that
    is not transposed fits in a line, and a stride leads to the next eight rows. One that is
    transposed has its rows along a line and its depth across lines: the leading offset leads to the
    next line of rows, the stride to the next eight of the depth.
    """
    groups = np.broadcast_to(bits, g.lanes).reshape(-1, 128)
    if (groups != groups[:, :1]).any():
        g.shared.faults.add("divergent", s, 1, "a descriptor that differs in a warpgroup")
    start, leading, stride, width = (
        x if isinstance(x, int) else x[:, None, None] for x in descriptor(groups[:, 0])
    )
    row, k = np.arange(rows, dtype=i8)[:, None], np.arange(depth, dtype=i8)[None, :]
    if transposed:
        if size != 2:
            raise NotImplementedError("a transposed operand of TF32")
        line = width // size
        within = k % 8 * width + row % line * size
        offsets = start + within + k // 8 * stride + row // line * leading
    else:
        offsets = start + row % 8 * width + k * size + row // 8 * stride
    # The swizzle exchanges pieces of 16 bytes of a line, by the number of the line in its atom.
    offsets = offsets ^ ((offsets >> 7 & (width // 16 - 1)) << 4)
    places = g.shared.operand(g, s, offsets, size)
    values = g.shared.data.view(u2 if size == 2 else u4)[places // size]
    return TYPES[type_].values(values)


BUILDERS: dict[str, Callable[[Operands], Step]] = {"mma": multiply, "wgmma": warpgroup}
