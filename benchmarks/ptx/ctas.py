"""Some CTAs in lockstep: their registers, their shared memory and the barriers they passed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.numbers import Array, i8, u4
from benchmarks.ptx.shared import SharedMemory

if TYPE_CHECKING:
    from benchmarks.ptx.launch import GridLaunch


class Ctas:
    """All threads of the CTAs `ids`, one CTA after another.

    Attributes:
        lanes: how many threads there are.
        registers: of each register [lanes], or None before anything wrote it.
        thread, cta, warp: number of each thread in its CTA, of its CTA, of its warp.
        first_byte: where the shared memory of each thread's CTA begins.
        period: counts barriers, from 1.
    """

    def __init__(self, launch: GridLaunch, ids: Array):
        self.launch = launch
        self.registers: list[Array | None] = [None] * len(launch.program.registers)
        self.shared = SharedMemory(len(ids), launch.shared, launch.faults)
        self.period = 1
        self._number(ids)

    def _number(self, ids: Array) -> None:
        threads = self.launch.threads
        self.ids, self.lanes = ids, len(ids) * threads
        self.thread = np.tile(np.arange(threads, dtype=u4), len(ids))
        self.cta = np.repeat(ids.astype(u4), threads)
        self.warp = self.thread >> u4(5)
        self.first_byte = np.repeat(np.arange(len(ids), dtype=i8) * self.shared.stride, threads)

    def part(self, keep: Array) -> Ctas:
        """The CTAs for which `keep` [ctas] holds, to go on by themselves."""
        part = object.__new__(Ctas)
        part.launch, part.period = self.launch, self.period
        lanes = np.repeat(keep, self.launch.threads)
        part.registers = [None if r is None else r[lanes] for r in self.registers]
        part.shared = self.shared.part(keep, self.launch.threads)
        part._number(self.ids[keep])
        return part

    def barrier(self) -> None:
        """All warps of each CTA wait for each other; what they touched before is ordered."""
        self.period += 1
