"""An operand -> a function that reads or writes it.

A reader gives an array of one value a thread, or of one value for all of them where it is a
constant; whatever takes values broadcasts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.ptx.numbers import TYPES, UNSIGNED, Array, u2, u4, u8
from benchmarks.ptx.parse import Statement

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas

Read = Callable[["Ctas"], Array]
Write = Callable[["Ctas", Array], None]
Step = Callable[["Ctas"], None]

# What registers of a name hold, in the names that LLVM gives them.
_CLASSES: dict[str, Any] = {
    "p": np.bool_,
    "rs": u2,
    "h": u2,
    "r": u4,
    "f": u4,
    "hh": u4,
    "rd": u8,
    "fd": u8,
}
_REGISTER = re.compile(r"%(p|rs|rd|r|fd|f|hh|h)\d+$")
_SPECIAL: dict[str, Read] = {
    "%tid.x": lambda g: g.thread,
    "%ctaid.x": lambda g: g.cta,
    "%nctaid.x": lambda g: np.full(1, g.launch.programs, u4),
    "%laneid": lambda g: g.thread & u4(31),
} | {f"%{name}.{axis}": lambda g: np.zeros(1, u4) for name in ("tid", "ctaid") for axis in "yz"}


class Registers:
    """Where each register of a program is kept, by name."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def place(self, name: str) -> int:
        """Index into `Ctas.registers`.

        Raises:
            NotImplementedError: it is no register that LLVM would name so.
        """
        if not _REGISTER.match(name):
            raise NotImplementedError(f"a register of the name {name!r}")
        return self._places.setdefault(name, len(self._places))


class Operands:
    """Readers and writers of the operands of one statement."""

    def __init__(self, statement: Statement, registers: Registers):
        self.statement = statement
        self._registers = registers
        self.predicate: Read | None = None
        if statement.predicate is not None:
            place, negated = registers.place(statement.predicate), statement.negated
            self.predicate = lambda g: g.registers[place] ^ negated

    def text(self, i: int) -> str:
        return self.statement.operands[i]

    def place(self, register: str) -> int:
        """Index of a register in `Ctas.registers`."""
        return self._registers.place(register)

    def vector(self, i: int) -> list[str]:
        """Names in `{%r1, %r2}`, or the one that stands alone."""
        return [name.strip() for name in self.text(i).strip("{} ").split(",")]

    def bits(self, operand: str, width: int) -> Read:
        """The bits of a source operand: a register, a special register or a constant."""
        if operand in _SPECIAL:
            return _SPECIAL[operand]
        if operand.startswith("%"):
            place = self._registers.place(operand)
            return lambda g: g.registers[place]
        constant = np.array(
            [_constant(operand, width)], np.bool_ if width == 1 else UNSIGNED[width]
        )
        return lambda g: constant

    def maybe(self, operand: str) -> Read:
        """The same of a register that nothing may have written: zeros then."""
        place, dtype = self._registers.place(operand), dtype_of(operand)
        return lambda g: np.zeros(1, dtype) if g.registers[place] is None else g.registers[place]

    def values(self, operand: str, type_: str) -> Read:
        """A source operand as what its type means."""
        bits, values = self.bits(operand, TYPES[type_].bits), TYPES[type_].values
        return lambda g: values(bits(g))

    def address(self, i: int, width: int) -> Read:
        """`[%rd1+16]`, in bytes."""
        base, _, offset = self.text(i).strip("[] ").partition("+")
        start = self.bits(base.strip(), width)
        if not offset or not int(offset, 0):
            return start
        step = np.array([_constant(offset.strip(), width)], UNSIGNED[width])
        return lambda g: start(g) + step

    def write(self, register: str) -> Write:
        """Bits -> a register, in the threads for which the predicate holds."""
        place, dtype, predicate = (
            self._registers.place(register),
            dtype_of(register),
            self.predicate,
        )

        def write(g: Ctas, bits: Array) -> None:
            bits = bits.astype(dtype, copy=False)
            if predicate is not None:
                old = g.registers[place]
                bits = np.where(predicate(g), bits, dtype(0) if old is None else old)
            if len(bits) != g.lanes:
                bits = np.broadcast_to(bits, g.lanes).copy()
            g.registers[place] = bits

        return write

    def result(self, register: str, type_: str) -> Write:
        """Values of a type -> a register, as `write` does."""
        write, pack = self.write(register), TYPES[type_].pack
        return lambda g, values: write(g, pack(values))


def dtype_of(register: str) -> Any:
    """The numpy type that a register of this name is kept in."""
    if not (found := _REGISTER.match(register)):
        raise NotImplementedError(f"a register of the name {register!r}")
    return _CLASSES[found[1]]


def _constant(text: str, width: int) -> int:
    """`12`, `-1`, `0xff`, `0f3F800000`; the start of shared memory is 0."""
    if text == "global_smem":
        return 0
    if text[:2] in ("0f", "0d"):
        return int(text[2:], 16)
    try:
        return int(text.removesuffix("U"), 0) & ((1 << width) - 1)
    except ValueError:
        raise NotImplementedError(f"an operand {text!r}") from None
