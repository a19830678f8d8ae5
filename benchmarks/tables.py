"""`python -m benchmarks.tables`: the sections "Measured" of the docs, from results.csv."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from benchmarks.measure import RESULTS, machine

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, STOP = "## Measured\n", "## Your own size\n"
LIT_PAGE, LIT_STOP = PAGE.with_name("lit.md"), "## The convolution\n"
LIT_KERNELS = ("lit core", "lit heads", "lit conv", "DiT-XL/2")
HALVES = ("float32", "bfloat16")
RATIOS = ("speedup", "memory_ratio")
HIGH = ("softmax", "linear", "bounded")


def measured(rows: list[dict[str, str]], where: str) -> str:
    """The tables of the rows of one machine, in Markdown; what was not measured stays open."""
    found = {(r["kernel"], r["provider"], int(r["size"]), r["dtype"]): r for r in rows}

    def value(kernel: str, provider: str, size: int, dtype: str, column: str) -> str:
        row = found.get((kernel, provider, size, dtype))
        return f"{float(row[column]):.2f}×" if row else "–"

    parts = [f"On {where}, by the commands above; the rows are `benchmarks/results.csv`."]
    parts.append(
        "The attention core, 8 heads × 40, against the authors' eager formula, and the whole layer"
        " with projections and learned maps, fused:"
    )
    table = [
        [
            "tokens",
            "core fp32",
            "core bf16",
            "memory fp32",
            "memory bf16",
            "layer fp32",
            "layer bf16",
        ]
    ]
    for tokens in (1024, 4096, 16384, 65536):
        core = ("core", "blocked", tokens)
        table.append(
            [f"{tokens:,}"]
            + [value(*core, d, "speedup") for d in HALVES]
            + [value(*core, d, "memory_ratio") for d in HALVES]
            + [value("layer", "linfusion+fuse", tokens, d, "speedup") for d in HALVES]
        )
    parts.append(_markdown(table))
    parts.append(
        "The whole layer is bound by its matrix products, which are the same for both; there the"
        " gain of `fuse` is memory, and time in long inputs."
    )
    parts.append("Time of a token, against that at 16,384 tokens:")
    table = [["tokens", "fp32", "bf16"]]
    for tokens in (65536, 262144):
        relative = [found.get(("scaling", "blocked", tokens, d)) for d in HALVES]
        table.append(
            [f"{tokens:,}", *(f"{1 / float(r['speedup']):.2f}×" if r else "–" for r in relative)]
        )
    parts.append(_markdown(table))
    parts.append(
        "One step of Stable Diffusion 1.5's UNet (random weights, bf16), against softmax through"
        " SDPA:"
    )
    table = [["pixels", "softmax", "linear", "linear, fused", "auto, fused"]]
    for pixels in (512, 1024, 1536):
        softmax = found.get(("unet", "softmax", pixels, "bfloat16"))
        rivals = ("linfusion", "linfusion+fuse", "auto+fuse")
        table.append(
            [str(pixels), f"{float(softmax['ms']) / 1e3:.1f} s" if softmax else "–"]
            + [value("unet", rival, pixels, "bfloat16", "speedup") for rival in rivals]
        )
    parts.append(_markdown(table))
    parts.append(
        "The same step above 1 K, alone in a process: its time, and the peak of that process's"
        " memory with weights and libraries. `bounded` is linear in bands of rows"
        " ([high resolution](high-resolution.md)):"
    )
    table = [["pixels", *(f"{p}{u}" for p in HIGH for u in (", time", ", memory"))]]
    for pixels in (1024, 1536, 2048, 4096, 8192):
        alone = [found.get(("step alone", provider, pixels, "bfloat16")) for provider in HIGH]
        costs = [
            (f"{float(r['ms']) / 1e3:.0f} s", f"{float(r['memory_mb']) / 1024:.1f} GiB")
            if r
            else ("–", "–")
            for r in alone
        ]
        table.append([f"{pixels:,}", *(text for cost in costs for text in cost)])
    parts.append(_markdown(table))
    side = value("step", "bounded", 2048, "bfloat16", "speedup")
    parts.append(f"In turns at 2,048 px the step in bands is {side} as fast as the plain one.")
    parts += _window(found)
    parts += _video(found)
    return "\n\n".join(parts)


def _window(found: dict[tuple[str, str, int, str], dict[str, str]]) -> list[str]:
    """CLEAR: the kernel against its rivals, its growth, and a step of FLUX's width."""
    rivals = [
        ("compiled FlexAttention, 128 × 128, r = 8", "window 8", 128, "speedup"),
        ("compiled FlexAttention, 128 × 128, r = 16", "window 16", 128, "speedup"),
        ("SDPA without a mask, 64 × 64, r = 8", "softmax", 64, "speedup"),
        ("memory of SDPA with a dense mask, 64 × 64, r = 8", "dense mask", 64, "memory_ratio"),
    ]
    table = [["against", "fp32", "bf16"]]
    for name, kernel, side, column in rivals:
        rows = [found.get((kernel, "blocked", side * side, d)) for d in HALVES]
        table.append([name, *(f"{float(r[column]):.2f}×" if r else "–" for r in rows)])
    parts = ["CLEAR's window attention, 8 heads × 64, forward:", _markdown(table)]
    table = [["grid", "fp32", "bf16"]]
    for side in (128, 256, 512):
        rows = [found.get(("window grid", "blocked", side * side, d)) for d in HALVES]
        costs = [f"{1 / float(r['speedup']):.2f}×" if r else "–" for r in rows]
        table.append([f"{side} × {side}", *costs])
    parts += ["Time of a token there, r = 8, against that on a 64 × 64 grid:", _markdown(table)]
    parts.append(
        "One step of a transformer of FLUX's width, cut to 2 double and 4 single blocks (random"
        " weights, bf16), against full attention through SDPA:"
    )
    table = [["pixels", "softmax", "CLEAR, r = 8", "gain", "memory"]]
    for pixels in (1024, 2048):
        rows = [found.get(("flux", p, pixels, "bfloat16")) for p in ("softmax", "clear 8")]
        seconds = [f"{float(r['ms']) / 1e3:.1f} s" if r else "–" for r in rows]
        gains = [f"{float(rows[1][c]):.2f}×" if rows[1] else "–" for c in RATIOS]
        table.append([f"{pixels:,}", *seconds, *gains])
    parts.append(_markdown(table))
    return parts


