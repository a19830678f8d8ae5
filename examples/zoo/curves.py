"""Draw the curves of `ablate_dit.py` as an SVG: kernel distance against steps, a line a model.

python examples/zoo/curves.py runs/ablation/results.json docs/images/lit-ablation.svg
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 56, 150, 16, 44
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # Okabe and Ito's
TICKS = (1, 2, 5)  # of a decade


def draw(curves: Mapping[str, Mapping[int, float]], level: float | None = None) -> str:
    """Lines of points (step, distance) by name, and a dashed one at the teacher's distance.

    Distances are on a logarithmic axis; an unbiased estimate that is not positive has no place on
    it, and is an error.
    """
    values = [y for curve in curves.values() for y in curve.values()]
    values += [] if level is None else [level]
    if not values or min(values) <= 0:
        raise ValueError(f"curves: expected distances above 0, got {min(values, default=None)}")
    low, high = math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05
    last = max(step for curve in curves.values() for step in curve)

    def at(step: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(y)) / (high - low)

    parts = []
    for decade in range(math.floor(low), math.ceil(high) + 1):
        for tick in (t * 10.0**decade for t in TICKS):
            if low <= math.log10(tick) <= high:
                y = at(0, tick)[1]
                parts.append(_line([(LEFT, y), (WIDTH - RIGHT, y)], "#ddd"))
                parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    for step in sorted({step for curve in curves.values() for step in curve}):
        parts.append(_text(at(step, values[0])[0], HEIGHT - BOTTOM + 18, f"{step:,}", "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 6, "training steps", "middle"))
    if level is not None:
        y = at(0, level)[1]
        parts.append(_line([(LEFT, y), (WIDTH - RIGHT, y)], "#555", dashed=True))
    ends = [(at(max(curve), curve[max(curve)])[1], name) for name, curve in curves.items()]
    ends += [] if level is None else [(at(0, level)[1], "teacher")]
    place = -math.inf
    for y, name in sorted(ends):
        place = max(y + 4, place + 15)  # names of lines that end together stand below each other
        parts.append(_text(WIDTH - RIGHT + 8, place, name, "start", _colour(name, curves)))
    for name, curve in curves.items():
        points, colour = [at(*point) for point in sorted(curve.items())], _colour(name, curves)
        parts.append(_line(points, colour))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _colour(name: str, curves: Mapping[str, object]) -> str:
    return COLOURS[list(curves).index(name) % len(COLOURS)] if name in curves else "#555"


def _line(points: list[tuple[float, float]], colour: str, dashed: bool = False) -> str:
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    width = 1 if colour == "#ddd" else 2
    return (
        f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'
    )


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="results.json of ablate_dit.py")
    parser.add_argument("output", type=Path, help="an .svg file")
    args = parser.parse_args()
    found = json.loads(args.results.read_text())
    level = found.pop("teacher", None)
    curves = {n: {int(step): y for step, y in c.items()} for n, c in found.items()}
    tmp = args.output.with_suffix(".tmp")
    tmp.write_text(draw(curves, level))
    os.replace(tmp, args.output)


if __name__ == "__main__":
    main()
