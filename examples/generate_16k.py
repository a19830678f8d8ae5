"""A picture of 16,384 × 16,384 pixels with the shipped model, on two cores and 24 GiB.

    python examples/generate_16k.py --prompt "a red heart"

Prints what it is going to take, then draws. Stop it whenever you like (or lose power): the same
command goes on where it was. `--size 512` shows the same in a minute.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from linfusion import HighResPipeline, zoo
from linfusion.cli.console import say
from linfusion.cli.measure import human_bytes

# Five stages: 128, 512, 2,048, 8,192 and 16,384 px. 128 px is what the model is trained at; above,
# it draws the same thing several times over. Jumps of 4 rather than 2 leave out decodings and
# encodings, and what they would add is denoised in the stages there are.
BASE, FACTOR = 128, 4
STRENGTHS = (0.4, 0.3, 0.2, 0.1)  # of 20 steps: 8, 6, 4 and 2; a step at 16K costs four at 8K
STEPS, GUIDANCE = 20, 4.0  # what the model's card recommends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red heart")
    parser.add_argument("--size", type=int, default=16_384, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-budget", default="18GB", help="for the model and what it holds")
    parser.add_argument("--output", type=Path, default=Path("16k.png"))
    parser.add_argument("--state", type=Path, default=Path("16k.state"), help="what was done")
    parser.add_argument("--dry-run", action="store_true", help="print the plan alone")
    options = parser.parse_args()

    pipe = zoo.load("emoji", dtype=torch.bfloat16)
    highres = HighResPipeline(pipe, memory_budget=options.memory_budget)
    call = {
        "prompt": options.prompt,
        "size": options.size,
        "base_size": min(BASE, options.size),
        "factor": FACTOR,
        "strengths": STRENGTHS,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output": options.output,
    }
    print(highres.plan(**call), flush=True)
    if options.dry_run:
        return
    begun = time.perf_counter()
    highres(
        **call,
        generator=torch.Generator().manual_seed(options.seed),
        state=options.state,
        resume=True,
    )
    seconds = time.perf_counter() - begun
    say(f"{seconds / 60:.1f} min, peak {human_bytes(peak())} of memory")
    print(options.output)


def peak() -> int:
    """The most memory this process has held, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
