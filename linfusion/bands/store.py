"""Where whole tensors live while a model runs in bounded memory: in RAM, or in files."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """Which tensors are kept, where what is not kept can be computed again.

    Attributes:
        largest: bytes of the largest that is kept.
        exceptions: those, in the order they come up, for which it is the other way round.
    """

    largest: int
    exceptions: frozenset[int] = frozenset()

    def keeps(self, index: int, nbytes: int) -> bool:
        return (nbytes <= self.largest) != (index in self.exceptions)


class Store:
    """Counts the bytes of whole tensors and keeps them under a limit.

    When a new tensor does not fit, the ones that were used longest ago move to files of `scratch`.
    In a UNet these are the skip tensors, and the outermost, which are wanted last, go first.

    Args:
        limit: bytes of whole tensors kept in memory at once; None for no limit.
        scratch: folder for what does not fit; None keeps all in memory.
        policy: what to keep of that which would fit; without one, everything, in files if need be.
        dry: count only; nothing is allocated.

    Attributes:
        asked: bytes of the tensors the policy was asked about.
        live, peak: bytes in memory, now and at most; on_disk, peak_on_disk likewise.
    """

    def __init__(
        self,
        limit: int | None = None,
        scratch: str | Path | None = None,
        *,
        policy: Policy | None = None,
        dry: bool = False,
    ) -> None:
        self.limit, self.policy, self.dry = limit, policy, dry
        self.asked: list[int] = []
        self.scratch = None if scratch is None else Path(scratch)
        self.live = self.peak = self.on_disk = self.peak_on_disk = 0
        self._used: OrderedDict[int, weakref.ref[Whole]] = OrderedDict()

    def fits(self, nbytes: int) -> bool:
        """Whether a tensor of that size is to be kept."""
        if self.limit is None or self.policy is None:
            return True
        self.asked.append(nbytes)
        wanted = self.policy.keeps(len(self.asked) - 1, nbytes)
        return wanted and self.live + nbytes <= self.limit

    def new(
        self, shape: tuple[int, ...], axis: int, line: int, dtype: torch.dtype, device: torch.device
    ) -> Whole:
        """An empty whole tensor, lines along `axis`."""
        nbytes = dtype.itemsize * int(torch.Size(shape).numel())
        self._make_room(nbytes)
        whole = Whole(self, shape, axis, line, dtype, device)
        self._count(whole, nbytes)
        if not self.dry:
            whole.tensor = torch.empty(whole.stored, dtype=dtype, device=device).permute(whole.back)
        return whole

    def keep(self, tensor: Tensor, axis: int, line: int) -> Whole:
        """A whole tensor that somebody else made; it is neither counted nor moved."""
        whole = Whole(self, tuple(tensor.shape), axis, line, tensor.dtype, tensor.device)
        whole.tensor = tensor
        return whole

    def adopt(self, tensor: Tensor, axis: int, line: int) -> Whole:
        """A whole tensor that was made just now, counted; one of `new` in a dry run."""
        shape = tuple(tensor.shape)
        if self.dry:
            return self.new(shape, axis, line, tensor.dtype, tensor.device)
        self._make_room(tensor.nbytes)
        whole = self.keep(tensor, axis, line)
        self._count(whole, tensor.nbytes)
        return whole

    @contextlib.contextmanager
    def beside(self, nbytes: int) -> Iterator[None]:
        """Count bytes that others hold meanwhile."""
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        try:
            yield
        finally:
            self.live -= nbytes

    def touch(self, whole: Whole) -> None:
        """Note that `whole` is in use."""
        if id(whole) in self._used:
            self._used.move_to_end(id(whole))

    def _count(self, whole: Whole, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        whole.nbytes = nbytes
        key = id(whole)
        self._used[key] = weakref.ref(whole)
        place = whole.place
        weakref.finalize(whole, self._drop, key, nbytes, place)

    def _drop(self, key: int, nbytes: int, place: Place) -> None:
        self._used.pop(key, None)
        if place.spilled:
            self.on_disk -= nbytes
            place.close()
        else:
            self.live -= nbytes

    def _make_room(self, nbytes: int) -> None:
        if self.limit is None or self.scratch is None:
            return
        for key, ref in list(self._used.items()):
            if self.live + nbytes <= self.limit:
                return
            whole = ref()
            if whole is not None and not whole.place.spilled:
                whole.spill(self.scratch)
                self._used.pop(key)
                self.live -= whole.nbytes
                self.on_disk += whole.nbytes
                self.peak_on_disk = max(self.peak_on_disk, self.on_disk)


class Place:
    """The file of a whole tensor, if it has one; outlives it by the time it takes to close it."""

    def __init__(self) -> None:
        self.spilled = False
        self.file: int | None = None

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


class Whole:
    """One whole tensor, read and written by lines along its axis.

    Memory runs batch, lines, the rest of the axis' block, channels last for pictures, so that a
    run of lines of one batch element is one piece.
    """

    def __init__(
        self,
        store: Store,
        shape: tuple[int, ...],
        axis: int,
        line: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.store, self.shape, self.axis, self.line = store, shape, axis, line
        self.dtype, self.device = dtype, device
        self.tensor: Tensor | None = None
        self.nbytes = 0
        self.place = Place()
        order = [0, 2, 3, 1] if len(shape) == 4 and axis == 2 and line == 1 else range(len(shape))
        self.order = list(order)
        self.stored = [shape[i] for i in self.order]
        self.back = [self.order.index(i) for i in range(len(shape))]

    def rows(self, start: int, stop: int) -> Tensor:
        """Lines start to stop, the other axes whole; a view where it is in memory."""
        self.store.touch(self)
        start, size = start * self.line, (stop - start) * self.line
        if self.tensor is not None:
            return self.tensor.narrow(self.axis, start, size)
        out = torch.empty(self._stored_rows(size), dtype=self.dtype)
        for piece, offset in self._pieces(out, start):
            _read(self.place.file, piece, offset)
        return out.permute(self.back).to(self.device)

    def write(self, start: int, values: Tensor) -> None:
        """Set the lines from `start` on."""
        assert self.tensor is not None
        start *= self.line
        self.tensor.narrow(self.axis, start, values.shape[self.axis]).copy_(values)

    def whole(self) -> Tensor:
        """All of it, in memory."""
        if self.tensor is not None:
            return self.tensor
        return self.rows(0, self.shape[self.axis] // self.line)

    def spill(self, scratch: Path) -> None:
        """Move to an unnamed file of `scratch`, which is gone when this is."""
        self.place.spilled = True
        if self.tensor is None:  # a dry run
            return
        handle, name = tempfile.mkstemp(prefix="linfusion-", dir=scratch)
        os.unlink(name)
        self.place.file = handle
        stored = self.tensor.permute(self.order).cpu()
        try:
            for piece, offset in self._pieces(stored, 0):
                _write(handle, piece, offset)
        except OSError as error:
            raise OSError(
                error.errno,
                f"no room for {self.nbytes:,} bytes of intermediate results in the scratch folder"
                f" {scratch}: {error.strerror}",
            ) from error
        self.tensor = None

    def _stored_rows(self, size: int) -> list[int]:
        rows = list(self.stored)
        rows[self.order.index(self.axis)] = size
        return rows

    def _pieces(self, stored: Tensor, start: int) -> list[tuple[memoryview, int]]:
        """What lies in one piece in the file, one for each index before the axis."""
        at = self.order.index(self.axis)
        outer = int(torch.Size(self.stored[:at]).numel())
        inner = int(torch.Size(self.stored[at + 1 :]).numel()) * self.dtype.itemsize
        whole_run = self.stored[at] * inner
        flat = stored.contiguous().view(torch.uint8).reshape(outer, -1).numpy()
        return [(memoryview(flat[i]), i * whole_run + start * inner) for i in range(outer)]


def _read(file: int | None, into: memoryview, offset: int) -> None:
    assert file is not None
    while into:
        n = os.preadv(file, [into], offset)
        into, offset = into[n:], offset + n


def _write(file: int, data: memoryview, offset: int) -> None:
    while data:
        n = os.pwrite(file, data[: 1 << 30], offset)
        data, offset = data[n:], offset + n
