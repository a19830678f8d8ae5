"""A statement -> a function that executes it on some CTAs."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.ptx.instructions import arithmetic, bits, matrix, memory, moves
from benchmarks.ptx.operands import Operands, Registers, Step
from benchmarks.ptx.parse import Statement

_BUILDERS: dict[str, Callable[[Operands], Step]] = {
    **arithmetic.BUILDERS,
    **bits.BUILDERS,
    **moves.BUILDERS,
    **memory.BUILDERS,
    **matrix.BUILDERS,
}


def build(statement: Statement, registers: Registers) -> Step:
    """The function for a statement other than a branch.

    Raises:
        NotImplementedError: it is an instruction, or a form of one, that is not known here. What is
            not known is never skipped: a wrong result would look like a wrong kernel.
    """
    try:
        return _BUILDERS[statement.kind](Operands(statement, registers))
    except (KeyError, ValueError, IndexError, NotImplementedError) as error:
        reason = "" if isinstance(error, KeyError) else f": {error}"
        raise NotImplementedError(f"{statement.text!r}{reason}") from error
