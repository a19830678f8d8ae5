"""`python -m benchmarks [NAME ...] [--json FILE]`, or `make bench ONLY=linear`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.linear import core, layer, scaling
from benchmarks.measure import HEADER, Row, keep, line, machine
from benchmarks.unet import unet

BENCHMARKS = {"linear": (core, layer), "scaling": (scaling,), "unet": (unet,)}


def main() -> None:
    """Run what was named, print its table as it grows, and keep the rows in results.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"NAME: got {', '.join(unknown)}; expected {', '.join(BENCHMARKS)}")

    print(machine(), HEADER, sep="\n", flush=True)
    rows: list[Row] = []
    with torch.inference_mode():
        for name in args.names or BENCHMARKS:
            for benchmark in BENCHMARKS[name]:
                for part in benchmark():
                    rows += part
                    print(*map(line, part), sep="\n", flush=True)
                    keep(part)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
