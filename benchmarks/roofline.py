"""`python -m benchmarks.roofline`: what layers would take on GPUs. Computed, never measured.

`--write` puts the tables into docs/benchmarks.md as well.

The model is `linfusion.attention.cost`, with its formulas, the peaks it assumes and where they are
from. Times are of one layer, forward, in bfloat16, without the projections that it has either way.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from linfusion.attention import cost
from linfusion.attention.cost import CARDS, Pass, seconds

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
START, STOP = "## Computed, never measured: rooflines\n", "## Triton kernels\n"
# Name, heads, columns of a head, pixels of a token at the first level with self-attention.
UNETS = (("SD 1.5", 8, 40, 8), ("SDXL", 10, 64, 16))
SIZES = (512, 1024, 2048, 4096)
# FLUX.1: heads, columns, text tokens, pixels of a token.
FLUX = (24, 128, 512, 16)
RADII = (8, 16)
# Of a scan: heads, channels, features; a video of 65,536 tokens is 16 frames of 1,024 × 1,024.
SCAN = (32, 64, 64)
LENGTHS = (16_384, 65_536, 262_144)
CHUNKS = (64, 256)


def introduction() -> str:
    """What the tables are, what they are not, and what they say of SDXL."""
    _, heads, columns, pixels = UNETS[1]
    tokens = (1024 // pixels) ** 2
    linear, full = (f(2, tokens, heads, columns) for f in (cost.linfusion, cost.softmax))
    short = cost.linfusion(2, tokens, heads, columns, elementwise=cost.LINFUSION_ONE_PASS)
    return (
        "`python -m benchmarks.roofline --write` writes this section. **No GPU took these times**: "
        "each pass over memory is given the time of its bytes or of its products, whichever is "
        "longer, at an assumed part of the peaks of an H100 (SXM) and an RTX 4090. "
        "`linfusion/attention/cost.py` has the formulas, the peaks, where they are from and what "
        "is assumed. Launches and Python are left out, which decide at few tokens. It is one layer, "
        "forward, in bfloat16, without the projections that it has either way.\n\n"
        "**At 1,024 px SDXL gains practically nothing from linear attention**: "
        f"{time_of(linear, cost.H100)} a layer against {time_of(full, cost.H100)} on an H100 as "
        f"operators of PyTorch, {time_of(short, cost.H100)} with the library's kernels, before any "
        "launch is counted; its deeper level, with a quarter of the tokens, loses. The gain begins "
        "at 2,048 px, with SD 1.5 at 1,024 px."
    )


def unets() -> list[list[str]]:
    """LinFusion at the first level of two UNets, with guidance, against softmax."""
    table = [["layer", "tokens", "card", "core", "maps", "elementwise", "LinFusion", "in one pass"]]
    table[0] += ["softmax", "ratios"]
    for name, heads, columns, pixels in UNETS:
        for size in SIZES:
            tokens = (size // pixels) ** 2
            linear = cost.linfusion(2, tokens, heads, columns)
            short = cost.linfusion(2, tokens, heads, columns, elementwise=cost.LINFUSION_ONE_PASS)
            full = cost.softmax(2, tokens, heads, columns)
            for card in CARDS:
                ratios = [seconds(full, card) / seconds(ours, card) for ours in (linear, short)]
                parts = [time_of([one], card) for one in linear]
                table.append(
                    [
                        f"{name}, {size:,} px",
                        f"{tokens:,}",
                        card.name,
                        *parts,
                        time_of(linear, card),
                        time_of(short, card),
                        time_of(full, card),
                        " / ".join(f"{ratio:.1f}×" for ratio in ratios),
                    ]
                )
    return table


def break_even() -> list[list[str]]:
    """Tokens from which on LinFusion takes less time than softmax."""
    table = [["layer", *(card.name for card in CARDS), "by products alone"]]
    for name, heads, columns, _ in UNETS:
        channels = heads * columns
        table.append(
            [
                f"{name}, {heads} × {columns}",
                *(f"{cost.break_even_tokens(card, heads, columns):,}" for card in CARDS),
                f"{2 * channels + columns:,}",
            ]
        )
    return table


def flux() -> list[list[str]]:
    """CLEAR's window in a layer of FLUX.1 against the whole picture; rotary embedding aside."""
    heads, columns, text, pixels = FLUX
    head = ["size", "r", "keys visited", "card", "window", "its text rows", "whole", "ratio"]
    table = [[*head, "rotary, of both"]]
    for size in SIZES[1:]:
        side = size // pixels
        tokens = side * side
        full = cost.softmax(1, tokens + text, heads, columns)
        turned = cost.rotary(1, tokens + text, heads, columns)
        for radius in RADII:
            pixels_rows, text_rows = cost.window(1, (side, side), radius, heads, columns, text)
            for card in CARDS:
                both = seconds([pixels_rows, text_rows], card)
                table.append(
                    [
                        f"{size:,} px",
                        str(radius),
                        f"{cost.keys_visited((side, side), radius):,.0f}",
                        card.name,
                        time_of([pixels_rows], card),
                        time_of([text_rows], card),
                        time_of(full, card),
                        f"{seconds(full, card) / both:.1f}×",
                        time_of(turned, card),
                    ]
                )
    return table


