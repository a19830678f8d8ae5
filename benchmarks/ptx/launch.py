"""A grid of CTAs through a program."""

from __future__ import annotations

from collections import Counter

import numpy as np

from benchmarks.ptx.ctas import Ctas
from benchmarks.ptx.memory import GlobalMemory
from benchmarks.ptx.numbers import Array, f4, u4, u8
from benchmarks.ptx.program import Program
from benchmarks.ptx.races import Faults

# Threads that go through the program together: enough that a numpy operation is worth its call.
_TOGETHER = 8192


class GridLaunch:
    """One launch of a kernel.

    Args:
        program: what runs.
        memory: what its pointers point into; changed by the run.
        arguments: of its parameters, in order; those that are missing are 0, as the pointers to
            scratch memory are that Triton adds.
        programs: CTAs, along one axis.
        threads: of a CTA.
        shared: bytes of shared memory of a CTA.

    Attributes:
        faults: what was found.
        counts: what all warps spent: see `benchmarks.ptx.program.costs`; barriers a CTA.
    """

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        arguments: list[int | float],
        programs: int,
        threads: int,
        shared: int,
    ):
        self.program, self.memory = program, memory
        self.programs, self.threads, self.shared = programs, threads, shared
        missing = len(program.parameters) - len(arguments)
        values = [*arguments, *[0] * missing]
        self._arguments = dict(zip(program.parameters, map(_bits, values), strict=True))
        self.faults = Faults()
        self.counts: Counter[str] = Counter()

    def parameter(self, name: str) -> Array:
        """The bits of a parameter [1]; a register takes as many as it has."""
        return self._arguments[name]

    def run(self) -> Faults:
        """Run all CTAs, as many at a time as make up a good number of threads.

        Raises:
            RuntimeError: an instruction could not be executed; the message has it.
        """
        self.memory.begin(self.faults)
        for statement in self.program.hazards:
            self.faults.add("register", statement, 1)
        at_once = max(1, _TOGETHER // self.threads)
        with np.errstate(all="ignore"):
            for first in range(0, self.programs, at_once):
                ids = np.arange(first, min(first + at_once, self.programs))
                waiting = [(0, Ctas(self, ids))]
                while waiting:
                    self._follow(*waiting.pop(), waiting)
        return self.faults

    def _follow(self, at: int, g: Ctas, waiting: list[tuple[int, Ctas]]) -> None:
        """Run some CTAs from a block on to the end; those that part from them wait."""
        while at < len(self.program.blocks):
            block = self.program.blocks[at]
            for step, statement in block.steps:
                try:
                    step(g)
                except Exception as error:
                    raise RuntimeError(
                        f"{self.program.name}, {statement.source}: {statement.text!r}: {error!r}"
                    ) from error
            for what, count in block.costs.items():
                warps = 1 if what == "barriers" else self.threads // 32
                self.counts[what] += count * warps * len(g.ids)
            at += 1
            if (jump := block.jump) is None:
                continue
            target = len(self.program.blocks) if jump.target is None else jump.target
            if jump.predicate is None:
                at = target
                continue
            taken = (g.registers[jump.predicate] ^ jump.negated).reshape(len(g.ids), -1)
            if (taken != taken[:, :1]).any():
                self.faults.add("divergent", jump.statement, 1, "a branch")
            taken = taken[:, 0]
            if taken.all():
                at = target
            elif taken.any():
                if jump.target is not None:
                    waiting.append((target, g.part(taken)))
                g = g.part(~taken)


def _bits(value: int | float) -> Array:
    if isinstance(value, float):
        return np.array([value], f4).view(u4)
    return np.array([value & (1 << 64) - 1], u8)
