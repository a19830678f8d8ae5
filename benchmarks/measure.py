"""Time and memory of rivals, measured in turns, and the machine they ran on."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from linfusion.cli.measure import measure

RESULTS = Path(__file__).parent / "results.csv"
KEY = ("kernel", "provider", "size", "dtype", "machine")


@dataclass
class Row:
    """One rival at one size.

    Attributes:
        kernel: what was computed.
        provider: who computed it.
        size: tokens or pixels.
        dtype: of the inputs.
        ms: median time of a run.
        memory_mb: peak resident memory of a run above that before it.
        speedup: median time of the first rival over this one's.
        memory_ratio: this one's extra memory over the first rival's.
        error: relative RMS against float64; empty if not measured.
        runs: interleaved runs the median is of.
        machine: processor, cores and torch.
    """

    kernel: str
    provider: str
    size: int
    dtype: str
    ms: float
    memory_mb: float
    speedup: float
    memory_ratio: float
    error: float | None
    runs: int
    machine: str


def machine() -> str:
    """Processor, instruction sets that matter here, threads and torch version."""
    flags, model = "", platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(
            tuple(part.strip() for part in line.split(":", 1))
            for line in info.read_text().splitlines()
            if ":" in line
        )
        model, flags = lines.get("model name", model), lines.get("flags", "")
    sets = [name for name in ("avx512_bf16", "amx_bf16") if name in flags.split()]
    parts = [model, *sets, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    return ", ".join(parts)


def peak_extra_mb(run: Callable[[], object]) -> float:
    """How far resident memory rises above its level before `run`, in MiB; NaN outside Linux."""
    _, _, extra = measure(run)
    return float("nan") if extra is None else extra / 2**20


def _wait() -> None:
    """What was launched on an accelerator is done before a clock is read."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def compare(
    kernel: str,
    size: int,
    dtype: torch.dtype,
    rivals: dict[str, Callable[[], object]],
    *,
    runs: int,
    errors: dict[str, float] | None = None,
    before: dict[str, Callable[[], object]] | None = None,
    warm: bool = True,
) -> list[Row]:
    """Run every rival in turn, `runs` times after one warm-up; the first is the one to beat.

    Args:
        before: what to do, off the clock, ahead of each run of a rival.
        warm: False for work of minutes: no warm-up, and the first run is timed and weighed at once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    memory: dict[str, float] = {}
    for turn in range(runs + 1 if warm else runs):
        for name, run in rivals.items():
            if before is not None:
                before[name]()
            if turn == 0 and not warm:
                _, took, extra = measure(run)
                seconds[name].append(took)
                memory[name] = float("nan") if extra is None else extra / 2**20
                continue
            if turn == 0:
                run()  # buffers, packed weights and threads are set up once
                memory[name] = peak_extra_mb(run)
                continue
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(rivals))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        Row(
            kernel=kernel,
            provider=name,
            size=size,
            dtype=str(dtype).removeprefix("torch."),
            ms=round(median[name] * 1e3, 3),
            memory_mb=round(memory[name], 1),
            speedup=round(median[first] / median[name], 2),
            memory_ratio=round(memory[name] / max(memory[first], 1e-9), 2),
            error=None if errors is None else float(f"{errors[name]:.2e}"),
            runs=runs,
            machine=machine(),
        )
        for name in rivals
    ]


def in_turns(
    kernel: str,
    dtype: torch.dtype,
    provider: str,
    sizes: dict[int, Callable[[], object]],
    *,
    runs: int,
) -> list[Row]:
    """One provider at several sizes, in turns; the first row's time is that of the first size."""
    named = {str(size): run for size, run in sizes.items()}
    rows = compare(kernel, 0, dtype, named, runs=runs)
    for row, size in zip(rows, sizes, strict=True):
        row.size, row.provider = size, provider
    return rows


HEADER = (
    f"{'':12}{'':18}{'size':>8}  {'dtype':9}{'ms':>11}{'speed':>8}{'MB':>9}{'memory':>9}  error"
)


def line(row: Row) -> str:
    """A row as text, under HEADER."""
    error = "" if row.error is None else f"{row.error:.2e}"
    return (
        f"{row.kernel:12}{row.provider:18}{row.size:>8}  {row.dtype:9}{row.ms:>11.2f}"
        f"{row.speedup:>7.2f}×{row.memory_mb:>9.1f}{row.memory_ratio:>8.2f}×  {error}"
    )


def keep(rows: list[Row], path: Path = RESULTS) -> None:
    """Put rows into the table of results; a row replaces the one with the same key."""
    old: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    table = {tuple(row[name] for name in KEY): row for row in old}
    for row in rows:
        values = {name: "" if x is None else str(x) for name, x in asdict(row).items()}
        table[tuple(values[name] for name in KEY)] = values
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))
