"""Compile every Triton kernel for nine GPUs, without a GPU, and fail on what would make it slow.

    python -m benchmarks.aot            # everything; writes docs/kernels-aot.md
    python -m benchmarks.aot --quick    # a few combinations, writes nothing

A kernel fails on a spilled register, on more shared memory than the chip has, on products that
tensor cores execute twice, and on 2-byte loads of q, k, v, of x, B, C or of their gradients. What
is compiled is what the library launches: the launches are collected from `triton.py` of each family
of kernels itself, with tensors on the meta device. Nothing runs, so nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.aot import elementwise, hybrid, linear, ssd, window
from benchmarks.aot.chips import CHIPS, QUICK, Job, Report, jobs
from benchmarks.aot.compiled import compile_launch
from benchmarks.aot.page import page

PAGE = Path(__file__).parents[2] / "docs" / "kernels-aot.md"


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a kernel fails, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a few combinations, no page")
    parser.add_argument(
        "--chip", action="append", choices=CHIPS, help="only this one, may be repeated; no page"
    )
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    options = parser.parse_args(argv)
    # Interpreted kernels cannot be compiled; workers are spawned, so they import Triton after this.
    os.environ.pop("TRITON_INTERPRET", None)
    chips = options.chip or CHIPS
    wanted = [
        job for job in (QUICK if options.quick else jobs(tuple(ssd.SIZES))) if job[0] in chips
    ]
    by_job: dict[Job, list[Report]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), initializer=_be_nice) as pool:
        for job, reports, seconds in pool.imap_unordered(compile_all, wanted):
            by_job[job] = reports
            _say(f"{len(by_job):3}/{len(wanted)}", job, reports, seconds)
    reports = [r for job in wanted for r in by_job[job]]
    failures = [text for r in reports for text in r.failures()]
    if options.json:
        _write(options.json, json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if not (options.quick or options.chip or failures):
        _write(PAGE, page(reports))
        print(f"wrote {PAGE}")
    print(f"{len(reports)} kernels, {len(failures)} failures; compiled only, never run on a GPU")
    return 1 if failures else 0


def compile_all(job: Job) -> tuple[Job, list[Report], float]:
    """One chip, head size and dtype."""
    chip, d, dtype = job
    start = time.perf_counter()
    if isinstance(d, str):
        wanted = ssd.launches(CHIPS[chip], d, dtype)
    else:
        wanted = linear.launches(CHIPS[chip], d, dtype)
        for family in (window, hybrid, elementwise):
            if d in family.HEAD_DIMS:
                wanted += family.launches(CHIPS[chip], d, dtype)
    reports = [compile_launch(name, launch, chip, d, dtype) for name, launch in wanted]
    return job, reports, time.perf_counter() - start


def _say(progress: str, job: Job, reports: list[Report], seconds: float) -> None:
    """A line for the job, and one on stderr for each failure."""
    chip, d, dtype = job
    for text in (text for r in reports for text in r.failures()):
        print(f"FAIL {text}", file=sys.stderr, flush=True)
    failed = sum(bool(r.failures()) for r in reports)
    spared = sum(bool(r.problems()) for r in reports) - failed
    verdict = f"{failed} FAIL" if failed else "ok"
    if spared:
        verdict = f"blocked form there: {spared} have problems"
    print(
        f"{progress}  {chip:7} {dtype:9} D={d:<4} {len(reports)} kernels {seconds:5.1f} s  "
        f"{verdict}",
        flush=True,
    )


def _be_nice() -> None:
    """Leave the machine usable: a compiler on every core for minutes."""
    os.setpriority(os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0)))


def _write(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
