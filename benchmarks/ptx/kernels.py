"""A launch of the library -> PTX for a chip -> an execution of it."""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.compiling import compile_for
from benchmarks.ptx.launch import GridLaunch
from benchmarks.ptx.memory import GlobalMemory
from benchmarks.ptx.numbers import Array
from benchmarks.ptx.program import Program
from benchmarks.ptx.races import Faults
from linfusion.kernels.launch import Launch, Target

ARCHS = (80, 86, 89, 90, 120)
# Few, so that few programs share a sequence and a grid is small.
_MULTIPROCESSORS = 6


class Ran(NamedTuple):
    """One launch that was executed."""

    kernel: str
    programs: int
    seconds: float
    faults: Faults
    counts: Counter[str]


class Emulator:
    """Launches kernels on the CPU as they are compiled for a GPU.

    Args:
        arch: compute capability, of `ARCHS`.
        change: (kernel, PTX) -> the PTX that is executed in its place.

    Attributes:
        target: to give to the library's launchers, `target=emulator.target`.
        ran: what was launched since it was last emptied.
    """

    def __init__(self, arch: int, change: Callable[[str, str], str] = lambda kernel, ptx: ptx):
        if arch not in ARCHS:
            raise ValueError(f"arch: got {arch}; expected one of {', '.join(map(str, ARCHS))}")
        self.target = Target("cuda", _MULTIPROCESSORS, self._launch, arch)
        self.ran: list[Ran] = []
        self._arch, self._change = arch, change
        self._programs: dict[str, Program] = {}

    def _launch(self, launch: Launch) -> None:
        """Execute it: the tensors among its arguments are changed as a GPU would."""
        start = time.perf_counter()
        memory = GlobalMemory()
        tensors = {n: x for n, x in launch.args.items() if isinstance(x, torch.Tensor)}
        storages: dict[int, tuple[int, Array]] = {}
        arguments = dict(launch.args)
        for name, tensor in tensors.items():
            raw = _bytes_of(tensor)
            if (key := tensor.untyped_storage().data_ptr()) not in storages:
                storages[key] = memory.put(raw), raw
            item = tensor.element_size()
            address = arguments[name] = storages[key][0] + tensor.storage_offset() * item
            memory.allow(address, tuple(tensor.shape), tensor.stride(), item)
        compiled = compile_for(
            launch, "cuda", self._arch, 32, lambda name: arguments[name] % 16 == 0
        )
        names = [p.name for p in launch.kernel.params if not p.is_constexpr]
        grid = GridLaunch(
            self._program(launch.kernel.__name__, compiled.asm["ptx"]),
            memory,
            [arguments[name] for name in names],
            launch.programs,
            32 * launch.options["num_warps"],
            compiled.metadata.shared,
        )
        faults = grid.run()
        for address, raw in storages.values():
            raw[:] = memory.get(address, len(raw))
        seconds = time.perf_counter() - start
        self.ran.append(Ran(launch.kernel.__name__, launch.programs, seconds, faults, grid.counts))

    def _program(self, kernel: str, ptx: str) -> Program:
        if ptx not in self._programs:
            self._programs[ptx] = Program(self._change(kernel, ptx))
        return self._programs[ptx]


def _bytes_of(tensor: torch.Tensor) -> Array:
    """The bytes of a tensor's storage, not a copy of them."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return np.zeros(0, np.uint8)
    buffer = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return np.frombuffer(buffer, np.uint8)
