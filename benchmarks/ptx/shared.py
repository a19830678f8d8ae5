"""Shared memory of some CTAs: its bytes, what is on its way to them, and who may read them when."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks.ptx.numbers import Array, i8, u1, u8
from benchmarks.ptx.parse import Statement
from benchmarks.ptx.races import CELL, Faults, Touches, agent, stamps

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas

# Some threads: their numbers among all, or a slice of everything.
Lanes = Array | slice


class _Copy(NamedTuple):
    """A cp.async under way: what the threads `lanes` will write where."""

    statement: Statement
    places: Array
    data: Array
    lanes: Array


class SharedMemory:
    """`size` bytes for each of `ctas`, one after another.

    An asynchronous copy lands as late as it may: at the wait that retires it. A wgmma reads its
    operands at once, but they may not be written before it has been waited for.
    """

    def __init__(self, ctas: int, size: int, faults: Faults):
        self.size, self.faults = size, faults
        # Rounded up so that every CTA's begins aligned, with room for an access at its very end.
        self.stride = -(-size // 16) * 16 + 16
        self.data = np.full(ctas * self.stride, 0x5A, u1)
        cells = len(self.data) // CELL
        self._touches = Touches(cells)
        self._written, self._in_flight, self._generic = (
            np.zeros(cells, np.bool_) for _ in range(3)
        )
        self._copies: list[_Copy] = []
        self._committed: list[list[_Copy]] = []
        self._reads: list[Array] = []
        self._committed_reads: list[list[Array]] = []

    def locate(
        self,
        g: Ctas,
        statement: Statement,
        addresses: Array,
        size: int,
        lanes: Lanes,
        *,
        write: bool,
    ) -> Array:
        """Addresses [n] of `size` bytes each, in the threads `lanes` -> places in `data`."""
        places = self._inside(statement, addresses.astype(i8), size)
        if (crooked := places % size != 0).any():
            text = f"offset {places[crooked][0]}, {size} bytes"
            self.faults.add("misaligned", statement, crooked.sum(), text)
            places -= places % size
        places = places + g.first_byte[lanes]
        self._touch(g, statement, places, size, lanes, write)
        return places

    def _inside(self, statement: Statement, offsets: Array, size: int) -> Array:
        if (outside := offsets + size > self.size).any():
            text = f"offset {offsets[outside].flat[0]}, {size} bytes, of {self.size}"
            self.faults.add("shared-outside", statement, outside.sum(), text)
            offsets = np.where(outside, 0, offsets)
        return offsets

    def _touch(
        self, g: Ctas, statement: Statement, places: Array, size: int, lanes: Lanes, write: bool
    ) -> None:
        each = max(1, size // CELL)
        cells = (places[:, None] // CELL + np.arange(each)).reshape(-1)
        warps = np.repeat(g.warp[lanes], each)
        by = stamps(g.period, warps)
        if (early := self._in_flight[cells]).any():
            self.faults.add("shared-in-flight", statement, early.sum())
        before = self._touches.writers[cells]
        if write:
            race = self._touches.write(cells, by, at_once=False)
            self._written[cells] = self._generic[cells] = True
            for reads in (*self._reads, *(r for group in self._committed_reads for r in group)):
                if (hit := np.isin(cells, reads)).any():
                    self.faults.add("wgmma", statement, hit.sum())
            if size < CELL:
                return
        else:
            if not (known := self._written[cells]).all():
                self.faults.add("shared-unwritten", statement, (~known).sum())
            race = self._touches.read(cells, by)
        if race.any():
            text = f"warp {warps[race][0]}, written by {agent(before[race][0])}"
            self.faults.add("shared-race", statement, race.sum(), text)

    # Asynchronous copies.

    def copy(
        self, g: Ctas, statement: Statement, addresses: Array, data: Array, lanes: Array
    ) -> None:
        """Start to copy `data` [n, bytes] to the addresses [n]."""
        size = data.shape[1]
        places = self.locate(g, statement, addresses, size, lanes, write=True)
        self._in_flight[_cells(places, size)] = True
        self._copies.append(_Copy(statement, places, data, lanes))

    def commit(self) -> None:
        """What was started since the last one is a group."""
        self._committed.append(self._copies)
        self._copies = []

    def wait(self, g: Ctas, left: int) -> None:
        """Land all groups but the last `left`."""
        while len(self._committed) > left:
            for statement, places, data, lanes in self._committed.pop(0):
                size = data.shape[1]
                self._in_flight[_cells(places, size)] = False
                self._touch(g, statement, places, size, lanes, True)
                self.data[places[:, None] + np.arange(size)] = data

    # wgmma.

    def fence_proxy(self) -> None:
        """What was written so far may be read by wgmma."""
        self._generic[:] = False

    def operand(self, g: Ctas, statement: Statement, offsets: Array, size: int) -> Array:
        """Elements of `size` bytes that wgmma reads: offsets [warpgroups, rows, k] -> places."""
        offsets = self._inside(statement, offsets, size)
        places = offsets + g.first_byte.reshape(-1, 128)[:, :1, None]
        cells = np.unique(_cells(places.reshape(-1), size))
        for kind, bad in (
            ("shared-in-flight", self._in_flight[cells]),
            ("shared-unwritten", ~self._written[cells]),
            ("shared-race", self._touches.written_in(cells, g.period)),
            ("proxy", self._generic[cells]),
        ):
            if bad.any():
                self.faults.add(kind, statement, bad.sum(), "an operand of wgmma")
        self._touches.read_by_all(cells, g.period)
        self._reads.append(cells)
        return places

    def commit_reads(self) -> None:
        self._committed_reads.append(self._reads)
        self._reads = []

    def wait_reads(self, left: int) -> None:
        """All groups of wgmma but the last `left` have read their operands."""
        del self._committed_reads[: max(0, len(self._committed_reads) - left)]

    # CTAs that part.

    def part(self, keep: Array, threads: int) -> SharedMemory:
        """That of the CTAs where `keep` [ctas] holds, of `threads` threads each.

        Which operands of wgmma are still read is not followed any further.
        """
        part = SharedMemory(0, self.size, self.faults)

        def cut(x: Array) -> Array:
            return x.reshape(len(keep), -1)[keep].reshape(-1)

        part.data, part._touches = cut(self.data), self._touches.part(cut)
        part._written, part._in_flight, part._generic = map(
            cut, (self._written, self._in_flight, self._generic)
        )
        number = np.cumsum(keep) - 1  # of a CTA among those that are kept
        moved = _mover(keep, number, threads, self.stride)
        part._copies = [moved(copy) for copy in self._copies]
        part._committed = [[moved(copy) for copy in group] for group in self._committed]
        return part


def _mover(keep: Array, number: Array, threads: int, stride: int) -> Callable[[_Copy], _Copy]:
    """A copy of all CTAs -> that of those that are kept, at the places where they are then."""

    def moved(copy: _Copy) -> _Copy:
        of_kept = keep[copy.lanes // threads]
        places, lanes = copy.places[of_kept], copy.lanes[of_kept]
        cta = lanes // threads
        shift = number[cta] - cta
        return _Copy(
            copy.statement, places + shift * stride, copy.data[of_kept], lanes + shift * threads
        )

    return moved


def _cells(places: Array, size: int) -> Array:
    return (places[:, None] // CELL + np.arange(max(1, size // CELL))).reshape(-1)


def descriptor(bits: Array) -> tuple[Array, Array, Array, int]:
    """Of a wgmma operand [warpgroups]: start, leading and stride offset in bytes, swizzle width."""
    start, leading, stride = (
        (((bits >> u8(at)) & u8(0x3FFF)) << u8(4)).astype(i8) for at in (0, 16, 32)
    )
    mode = int(bits[0] >> u8(62))
    if mode not in (1, 2, 3):
        raise NotImplementedError("an operand of wgmma without swizzle")
    return start, leading, stride, {1: 128, 2: 64, 3: 32}[mode]