def scans() -> list[list[str]]:
    """MATE's scan by chunk, what surrounds it, and softmax over as many tokens."""
    heads, channels, features = SCAN
    chunks = [f"scan, chunks of {chunk}" for chunk in CHUNKS]
    table = [["tokens", "card", *chunks, "around it", "softmax"]]
    for tokens in LENGTHS:
        full = cost.softmax(1, tokens, heads, channels)
        for card in CARDS:
            times = [
                time_of(cost.scan(1, tokens, heads, channels, features, chunk), card)
                for chunk in CHUNKS
            ]
            around = cost.mate(1, tokens, heads, channels, features, CHUNKS[0])[-1:]
            table.append(
                [f"{tokens:,}", card.name, *times, time_of(around, card), time_of(full, card)]
            )
    return table


def time_of(passes: list[Pass], card: cost.Card) -> str:
    """In microseconds up to ten thousand, then in milliseconds and seconds."""
    micro = 1e6 * seconds(passes, card)
    if micro < 9_999.5:
        return f"{micro:,.0f} µs"
    return f"{micro / 1e3:,.0f} ms" if micro < 9_999.5e3 else f"{micro / 1e6:,.1f} s"


def section() -> str:
    """The tables, in Markdown."""
    heads, channels, features = SCAN
    return "\n\n".join(
        [
            "LinFusion at the first level with self-attention, batch 2 (guidance). *Maps* are the "
            "products of its two MLPs, *elementwise* their norms, activations and residuals, as "
            "operators of PyTorch one after another; *in one pass* is the layer where the "
            "library's kernels take norm and activation together (20 bytes a token and channel "
            "instead of 28):",
            _markdown(unets()),
            "Tokens from which on a layer takes less time than softmax, against those that the "
            "number of products alone gives:",
            _markdown(break_even()),
            f"CLEAR in a layer of FLUX.1 ({FLUX[0]} heads of {FLUX[1]}, {FLUX[2]} text tokens), at "
            "the rate of FlashAttention, which is more than a window reaches; rotary embedding as "
            "diffusers writes it comes on top of either:",
            _markdown(flux()),
            f"A scan of {heads} heads, {channels} channels and {features} features, and what "
            "surrounds it in MATE:",
            _markdown(scans()),
        ]
    )


def _markdown(table: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def page_with(text: str) -> str:
    """The page with the tables in their place, between two headings."""
    before, rest = text.split(START)
    _, after = rest.split(STOP)
    return f"{before}{START}\n{introduction()}\n\n{section()}\n\n{STOP}{after}"


def main(argv: list[str] | None = None) -> None:
    """Print the tables, and write them if that is asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline")
    parser.add_argument("--write", action="store_true", help=f"put them into docs/{PAGE.name}")
    options = parser.parse_args(argv)
    print("Computed from peaks, never measured; the model is linfusion/attention/cost.py.\n")
    print(section())
    if options.write:
        new = PAGE.with_suffix(".tmp")
        new.write_text(page_with(PAGE.read_text()))
        os.replace(new, PAGE)


if __name__ == "__main__":
    main()
