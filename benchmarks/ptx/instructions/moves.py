"""Moves between registers and threads, and conversions from type to type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.numbers import TYPES, UNSIGNED, Array, f4, f8, i8
from benchmarks.ptx.operands import Operands, Step

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas


def move(o: Operands) -> Step:
    """A register, a constant, parts put together or taken apart."""
    s = o.statement
    width = TYPES[s.modifiers[-1]].bits
    target, source = s.operands
    if source.startswith("{"):
        return _put_together(o, width)
    if target.startswith("{"):
        return _take_apart(o, width)
    read, write = o.bits(source, width), o.write(target)
    return lambda g: write(g, read(g))


def _put_together(o: Operands, width: int) -> Step:
    # LLVM leaves a part that nobody reads unwritten.
    parts = [o.maybe(x) if x.startswith("%") else o.bits(x, width) for x in o.vector(1)]
    whole, step_bits = UNSIGNED[width], width // len(parts)
    write = o.write(o.text(0))

    def step(g: Ctas) -> None:
        result = np.zeros(1, whole)
        for i, part in enumerate(parts):
            result = result | (part(g).astype(whole) << whole(i * step_bits))
        write(g, result)

    return step


def _take_apart(o: Operands, width: int) -> Step:
    names = o.vector(0)
    whole, part_bits = UNSIGNED[width], width // len(names)
    read = o.bits(o.text(1), width)
    writes = [(i, o.write(name)) for i, name in enumerate(names) if name != "_"]
    part = UNSIGNED[part_bits]

    def step(g: Ctas) -> None:
        bits = read(g)
        for i, write in writes:
            write(g, (bits >> whole(i * part_bits)).astype(part))

    return step


_ROUND: dict[str, Callable[[Array], Array]] = {
    "rzi": np.trunc,
    "rni": np.rint,
    "rmi": np.floor,
    "rpi": np.ceil,
}


def convert(o: Operands) -> Step:
    """d = (type) a; two floats into a pair come as high, low."""
    s = o.statement
    *how, to, of = s.modifiers
    if set(how) - {"rn", "rna", "ftz", "relu", *_ROUND}:
        raise NotImplementedError("a rounding that is not known")
    if ("rna" in how) != (to == "tf32"):
        raise NotImplementedError("ties away from zero")
    read, write = [o.values(x, of) for x in s.operands[1:]], o.result(s.operands[0], to)
    whole = next((_ROUND[m] for m in how if m in _ROUND), None)
    relu = "relu" in how
    exact = f8 if to == "f64" else f4
    if ("f" in of and "f" not in to) != (whole is not None):
        raise NotImplementedError("a rounding to integers")
    if len(read) != (2 if to.endswith("x2") else 1):
        raise NotImplementedError("so many operands")

    def step(g: Ctas) -> None:
        values = [x(g) for x in read]
        if relu:
            values = [np.maximum(x, f4(0)) for x in values]
        if whole is not None:
            values = [whole(x) for x in values]
        if len(values) == 2:
            high, low = np.broadcast_arrays(*values)
            write(g, np.stack([low, high]))
        else:
            write(g, values[0].astype(exact) if "f" in to and "f" not in of else values[0])

    return step


def shuffle(o: Operands) -> Step:
    """`shfl.sync`: a register of another thread of the warp."""
    s = o.statement
    if s.operands[3] not in ("31", "0x1f", "0") or "|" in s.operands[0]:
        raise NotImplementedError("a part of a warp, or whether the other thread is in it")
    mode = s.modifiers[1]
    read, other = o.bits(s.operands[1], 32), o.bits(s.operands[2], 32)
    write = o.write(s.operands[0])
    lanes = np.arange(32)
    places: dict[str, Callable[[Array], Array]] = {
        "bfly": lambda by: lanes ^ by,
        "idx": lambda by: (by & 31) + 0 * lanes,
        "up": lambda by: lanes - by,
        "down": lambda by: lanes + by,
    }
    place = places[mode]

    def step(g: Ctas) -> None:
        by = np.broadcast_to(other(g), g.lanes).reshape(-1, 32).astype(i8)
        at = place(by)
        at = np.where((at < 0) | (at > 31), lanes, at)
        values = np.broadcast_to(read(g), g.lanes).reshape(-1, 32)
        write(g, np.take_along_axis(values, at, 1).reshape(-1))

    return step


BUILDERS: dict[str, Callable[[Operands], Step]] = {"mov": move, "cvt": convert, "shfl": shuffle}
