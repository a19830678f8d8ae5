"""Streams that are killed before they rename a file.

    python -m tests.pipelines.lingen.killed_stream FOLDER

Every stream is a fork of this process, which has computed nothing itself: a fork after OpenMP has
started its threads would hang.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from tests.tiny_video import tiny_lingen

DEATHS = (1, 2, 3, 5)  # parameters, a block, its session, the next session
CALL = {"prompt": "a waving hand", "num_frames": 9, "num_inference_steps": 2}


def draw(folder: Path, death: int) -> None:
    """One stream, of which the process does not come back."""
    rename, calls = os.replace, 0

    def dying(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == death:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)

    os.replace = dying
    list(tiny_lingen().stream(**CALL, generator=torch.Generator().manual_seed(3), state=folder))


if __name__ == "__main__":
    for death in DEATHS:
        child = os.fork()
        if not child:
            draw(Path(sys.argv[1]) / str(death), death)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
