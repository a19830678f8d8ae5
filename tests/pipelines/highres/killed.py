"""A run that is killed four times and goes on each time, beside one that is left alone.

    python -m tests.pipelines.highres.killed FOLDER

Every run is a fork of this process, which has computed nothing itself: a fork after OpenMP has
started its threads would hang.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)

from linfusion import HighResPipeline
from linfusion.files.picture_writer import PictureWriter
from tests.tiny import tiny_scheduler, tiny_sd_pipeline

CASES = {
    "ddim": (DDIMScheduler, "sdedit"),
    "multistep": (DPMSolverMultistepScheduler, "sdedit"),
    "ancestral": (EulerAncestralDiscreteScheduler, "guided"),
}
# Each run dies at its n-th: forward, in the middle of it; renaming of a finished file, before it;
# band of the last picture.
DEATHS = (("forward", 3), ("rename", 2), ("forward", 3), ("band", 1))


def draw(folder: Path, case: str, resume: bool, death: tuple[str, int] | None) -> None:
    """One run, of which the process does not come back."""
    kind, strategy = CASES[case]
    pipe = tiny_sd_pipeline(scheduler=kind.from_config(tiny_scheduler().config))
    calls = 0

    def die(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == death[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        def dying(*args, **kwargs):
            die()
            return function(*args, **kwargs)

        return dying

    if death and death[0] == "forward":
        pipe.unet.mid_block.register_forward_pre_hook(die)
    elif death and death[0] == "rename":
        os.replace = before(os.replace)
    elif death:
        PictureWriter.write = before(PictureWriter.write)
    HighResPipeline(pipe)(
        "a red apple",
        size=96,
        base_size=64,
        strategy=strategy,
        strengths=0.75,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output=folder / "picture.png",
        state=folder / "state",
        resume=resume,
    )


def in_a_fork(*arguments: object) -> int:
    """The signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            draw(*arguments)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)


def main() -> None:
    root = Path(sys.argv[1])
    for case in CASES:
        for name in ("alone", "killed"):
            (root / case / name).mkdir(parents=True)
        ends = [in_a_fork(root / case / "alone", case, False, None)]
        for i, death in enumerate((*DEATHS, None)):
            ends.append(in_a_fork(root / case / "killed", case, i > 0, death))
        print(case, *ends)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
