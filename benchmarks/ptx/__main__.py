"""Execute the compiled kernels on the CPU and compare them with the reference.

    python -m benchmarks.ptx                       # every case, as compiled for sm_80
    python -m benchmarks.ptx --arch 90 window      # cases with "window" in their name
    python -m benchmarks.ptx --counts "linear bf16 D=40"
    python -m benchmarks.ptx --mutations           # compiled code broken on purpose

`make ptx ARCH=90` is the same. Nothing runs on a GPU, and nothing here is a time of one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from benchmarks.ptx.races import KINDS


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a result is wrong or a fault was found, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptx", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases with this in their name")
    parser.add_argument("--arch", type=int, default=80, help="80, 86, 89, 90 or 120")
    parser.add_argument("--counts", action="store_true", help="what each launch spent")
    parser.add_argument("--mutations", action="store_true", help="break the code; what is noticed")
    options = parser.parse_args(argv)
    # Interpreted kernels cannot be compiled; read when the kernels are imported.
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks.ptx.cases import CASES
    from benchmarks.ptx.kernels import ARCHS
    from benchmarks.ptx.mutations import run_mutations

    if options.arch not in ARCHS:
        parser.error(f"--arch: got {options.arch}; expected {', '.join(map(str, ARCHS))}")
    if options.mutations:
        if options.names or options.counts:
            parser.error("--mutations: takes neither names nor --counts")
        return run_mutations(options.arch)
    wanted = {n: c for n, c in CASES.items() if _named(n, options.names)}
    if not wanted:
        parser.error(f"NAME: no case has {' or '.join(options.names)} in its name")
    bad = sum(not _run(name, case, options) for name, case in wanted.items())
    print(f"{len(wanted)} cases on sm_{options.arch}, {bad} bad; emulated, never run on a GPU")
    return 1 if bad else 0


def _named(case: str, names: list[str]) -> bool:
    return not names or any(name in case for name in names)


def _run(name: str, case, options: argparse.Namespace) -> bool:  # type: ignore[no-untyped-def]
    """Print a line for a case and one for each fault; whether all is well."""
    from benchmarks.ptx.comparing import nan_in_new_memory
    from benchmarks.ptx.kernels import Emulator

    emulator, start = Emulator(options.arch), time.perf_counter()
    with nan_in_new_memory():
        comparisons = case(emulator.target)
    seconds = time.perf_counter() - start
    faults = [ran for ran in emulator.ran if ran.faults.counts]
    ok = all(c.ok for c in comparisons) and not faults
    errors = ", ".join(f"{c.name} {c.error:.1e}{'' if c.ok else ' WRONG'}" for c in comparisons)
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {errors}  [{seconds:.1f} s]", flush=True)
    for ran in faults:
        for kind in sorted(ran.faults.kinds()):
            print(f"     {ran.kernel}: {kind}: {KINDS[kind]}")
        print(f"     {ran.faults}".replace("\n", "\n     "), flush=True)
    if options.counts:
        for ran in emulator.ran:
            counts = ", ".join(f"{what} {n}" for what, n in sorted(ran.counts.items()))
            print(f"     {ran.kernel} × {ran.programs}: {counts}", flush=True)
    return ok


if __name__ == "__main__":
    sys.exit(main())
