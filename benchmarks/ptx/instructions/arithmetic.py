"""Sums, products and comparisons of every type; float32 may flush subnormals (`ftz`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ptx.numbers import TYPES, UNSIGNED, Array, f4, f8, flushed, i8, u4
from benchmarks.ptx.operands import Operands, Step

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas


def _fused(a: Array, b: Array, c: Array) -> Array:
    """a·b + c, rounded once."""
    if a.dtype == f8:
        return a * b + c
    return (a.astype(f8) * b.astype(f8) + c.astype(f8)).astype(f4)


_FLOAT: dict[str, tuple[int, Callable[..., Array]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "div": (2, np.divide),
    "fma": (3, _fused),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "ex2": (1, np.exp2),
    "lg2": (1, np.log2),
    "rcp": (1, lambda x: f4(1) / x),
    "sqrt": (1, np.sqrt),
    "rsqrt": (1, lambda x: f4(1) / np.sqrt(x)),
    "copysign": (2, lambda sign, size: np.copysign(size, sign)),
}
_INTEGER: dict[str, tuple[int, Callable[..., Array]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
}
# How a result is rounded or approximated is beside the point of a check with a tolerance.
_IGNORED = {"rn", "approx", "full"}


def _is_float(type_: str) -> bool:
    return "f" in type_


def arithmetic(o: Operands) -> Step:
    """d = f(a, b, ...), of numbers or pairs of numbers."""
    s = o.statement
    types = [m for m in s.modifiers if m in TYPES]
    rest = set(s.modifiers) - set(types) - _IGNORED
    type_ = types[0]
    table = _FLOAT if _is_float(type_) else _INTEGER
    if s.kind in ("min", "max"):
        arity, function = len(s.operands) - 1, _extreme(s.kind, _is_float(type_), "NaN" in rest)
        rest -= {"NaN"}
    else:
        arity, function = table[s.kind]
    flush = "ftz" in rest
    if rest - {"ftz"} or len(s.operands) != arity + 1 or len(types) > 2:
        raise NotImplementedError("a form of this that is not known")
    # Of two types, the first is that of the result and of what is added, the second of the rest.
    inner = [types[-1]] * (arity - 1) + [type_] if len(types) == 2 else [type_] * arity
    read = [o.values(x, t) for x, t in zip(s.operands[1:], inner, strict=True)]
    write = o.result(s.operands[0], type_)

    def step(g: Ctas) -> None:
        result = function(*(x(g) for x in read))
        write(g, flushed(result) if flush else result)

    return step


def _extreme(kind: str, is_float: bool, nan: bool) -> Callable[..., Array]:
    """The least or greatest of two or three; of floats a number wins over NaN unless `nan`."""
    if is_float and not nan:
        pick: Any = np.fmin if kind == "min" else np.fmax
    else:
        pick = np.minimum if kind == "min" else np.maximum
    return lambda *x: reduce(pick, x)


def mul_or_arithmetic(o: Operands) -> Step:
    """`mul` and `mad`: of integers they say which part of the product is kept."""
    s = o.statement
    if _is_float(s.modifiers[-1]):
        return arithmetic(o)
    part, type_ = s.modifiers
    bits = TYPES[type_].bits
    if part == "lo":
        wide, shift = type_, 0
    else:
        wide, shift = f"{type_[0]}{2 * bits}", {"wide": 0, "hi": bits}[part]
    if wide not in TYPES:
        raise NotImplementedError("a product of 128 bits")
    a, b = (o.values(x, type_) for x in s.operands[1:3])
    kept = type_ if part in ("lo", "hi") else wide
    add = o.values(s.operands[3], kept) if s.kind == "mad" else None
    write, to = o.result(s.operands[0], kept), TYPES[wide].pack

    def step(g: Ctas) -> None:
        product = to(a(g)) * to(b(g))
        if shift:
            product = (product >> product.dtype.type(shift)).astype(UNSIGNED[bits])
        if add is not None:
            product = product + add(g).astype(product.dtype)
        write(g, product)

    return step


def division(o: Operands) -> Step:
    """`div` and `rem`; of integers towards zero. Division by zero is by one."""
    s = o.statement
    type_ = s.modifiers[-1]
    if _is_float(type_):
        return arithmetic(o)
    a, b = (o.values(x, type_) for x in s.operands[1:3])
    write, remainder = o.result(s.operands[0], type_), s.kind == "rem"

    def step(g: Ctas) -> None:
        x, y = np.broadcast_arrays(a(g), b(g))
        y = np.where(y == 0, y.dtype.type(1), y)
        if x.dtype.kind == "i":
            x, y = x.astype(i8), y.astype(i8)
            quotient = np.abs(x) // np.abs(y) * np.where((x < 0) != (y < 0), -1, 1)
        else:
            quotient = x // y
        write(g, x - quotient * y if remainder else quotient)

    return step


def _unordered(compare: Callable[..., Array]) -> Callable[..., Array]:
    """Holds too where one of both is NaN."""
    return lambda x, y: compare(x, y) | np.isnan(x) | np.isnan(y)


_COMPARE: dict[str, Callable[..., Array]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_FLOAT_COMPARE: dict[str, Callable[..., Array]] = {
    **{name: _COMPARE[name] for name in ("lt", "le", "gt", "ge", "eq")},
    **{f"{name}u": _unordered(_COMPARE[name]) for name in ("lt", "le", "gt", "ge", "eq")},
    "ne": lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y),
    "neu": np.not_equal,
    "num": lambda x, y: ~np.isnan(x) & ~np.isnan(y),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
_JOIN: dict[str, Callable[..., Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def setp(o: Operands) -> Step:
    """p = a ? b, perhaps joined with a third predicate; of pairs, p and q of the two halves."""
    s = o.statement
    compare, *rest, type_ = s.modifiers
    table = _FLOAT_COMPARE if _is_float(type_) else {**_COMPARE, "ne": np.not_equal}
    function = table[compare]
    join = next((_JOIN[m] for m in rest if m in _JOIN), None)
    if set(rest) - set(_JOIN) - {"ftz"}:
        raise NotImplementedError("a form of this that is not known")
    a, b = (o.values(x, type_) for x in s.operands[1:3])
    other = o.bits(s.operands[3], 1) if join else None
    pair = type_.endswith("x2")
    names = s.operands[0].split("|")
    if len(names) == 2 and not pair and names[1] != "_":
        raise NotImplementedError("a second predicate of one comparison")
    writes = [o.write(name) for name in names[: 2 if pair else 1]]

    def step(g: Ctas) -> None:
        found = function(a(g), b(g))
        if join is not None and other is not None:
            found = join(found, other(g))
        for write, part in zip(writes, found if pair else [found], strict=True):
            write(g, part)

    return step


def select(o: Operands) -> Step:
    """d = p ? a : b."""
    s = o.statement
    width = TYPES[s.modifiers[-1]].bits
    a, b = (o.bits(x, width) for x in s.operands[1:3])
    p, write = o.bits(s.operands[3], 1), o.write(s.operands[0])
    return lambda g: write(g, np.where(p(g), a(g), b(g)))


def count_bits(o: Operands) -> Step:
    """`popc`."""
    s = o.statement
    x, write = o.values(s.operands[1], s.modifiers[-1]), o.write(s.operands[0])
    return lambda g: write(g, np.bitwise_count(x(g)).astype(u4))


BUILDERS: dict[str, Callable[[Operands], Step]] = {
    **{kind: arithmetic for kind in (*_FLOAT, "min", "max") if kind not in ("mul", "div")},
    "mul": mul_or_arithmetic,
    "mad": mul_or_arithmetic,
    "div": division,
    "rem": division,
    "setp": setp,
    "selp": select,
    "popc": count_bits,
}
