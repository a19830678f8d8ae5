"""`python -m benchmarks [NAME ...] [--size PIXELS] [--json FILE]`, or `make bench ONLY=linear`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.flux import flux
from benchmarks.highres import highres
from benchmarks.linear import core, layer, scaling
from benchmarks.lit import convolution, heads, step
from benchmarks.lit import core as lit_core
from benchmarks.measure import HEADER, Row, keep, line, machine
from benchmarks.ssd import mamba2
from benchmarks.unet import SIZES, unet
from benchmarks.video import block, growth, stream
from benchmarks.video import step as video_step
from benchmarks.window import flex, softmax
from benchmarks.window import scaling as window_scaling

BENCHMARKS = {
    "linear": (core, layer),
    "scaling": (scaling,),
    "unet": (unet,),
    "highres": (highres,),
    "lit": (lit_core, heads, convolution),
    "dit": (step,),
    "window": (flex, softmax, window_scaling),
    "flux": (flux,),
    "ssd": (mamba2,),
    "video": (growth, video_step, block, stream),
}


def main() -> None:
    """Run what was named, print its table as it grows, and keep the rows in results.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--size",
        type=int,
        action="append",
        metavar="PIXELS",
        help=f"of unet's pictures, may be repeated; {', '.join(map(str, SIZES))}",
    )
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"NAME: got {', '.join(unknown)}; expected {', '.join(BENCHMARKS)}")
    if args.size and args.names != ["unet"]:
        parser.error(f"--size: only unet takes sizes; got NAME {' '.join(args.names) or '(all)'}")
    wrong = [size for size in args.size or () if size < 8 or size % 8]
    if wrong:
        parser.error(f"--size: got {wrong[0]}; expected a positive multiple of 8")
    benchmarks = BENCHMARKS | ({"unet": (partial(unet, tuple(args.size)),)} if args.size else {})

    print(machine(), HEADER, sep="\n", flush=True)
    rows: list[Row] = []
    with torch.inference_mode():
        for name in args.names or benchmarks:
            for benchmark in benchmarks[name]:
                for part in benchmark():
                    rows += part
                    print(*map(line, part), sep="\n", flush=True)
                    keep(part)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
