"""Ranks for tests: four processes that stay alive, and groups of the first 1, 2, 3 or 4 of them.

They are forked from a server that has imported what is slow to import, so that a job costs no more
than what it does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

WORLD = 4
ALL = bool(os.environ.get("LINFUSION_ALL_RANKS"))  # `make parallel`: every case on every number
LIMIT = 240  # seconds for a job, on a machine that does other things as well

_pool: list[Pool] = []


class Pool:
    """The processes, and a pipe to each.

    Args:
        world: how many.
        backend: of their groups; with "nccl", each has a GPU of its own.
    """

    def __init__(self, world: int = WORLD, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "diffusers", "tests.parallel.preloaded"])
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            given = (rank, world, backend, store, theirs)
            process = context.Process(target=_work, args=given, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self.pipes[:world]:
            pipe.send((world, job, args))
        found: dict[int, Any] = {}
        while len(found) < world:
            waiting = {self.pipes[r]: r for r in range(world) if r not in found}
            ready = wait(list(waiting), LIMIT)
            if not ready:
                self.close()
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish {job}")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    failed, found[rank] = pipe.recv()
                except EOFError:
                    failed, found[rank] = True, "the process died"
                if failed:
                    self.close()  # the others may wait for this one
                    raise AssertionError(f"rank {rank} of {world}:\n{found[rank]}")
        return [found[rank] for rank in range(world)]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()  # an idle rank leaves
        for process in self.processes:
            process.join(2)
            process.kill()
            process.join()
        self.folder.cleanup()
        if self in _pool:
            _pool.remove(self)


def cases(few: list[Any], more: list[Any]) -> list[Any]:
    """What a test is run with: the few that hurt most, with `make parallel` the others, too."""
    return [*few, *more] if ALL else few


def run(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """What `job(ranks, *args)` returns on every rank of a group of `world`.

    `ranks` is the `Ranks` of the process; job is a function of a module, and what it takes and
    returns can be pickled.
    """
    if not _pool:
        _pool.append(Pool())
        atexit.register(_pool[0].close)
    return _pool[0].run(world, job, *args)


def _work(rank: int, most: int, backend: str, store: str, pipe: Any) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from linfusion.parallel.ranks import Ranks

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=most,
        timeout=timedelta(seconds=60),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(1, most + 1)}
    while True:
        try:
            world, job, args = pipe.recv()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            ranks = Ranks(groups[world].group_name, rank, world)
            pipe.send((False, job(ranks, *args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
