"""Which processes share a picture's rows, and which the two halves of guidance."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from linfusion.parallel.collectives import group_named
from linfusion.parallel.ranks import Ranks

AXES = ("cfg", "sp")


@dataclass(frozen=True)
class Mesh:
    """Ranks by rows (`sp`) and by halves of the batch (`cfg`).

    Attributes:
        sp: ranks that share rows.
        cfg: ranks that have the same rows of other halves of the batch.
        place: of this process among all.
    """

    sp: Ranks
    cfg: Ranks
    place: int

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, where one is enough."""
        return self.sp.rank == 0 and self.cfg.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every process has, those of one half after those of the other."""
        found: list[Any] = [value]
        for ranks in (self.sp, self.cfg):
            if ranks.world > 1:
                parts: list[Any] = [None] * ranks.world
                dist.all_gather_object(parts, found, group=group_named(ranks.group))
                found = [item for part in parts for item in part]
        return found


def mesh_of(device_type: str, sp: int | None, cfg: int, mesh: DeviceMesh | None) -> Mesh:
    """The mesh of all processes, or the one that is given.

    Raises:
        ValueError: no process group, sizes that do not make up its processes, or a mesh without an
            axis "sp".
    """
    for name, value in (("sp", sp), ("cfg", cfg)):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: got {value!r}, expected a positive whole number")
    if cfg > 2:
        raise ValueError(f"cfg: got {cfg}, expected 1, or 2 for the two halves of guidance")
    if mesh is not None:
        return _given(mesh, sp, cfg)
    if not dist.is_available() or not (dist.is_initialized() or "WORLD_SIZE" in os.environ):
        raise ValueError(
            "parallelize: there is no process group; start with torchrun, accelerate launch or"
            " another launcher, or call torch.distributed.init_process_group first"
        )
    if not dist.is_initialized():
        dist.init_process_group()
    world = dist.get_world_size()
    sp = world // cfg if sp is None else sp
    if sp * cfg != world:
        raise ValueError(
            f"sp, cfg: got {sp} and {cfg}, {sp * cfg} in all, for {world} processes; their product"
            " has to be that"
        )
    return _given(init_device_mesh(device_type, (cfg, sp), mesh_dim_names=AXES), sp, cfg)


def _given(mesh: DeviceMesh, sp: int | None, cfg: int) -> Mesh:
    names = mesh.mesh_dim_names or ()
    if "sp" not in names:
        raise ValueError(f"mesh: got one with the axes {names}, expected 'sp', and 'cfg' if any")
    found = {}
    for name, wanted in (("sp", sp), ("cfg", cfg if cfg > 1 else None)):
        if name in names:
            part = mesh[name] if mesh.ndim > 1 else mesh
            group = part.get_group()
            found[name] = Ranks(group.group_name, dist.get_rank(group), dist.get_world_size(group))
        else:
            found[name] = Ranks("", 0, 1)
        if wanted is not None and found[name].world != wanted:
            raise ValueError(f"{name}: got {wanted}, but the mesh has {found[name].world}")
    return Mesh(found["sp"], found["cfg"], dist.get_rank())


_TURNS: dict[str, int] = {}  # calls so far, by group: the same number on all of its ranks


@contextlib.contextmanager
def together(mesh: Mesh) -> Iterator[None]:
    """Within, an error on one rank is also that of the others.

    They wait in a collective until it fails, at the latest after the timeout of their group; what
    they raise then says which rank failed first, and why.
    """
    groups = f"{mesh.sp.group}/{mesh.cfg.group}"
    turn = _TURNS[groups] = _TURNS.get(groups, 0) + 1
    try:
        yield
    except Exception as error:
        own = f"{type(error).__name__}: {error}"
        first = _first_failure(f"linfusion/{groups}/{turn}", f"{mesh.place} {own}")
        rank, _, reason = first.partition(" ")
        if reason == own:
            raise
        raise RuntimeError(f"rank {rank} failed, and with it this one: {reason}") from error


def _first_failure(key: str, own: str) -> str:
    """What failed first: rank and reason."""
    try:
        store = dist.distributed_c10d._get_default_store()
        found: bytes = store.compare_set(key, "", own)
        return found.decode()
    except Exception:  # the store went with its rank
        return own
