"""Compiled code broken on purpose: does the check notice?

A mutation does to PTX what a wrong compiler or a forgotten barrier would. Not every one can be
noticed: some barriers order what another one orders as well, and what follows a loop's last
`wgmma.wait_group` is another basic block, where registers are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.ptx.cases import CASES
from benchmarks.ptx.comparing import Case, bf16, nan_in_new_memory
from benchmarks.ptx.families.window import window
from benchmarks.ptx.kernels import Emulator


class Mutation(NamedTuple):
    """`change` of the PTX of `kernel`, in a case that launches it."""

    kernel: str
    name: str
    change: Callable[[str], str]
    case: Case


class Seen(NamedTuple):
    """What came of a mutation: whether there was anything to change, which kinds of faults were
    found, and which results were wrong."""

    there: bool
    faults: list[str]
    wrong: list[str]

    @property
    def noticed(self) -> bool:
        return bool(self.faults or self.wrong)


def without(instruction: str, nth: int) -> Callable[[str], str]:
    """Leaves out the nth of an instruction, counted from 0."""

    def change(ptx: str) -> str:
        places = [m.span() for m in re.finditer(rf"{re.escape(instruction)}[^;]*;", ptx)]
        if nth >= len(places):
            return ptx
        start, stop = places[nth]
        return ptx[:start] + ptx[stop:]

    return change


def once(pattern: str, instead: str) -> Callable[[str], str]:
    """Replaces the first match."""
    return lambda ptx: re.sub(pattern, instead, ptx, count=1)


def _waits_later(ptx: str) -> str:
    """Every wait for copies leaves one group more under way."""
    return re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda m: f"{m[1]}{int(m[2]) + 1}", ptx)


def _window(target):  # type: ignore[no-untyped-def]
    return window(target, bf16, (20, 27), 5.0, 2, 64, always=70, backward=False)


def _small_window(target):  # type: ignore[no-untyped-def]
    return window(target, bf16, (16, 16), 4.0, 1, 64, always=20, backward=False)


def mutations(arch: int) -> list[Mutation]:
    """Those for an architecture: sm_90 has instructions of its own."""
    linear = CASES["linear bf16 D=40"]
    cases = {"linear_state_fwd": linear, "linear_out_fwd": linear, "window_fwd": _window}
    if arch == 90:
        return _of_hopper(linear)
    found = [
        Mutation(kernel, f"bar.sync #{i} left out", without("bar.sync", i), cases[kernel])
        for kernel, count in (("linear_state_fwd", 4), ("linear_out_fwd", 4), ("window_fwd", 6))
        for i in range(count)
    ]
    return [
        *found,
        Mutation("linear_state_fwd", "waits one group later", _waits_later, linear),
        Mutation("window_fwd", "waits one group later", _waits_later, _window),
        Mutation(
            "linear_out_fwd",
            "a store without its mask",
            once(r"@%p\d+ (st\.global)", r"\1"),
            linear,
        ),
        Mutation("window_fwd", "ldmatrix not transposed", once(r"x4\.trans", "x4"), _window),
        Mutation(
            "linear_state_reduce",
            "two programs, one output",
            lambda ptx: ptx.replace("%ctaid.x", "%tid.y"),
            linear,
        ),
    ]


def _of_hopper(linear: Case) -> list[Mutation]:
    proxy, wait = "fence.proxy.async", "wgmma.wait_group"
    left_out = [
        ("linear_state_fwd", proxy, 0, linear),
        ("linear_state_fwd", proxy, 1, linear),
        ("linear_out_fwd", proxy, 0, linear),
        ("window_fwd", proxy, 1, _small_window),
        *(("window_fwd", wait, i, _small_window) for i in range(3)),
        *(("window_fwd", "bar.sync", i, _small_window) for i in range(1, 5)),
    ]
    return [
        *(
            Mutation(kernel, f"{name} #{i} left out", without(name, i), case)
            for kernel, name, i, case in left_out
        ),
        Mutation(
            "linear_state_fwd",
            "b of a wgmma not transposed",
            once(r"(wgmma\.mma_async[^;]*), 1;", r"\1, 0;"),
            linear,
        ),
        Mutation("linear_state_fwd", "waits one group later", _waits_later, linear),
    ]


def run(mutation: Mutation, arch: int) -> Seen:
    """Run its case with the changed code."""
    there = False

    def change(kernel: str, ptx: str) -> str:
        nonlocal there
        if kernel != mutation.kernel:
            return ptx
        changed = mutation.change(ptx)
        there = there or changed != ptx
        return changed

    emulator = Emulator(arch, change)
    with nan_in_new_memory():
        comparisons = mutation.case(emulator.target)
    faults = sorted({kind for ran in emulator.ran for kind in ran.faults.kinds()})
    return Seen(there, faults, [c.name for c in comparisons if not c.ok])


def run_mutations(arch: int) -> int:
    """Print what came of each; 0: a mutation that nothing notices is a limit of the check, and of
    those this has some."""
    noticed = found = 0
    for mutation in mutations(arch):
        seen = run(mutation, arch)
        verdict = "noticed" if seen.noticed else "MISSED" if seen.there else "not there"
        found += seen.there
        noticed += seen.there and seen.noticed
        why = ", ".join([*seen.faults, *(f"{name} wrong" for name in seen.wrong)])
        print(f"{verdict:9} {mutation.kernel}: {mutation.name}: {why}", flush=True)
    print(f"{noticed} of {found} mutations noticed on sm_{arch}")
    return 0