def _video(found: dict[tuple[str, str, int, str], dict[str, str]]) -> list[str]:
    """The scan, the growth of a video step, its softmax twin, and the memory of a stream."""

    def cells(kernel: str, provider: str, size: int, *columns: str) -> list[str]:
        row = found.get((kernel, provider, size, "float32"))
        return [f"{float(row[column]):.2f}×" if row else "–" for column in columns]

    table = [["chunk and groups", "speed", "memory"]]
    for kernel, name in (("256/8", "256, 8"), ("64/1", "64, 1"), ("64/8", "64, 8")):
        table.append([name, *cells(f"ssd {kernel}", "blocked", 8192, *RATIOS)])
    parts = [
        "Mamba-2's scan, forward and backward, 8,192 tokens, against `transformers`' chunked scan"
        " with the same chunks; 256 and 8 are its defaults:",
        _markdown(table),
        "One step of the zoo's video transformer (random weights, 64 tokens a frame, float32): the"
        " time of a frame against that in 64 frames, and the step, of a whole clip and of one block"
        " of a stream after as many frames, against its twin of full softmax attention:",
    ]
    table = [["latent frames", "a frame", "whole clip", "block"]]
    for frames in (64, 128, 256, 512, 1024):
        row = found.get(("video frame", "mate", frames, "float32"))
        gain = cells("video step", "mate", frames, "speedup")
        after = cells("video block", "mate", min(frames, 1020), "speedup")
        cost = f"{1 / float(row['speedup']):.2f}×" if row else "–"
        table.append([f"{frames:,}", cost, *gain, *after])
    parts.append(_markdown(table))
    ratios = (cells("stream", mixer, 40, "memory_ratio")[0] for mixer in ("mate", "softmax"))
    parts.append(
        "Memory of a stream of 40 blocks over that of one of 4, weights and output left out: {} for"
        " the model, {} for its twin.".format(*ratios)
    )
    return parts


