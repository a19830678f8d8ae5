"""Global memory: the tensors of a launch, and which of their elements may be touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.numbers import Array, i8, u1
from benchmarks.ptx.parse import Statement
from benchmarks.ptx.races import CELL, Faults, Touches, agent, stamps

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas
    from benchmarks.ptx.shared import Lanes

# Where memory begins: far from anything that a wrong sum of small numbers makes.
_BASE = 0x7_0000_0000
_ALIGNMENT, _GAP = 256, 4096


class GlobalMemory:
    """Storages, each with room around it that belongs to nothing."""

    def __init__(self) -> None:
        self.data = np.zeros(_GAP, u1)
        self._allowed = np.zeros(_GAP // CELL, np.bool_)
        self._ctas = self._warps = Touches(0)
        self.faults = Faults()

    def put(self, storage: Array) -> int:
        """Copy the bytes of a storage in; its address."""
        start = -(-len(self.data) // _ALIGNMENT) * _ALIGNMENT
        size = -(-(start + len(storage) + _GAP) // CELL) * CELL
        self.data = np.concatenate([self.data, np.zeros(size - len(self.data), u1)])
        self.data[start : start + len(storage)] = storage
        self._allowed = np.concatenate(
            [self._allowed, np.zeros(size // CELL - len(self._allowed), np.bool_)]
        )
        return _BASE + start

    def get(self, address: int, size: int) -> Array:
        """The bytes at an address."""
        return self.data[address - _BASE : address - _BASE + size]

    def allow(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], item: int):
        """The elements of a tensor may be touched, those between them not."""
        places = np.array([address - _BASE], i8)
        for size, stride in zip(shape, strides, strict=True):
            places = (places[:, None] + np.arange(size) * stride * item).reshape(-1)
        for byte in range(0, item, CELL):
            self._allowed[(places + byte) // CELL] = True

    def begin(self, faults: Faults) -> None:
        """Forget who touched what before a launch."""
        self.faults = faults
        self._ctas, self._warps = (Touches(len(self._allowed)) for _ in range(2))

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
        """Addresses [n] of `size` bytes each, in the threads `lanes` -> places in `data`.

        What is wrong with them is noted, and those that cannot be are moved to where they can.
        """
        places = addresses.astype(i8) - _BASE
        if (crooked := places % size != 0).any():
            text = f"address {int(addresses[crooked][0]):#x}, {size} bytes"
            self.faults.add("misaligned", statement, crooked.sum(), text)
            places -= places % size
        nowhere = (places < 0) | (places + size > len(self.data))
        places = np.where(nowhere, 0, places)
        each = max(1, size // CELL)
        cells = (places[:, None] // CELL + np.arange(each)).reshape(-1)
        cta = np.repeat(g.cta[lanes], each)
        if not (allowed := self._allowed[cells]).all():
            first = np.flatnonzero(~allowed)[0]
            text = f"{'write' if write else 'read'} of CTA {cta[first]}"
            self.faults.add("global-outside", statement, (~allowed).sum(), text)
        self._touch(g, statement, cells, cta, np.repeat(g.warp[lanes], each), write)
        return places

    def _touch(
        self, g: Ctas, statement: Statement, cells: Array, cta: Array, warp: Array, write: bool
    ) -> None:
        by_cta = stamps(1, cta)
        # A period of a CTA is its own: other CTAs are never in it.
        by_warp = stamps((cta.astype(i8) + 1 << 20) + g.period, warp)
        before = self._ctas.writers[cells]
        if write:
            between = self._ctas.write(cells, by_cta, at_once=True)
            inside = self._warps.write(cells, by_warp, at_once=False)
        else:
            between, inside = self._ctas.read(cells, by_cta), self._warps.read(cells, by_warp)
        if between.any():
            text = f"CTA {cta[between][0]}, written by {agent(before[between][0])}"
            self.faults.add("global-race", statement, between.sum(), text)
        if inside.any():
            self.faults.add("global-race-inside", statement, inside.sum(), f"CTA {cta[inside][0]}")
