"""Loads, stores, asynchronous copies and barriers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.ptx.memory import GlobalMemory
from benchmarks.ptx.numbers import TYPES, UNSIGNED, Array, u1, u2, u4
from benchmarks.ptx.operands import Operands, Read, Step, dtype_of
from benchmarks.ptx.shared import Lanes, SharedMemory

if TYPE_CHECKING:
    from benchmarks.ptx.ctas import Ctas

_EVERYTHING = slice(None)
_SPACES: dict[str, Callable[[Ctas], GlobalMemory | SharedMemory]] = {
    "global": lambda g: g.launch.memory,
    "shared": lambda g: g.shared,
}


def _who(o: Operands, address: Read) -> Callable[[Ctas], tuple[Lanes, Array]]:
    """The threads that execute a statement, and the address of each."""
    predicate = o.predicate

    def who(g: Ctas) -> tuple[Lanes, Array]:
        addresses = np.broadcast_to(address(g), g.lanes)
        if predicate is None:
            return _EVERYTHING, addresses
        lanes = np.flatnonzero(predicate(g))
        return lanes, addresses[lanes]

    return who


def _form(o: Operands, pointer: int) -> tuple[str, int, int, Callable[[Ctas], tuple[Lanes, Array]]]:
    """Space, bytes of an element, elements, and who accesses which address."""
    s = o.statement
    space = s.modifiers[0].partition("::")[0]
    size = TYPES[s.modifiers[-1]].bits // 8
    count = next((int(m[1:]) for m in s.modifiers if re.fullmatch(r"v[248]", m)), 1)
    if space not in _SPACES:
        raise NotImplementedError(f"memory of the kind {space}")
    return space, size, count, _who(o, o.address(pointer, 64 if space == "global" else 32))


def load(o: Operands) -> Step:
    """`ld.global`, `ld.shared` and `ld.param`."""
    s = o.statement
    if s.modifiers[0] == "param":
        name, write = s.operands[1].strip("[] "), o.write(s.operands[0])
        return lambda g: write(g, g.launch.parameter(name))
    space, size, count, who = _form(o, 1)
    names = o.vector(0)
    places = [o.place(name) for name in names]
    dtypes = [dtype_of(name) for name in names]

    def step(g: Ctas) -> None:
        lanes, addresses = who(g)
        memory = _SPACES[space](g)
        at = memory.locate(g, s, addresses, size * count, lanes, write=False) // size
        elements = memory.data.view(UNSIGNED[8 * size])
        for i, (place, dtype) in enumerate(zip(places, dtypes, strict=True)):
            loaded = elements[at + i].astype(dtype, copy=False)
            if lanes is not _EVERYTHING:
                old = g.registers[place]
                whole = np.zeros(g.lanes, dtype) if old is None else old.copy()
                whole[lanes] = loaded
                loaded = whole
            g.registers[place] = loaded

    return step


def store(o: Operands) -> Step:
    """`st.global` and `st.shared`; two threads that store to a place must agree."""
    s = o.statement
    space, size, count, who = _form(o, 0)
    dtype = UNSIGNED[8 * size]
    values = [o.bits(x, max(16, 8 * size)) for x in o.vector(1)]

    def step(g: Ctas) -> None:
        lanes, addresses = who(g)
        memory = _SPACES[space](g)
        at = memory.locate(g, s, addresses, size * count, lanes, write=True) // size
        elements = memory.data.view(dtype)
        stored = [np.broadcast_to(x(g), g.lanes)[lanes].astype(dtype) for x in values]
        for i, x in enumerate(stored):
            elements[at + i] = x
        for i, x in enumerate(stored):
            if (other := elements[at + i] != x).any():
                text = "two threads of one store, two values"
                memory.faults.add(f"{space}-race", s, other.sum(), text)

    return step


def asynchronous(o: Operands) -> Step:
    """`cp.async`: a copy, the end of a group of them, a wait."""
    s = o.statement
    if s.modifiers[:2] == ("async", "commit_group"):
        return lambda g: g.shared.commit()
    if s.modifiers[:2] == ("async", "wait_group"):
        left = int(s.operands[0], 0)
        return lambda g: g.shared.wait(g, left)
    if s.modifiers[:2] == ("async", "wait_all"):
        return _wait_for_all
    if s.modifiers[1] not in ("ca", "cg"):
        raise NotImplementedError("copies of another kind")
    size = int(s.operands[2], 0)
    target, source = o.address(0, 32), o.address(1, 64)
    bytes_ = o.bits(s.operands[3], 32) if len(s.operands) > 3 else None
    predicate = o.predicate

    def step(g: Ctas) -> None:
        lanes = np.arange(g.lanes) if predicate is None else np.flatnonzero(predicate(g))
        data = np.zeros((len(lanes), size), u1)
        wanted = np.full(len(lanes), size, u4)
        if bytes_ is not None:
            wanted = np.broadcast_to(bytes_(g), g.lanes)[lanes]
        if ((wanted != 0) & (wanted != size)).any():
            raise NotImplementedError("a copy of a part, with zeros behind it")
        some = wanted > 0
        if some.any():
            addresses = np.broadcast_to(source(g), g.lanes)[lanes][some]
            memory = g.launch.memory
            at = memory.locate(g, s, addresses, size, lanes[some], write=False)
            data[some] = memory.data[at[:, None] + np.arange(size)]
        g.shared.copy(g, s, np.broadcast_to(target(g), g.lanes)[lanes], data, lanes)

    return step


def _wait_for_all(g: Ctas) -> None:
    g.shared.commit()
    g.shared.wait(g, 0)


def barrier(o: Operands) -> Step:
    """`bar.sync` of a whole CTA; `bar.warp.sync` orders what is in lockstep here anyway."""
    s = o.statement
    if "warp" in s.modifiers:
        return lambda g: None
    if s.operands != ("0",) or s.modifiers[-1] != "sync":
        raise NotImplementedError("a barrier of a part of the CTA")
    return lambda g: g.barrier()


def fence(o: Operands) -> Step:
    """`fence.proxy.async` lets wgmma read what was stored; another fence orders nothing more."""
    if "proxy" in o.statement.modifiers:
        return lambda g: g.shared.fence_proxy()
    return lambda g: None


def _matrices(o: Operands) -> tuple[int, bool, Callable[[Ctas], tuple[Array, Array]]]:
    """Of ldmatrix and stmatrix: how many 8 × 8 matrices, transposed or not, addresses of rows."""
    s = o.statement
    if s.modifiers[-1] != "b16" or o.predicate is not None:
        raise NotImplementedError("matrices of another type, or under a predicate")
    count = next(int(m[1:]) for m in s.modifiers if m in ("x1", "x2", "x4"))
    address = o.address(1 if s.kind == "ldmatrix" else 0, 32)

    def rows(g: Ctas) -> tuple[Array, Array]:
        lanes = np.arange(g.lanes).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        return lanes, np.broadcast_to(address(g), g.lanes)[lanes]

    return count, "trans" in s.modifiers, rows


def load_matrix(o: Operands) -> Step:
    """`ldmatrix`: the first 8 threads of a warp give the rows of the first matrix, and so on."""
    s = o.statement
    count, transposed, rows = _matrices(o)
    writes = [o.write(name) for name in o.vector(0)]

    def step(g: Ctas) -> None:
        lanes, addresses = rows(g)
        at = g.shared.locate(g, s, addresses, 16, lanes, write=False) // 2
        found = g.shared.data.view(u2)[at[:, None] + np.arange(8)].reshape(-1, count, 8, 8)
        if transposed:
            found = found.swapaxes(2, 3)
        for i, write in enumerate(writes):
            write(g, np.ascontiguousarray(found[:, i]).view(u4).reshape(-1))

    return step


def store_matrix(o: Operands) -> Step:
    """`stmatrix`, the reverse."""
    s = o.statement
    count, transposed, rows = _matrices(o)
    values = [o.bits(name, 32) for name in o.vector(1)]

    def step(g: Ctas) -> None:
        lanes, addresses = rows(g)
        at = g.shared.locate(g, s, addresses, 16, lanes, write=True) // 2
        registers = [np.broadcast_to(x(g), g.lanes).reshape(-1, 32) for x in values]
        stored = np.stack(registers, 1).view(u2).reshape(-1, count, 8, 8)
        if transposed:
            stored = stored.swapaxes(2, 3)
        g.shared.data.view(u2)[at[:, None] + np.arange(8)] = stored.reshape(-1, 8)

    return step


BUILDERS: dict[str, Callable[[Operands], Step]] = {
    "ld": load,
    "st": store,
    "cp": asynchronous,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
    "membar": fence,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
}