def measured_lit(rows: list[dict[str, str]], where: str) -> str:
    """The tables of LiT's page."""
    found = {(r["kernel"], r["provider"], int(r["size"]), r["dtype"]): r for r in rows}

    def row_of(*key: str | int) -> dict[str, str] | None:
        return found.get(key)  # type: ignore[call-overload,no-any-return]

    def speed(*key: str | int) -> str:
        row = row_of(*key)
        return f"{float(row['speedup']):.2f}×" if row else "–"

    def time(*key: str | int) -> str:
        row = row_of(*key)
        ms = float(row["ms"]) if row else 0
        return "–" if row is None else f"{ms / 1e3:.1f} s" if ms >= 1e3 else f"{ms:.0f} ms"

    parts = [f"On {where}, by `make bench ONLY=lit` and `make bench ONLY=dit`."]
    parts.append(
        "The core of one layer of DiT-XL/2 (width 1152; projections excluded, the convolution"
        " included), two heads, as times as fast as SDPA with 16 heads:"
    )
    table = [["tokens", "picture", "SDPA fp32", "LiT fp32", "", "SDPA bf16", "LiT bf16", ""]]
    for tokens, pixels in ((256, 256), (1024, 512), (4096, 1024), (16384, 2048)):
        line = [f"{tokens:,}", f"{pixels:,} px"]
        for dtype in HALVES:
            ours = ("lit core", "lit h=2", tokens, dtype)
            line += [time("lit core", "sdpa", tokens, dtype), time(*ours), speed(*ours)]
        table.append(line)
    parts.append(_markdown(table))
    parts.append("The same in fp32 for other numbers of heads, and where arithmetic is even:")
    table = [["heads", "even at", *(f"{n:,} tokens" for n in (256, 1024, 4096))]]
    for heads in (1, 2, 4, 8, 16, 32):
        costs = [speed("lit heads", f"lit h={heads}", n, "float32") for n in (256, 1024, 4096)]
        table.append([str(heads), f"{1152 // heads:,} tokens", *costs])
    parts.append(_markdown(table))
    parts.append(
        "The shared filter as one call over the tokens where they lie, against one over"
        " [B·h, d, H, W]: "
        + ", ".join(
            f"{speed('lit conv', 'lit', n, d)} at {n:,} tokens in {d}"
            for n in (1024, 4096)
            for d in HALVES
        )
        + "."
    )
    parts.append(
        "One evaluation of 2 of the 28 equal blocks of DiT-XL/2 with its embeddings and head"
        " (random weights, bf16, batch 1):"
    )
    table = [["pixels", "softmax", "LiT", ""]]
    for pixels in (256, 512, 1024, 2048):
        ours, softmax = (("DiT-XL/2", x, pixels, "bfloat16") for x in ("lit h=2", "softmax"))
        table.append([f"{pixels:,}", time(*softmax), time(*ours), speed(*ours)])
    parts.append(_markdown(table))
    parts.append(
        'With `layers="auto"` the model stays softmax at 256 px: '
        + speed("DiT-XL/2", "lit h=2, auto", 256, "bfloat16")
        + "."
    )
    return "\n\n".join(parts)


def _markdown(table: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def main() -> None:
    """Replace the sections by the rows of the machine this runs on, or else of the last one."""
    rows = list(csv.DictReader(RESULTS.open()))
    lit = [row for row in rows if row["kernel"] in LIT_KERNELS]
    others = [row for row in rows if row["kernel"] not in LIT_KERNELS]
    _replace(PAGE, STOP, measured(*_of_one_machine(others)))
    _replace(LIT_PAGE, LIT_STOP, measured_lit(*_of_one_machine(lit)))


def _of_one_machine(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    known = {row["machine"] for row in rows}
    where = machine() if machine() in known else rows[-1]["machine"]
    return [row for row in rows if row["machine"] == where], where


def _replace(page: Path, stop: str, section: str) -> None:
    """Put what stands between START and `stop`; the page is whole at every instant."""
    before, rest = page.read_text().split(START)
    _, after = rest.split(stop)
    tmp = page.with_suffix(".tmp")
    tmp.write_text(f"{before}{START}\n{section}\n\n{stop}{after}")
    os.replace(tmp, page)


if __name__ == "__main__":
    main()
