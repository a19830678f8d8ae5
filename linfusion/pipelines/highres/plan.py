"""What a high-resolution run will take, as a table and as JSON values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """One piece of a run.

    Attributes:
        what: "denoise", "decode" or "encode".
        height, width: of the picture, in pixels.
        strength: of a later stage's noise.
        steps: calls of the denoiser; 1 for decoding and encoding.
        peak_bytes: the most that weights, whole tensors, bands and pictures take at once.
        scratch_bytes: the most that lies in the scratch folder.
        flops: of one step; guidance and second passes counted.
        seconds: of all steps, where they were estimated.
    """

    what: str
    height: int
    width: int
    strength: float | None
    steps: int
    peak_bytes: int
    scratch_bytes: int
    flops: int
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        work: its pieces in order.
        weights_bytes: of all models of the pipeline.
        process_bytes: of Python and its libraries, which the budget does not count; 0 on a GPU.
        memory_budget: what was asked for, if anything.
        output_bytes: the most that the file and its preview can take.
        free_bytes: on the disk of the file.
    """

    work: tuple[Work, ...]
    weights_bytes: int
    process_bytes: int
    memory_budget: int | None
    output_bytes: int | None
    free_bytes: int | None

    @property
    def peak_bytes(self) -> int:
        """The most that the process will take."""
        return self.process_bytes + max(w.peak_bytes for w in self.work)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where no time was measured."""
        if any(w.seconds is None for w in self.work):
            return None
        return sum(w.seconds or 0.0 for w in self.work)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        totals = {"peak_bytes": self.peak_bytes, "seconds": self.seconds}
        return {**asdict(self), "work": [asdict(w) for w in self.work], **totals}

    def rows(self) -> list[list[str]]:
        """A table: the heading, a row a piece, and the totals."""
        table = [["", "size", "strength", "steps", "memory", "scratch", "TFLOP", "time"]]
        for w in self.work:
            strength = "" if w.strength is None else f"{w.strength:.3g}"
            steps = str(w.steps) if w.what == "denoise" else ""
            total = w.flops * w.steps / 1e12
            table.append([
                w.what, f"{w.width}×{w.height}", strength, steps, _gigabytes(w.peak_bytes),
                _gigabytes(w.scratch_bytes) if w.scratch_bytes else "", f"{total:.3g}",
                _duration(w.seconds),
            ])  # fmt: skip
        forwards = sum(w.steps for w in self.work if w.what == "denoise")
        flops = sum(w.flops * w.steps for w in self.work) / 1e12
        scratch = max(w.scratch_bytes for w in self.work)
        table.append([
            "in all", "", "", str(forwards), _gigabytes(self.peak_bytes),
            _gigabytes(scratch) if scratch else "", f"{flops:.3g}", _duration(self.seconds),
        ])  # fmt: skip
        return table

    def notes(self) -> list[str]:
        """What the table does not say."""
        notes = [
            f"memory in all: with {_gigabytes(self.process_bytes)} of Python and its libraries;"
            f" weights are {_gigabytes(self.weights_bytes)} of each row"
        ]
        if self.memory_budget is not None:
            notes.append(f"budget: {_gigabytes(self.memory_budget)}, not counting the libraries")
        if self.output_bytes is not None and self.free_bytes is not None:
            notes.append(
                f"file: up to {_gigabytes(self.output_bytes)};"
                f" {_gigabytes(self.free_bytes)} are free"
            )
        return notes

    def __str__(self) -> str:
        table = self.rows()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(
                c.rjust(w) if i else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join([*(line.rstrip() for line in lines), *self.notes()])


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
