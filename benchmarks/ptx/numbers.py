"""What the bits of a register mean: the types of PTX, to values and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

UNSIGNED: dict[int, Any] = {8: u1, 16: u2, 32: u4, 64: u8}
_SIGNED: dict[int, Any] = {8: i1, 16: i2, 32: i4, 64: i8}


class Type(NamedTuple):
    """A type of PTX.

    Attributes:
        bits: of a register that holds it.
        values: bits [n] -> what to calculate with: [n], or [2, n] of a packed pair (low, high).
        pack: values -> bits.
    """

    bits: int
    values: Callable[[Array], Array]
    pack: Callable[[Array], Array]


def from_bf16(bits: Array) -> Array:
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(values: Array) -> Array:
    """To nearest, ties to even."""
    bits = values.astype(f4).view(u4)
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(values), u4(0x7FFF), rounded).astype(u2)


def from_f16(bits: Array) -> Array:
    return np.ascontiguousarray(bits).view(f2).astype(f4)


def to_f16(values: Array) -> Array:
    return values.astype(f4).astype(f2).view(u2)


def from_tf32(bits: Array) -> Array:
    """As tensor cores read it: the low 13 bits are not there."""
    return (bits & u4(0xFFFF_E000)).view(f4)


def to_tf32(values: Array) -> Array:
    """To nearest, ties away from zero (cvt.rna)."""
    return (values.astype(f4).view(u4) + u4(0x1000)) & u4(0xFFFF_E000)


def flushed(values: Array) -> Array:
    """Subnormal float32 as a zero of the same sign."""
    tiny = np.abs(values) < f4(2.0**-126)
    return np.where(tiny, np.copysign(f4(0), values), values).astype(f4)


def _integer(bits: int, kind: Any) -> Type:
    return Type(
        bits,
        lambda x: x.astype(UNSIGNED[bits], copy=False).view(kind),
        lambda v: v.astype(kind, copy=False),
    )


def _pair(bits: int, values: Callable[[Array], Array], pack: Callable[[Array], Array]) -> Type:
    """Two values in one register, the first in its low half."""
    whole, half = UNSIGNED[bits], UNSIGNED[bits // 2]
    shift = whole(bits // 2)

    def unpack(x: Array) -> Array:
        return np.stack([values(x.astype(half)), values((x >> shift).astype(half))])

    def together(v: Array) -> Array:
        low, high = (pack(part).astype(whole) for part in v)
        return low | (high << shift)

    return Type(bits, unpack, together)


def _to_f32(values: Array) -> Array:
    return values.astype(f4, copy=False).view(u4)


TYPES: dict[str, Type] = {
    "pred": Type(1, lambda x: x, lambda v: v),
    "f16": Type(16, from_f16, to_f16),
    "bf16": Type(16, from_bf16, to_bf16),
    "f32": Type(32, lambda x: x.view(f4), _to_f32),
    "tf32": Type(32, from_tf32, to_tf32),
    "f64": Type(64, lambda x: x.view(f8), lambda v: v.astype(f8, copy=False).view(u8)),
    "f16x2": _pair(32, from_f16, to_f16),
    "bf16x2": _pair(32, from_bf16, to_bf16),
    "f32x2": _pair(64, lambda x: x.view(f4), _to_f32),
}
for _bits in UNSIGNED:
    TYPES[f"u{_bits}"] = TYPES[f"b{_bits}"] = _integer(_bits, UNSIGNED[_bits])
    TYPES[f"s{_bits}"] = _integer(_bits, _SIGNED[_bits])
