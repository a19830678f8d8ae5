"""Who touched what, and the faults that were found.

Memory is followed in cells of two bytes, the smallest element of any tensor here. Accesses of one
byte share a cell with a neighbour, so no race is reported of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.ptx.numbers import Array, i8
from benchmarks.ptx.parse import Statement

CELL = 2

KINDS = {
    "shared-race": "two warps touch a shared address between two barriers, one of them writing",
    "shared-in-flight": "a shared address is touched while cp.async is on its way to it",
    "shared-unwritten": "a shared address is read that nothing wrote",
    "shared-outside": "beyond the shared memory that the launch asks for",
    "global-race": "two CTAs of a launch touch an address, one of them writing",
    "global-race-inside": "the same of two warps of a CTA with no barrier between them",
    "global-outside": "an address that belongs to no element of any tensor",
    "misaligned": "an address that is not a multiple of the width of the access: a GPU traps",
    "proxy": "wgmma reads what was written without a fence.proxy.async since",
    "wgmma": "a shared address is written while a wgmma that reads it has not been waited for",
    "divergent": "threads of a CTA part ways at a branch, or differ in what must be uniform",
    "register": "a register of a wgmma under way is touched before the wait for it",
}


class Fault(NamedTuple):
    """A kind of `KINDS`, where it happened and in which instruction."""

    kind: str
    source: str
    instruction: str


class Faults:
    """How often each fault was seen, and an example of each."""

    def __init__(self) -> None:
        self.counts: Counter[Fault] = Counter()
        self.examples: dict[Fault, str] = {}

    def add(self, kind: str, statement: Statement, count: int, example: str = "") -> None:
        """Note a fault of `KINDS`.

        Raises:
            KeyError: it is none of them.
        """
        KINDS[kind]
        fault = Fault(kind, statement.source, statement.text[:110])
        self.counts[fault] += int(count)
        self.examples.setdefault(fault, example)

    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.counts}

    def __str__(self) -> str:
        return "\n".join(
            f"{fault.kind} at {fault.source}: {count} × {fault.instruction!r}"
            + (f" ({self.examples[fault]})" if self.examples[fault] else "")
            for fault, count in self.counts.items()
        )


# A stamp says in which period an agent touched a cell, in these low bits which agent.
_SHIFT = 20
_AGENT = 1 << _SHIFT
_SEVERAL = _AGENT - 1


def stamps(period: int | Array, agents: Array) -> Array:
    """Stamps of some agents, numbered from 0, in a period from 1 on."""
    return i8(period) * _AGENT + agents.astype(i8) + 1


class Touches:
    """Who read and who wrote each cell last.

    Two touches conflict when different agents made them in one period and one of both writes.
    Agents are warps and periods what lies between two barriers; or agents are CTAs and a launch is
    a period.
    """

    def __init__(self, cells: int):
        self.writers = np.zeros(cells, i8)
        self.readers = np.zeros(cells, i8)

    def read(self, cells: Array, by: Array) -> Array:
        """Note reads of `cells` [n] by the agents of `by` [n], stamps; which of them conflict."""
        before = self.readers[cells]
        shared = _same_period(before, by) & (before != by)
        mark = np.where(shared, by | _SEVERAL, by)
        self.readers[cells] = mark
        # Of several agents that read a cell at once, one has left its mark.
        lost = self.readers[cells] != mark
        if lost.any():
            self.readers[cells[lost]] = by[lost] | _SEVERAL
        return self._written(cells, by)

    def write(self, cells: Array, by: Array, *, at_once: bool) -> Array:
        """The same of writes; `at_once`: agents that write a cell in one step conflict, too."""
        before = self.readers[cells]
        conflict = self._written(cells, by) | (_same_period(before, by) & (before != by))
        self.writers[cells] = by
        if at_once:
            conflict |= self.writers[cells] != by
        return conflict

    def _written(self, cells: Array, by: Array) -> Array:
        before = self.writers[cells]
        return _same_period(before, by) & (before != by)

    def read_by_all(self, cells: Array, period: int) -> None:
        """Note that several agents read `cells`."""
        self.readers[cells] = period * _AGENT + _SEVERAL

    def written_in(self, cells: Array, period: int) -> Array:
        """Which of `cells` anybody wrote in this period."""
        return self.writers[cells] >> _SHIFT == period

    def part(self, cut: Callable[[Array], Array]) -> Touches:
        """Of some cells only; `cut` takes them out of an array."""
        part = Touches(0)
        part.writers, part.readers = cut(self.writers), cut(self.readers)
        return part


def _same_period(a: Array, b: Array) -> Array:
    return a >> _SHIFT == b >> _SHIFT


def agent(stamp: int) -> str:
    """Who a stamp belongs to, for a message."""
    number = int(stamp) % _AGENT
    return "several" if number == _SEVERAL else str(number - 1)
