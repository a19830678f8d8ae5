"""What a video model is trained on, one stage after the other: settings of the method "lingen"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from linfusion.training.schema import Count, Share

_STAGE = r"[1-9]\d*,[1-9]\d*,[1-9]\d*"
STILLS = 0.25  # of the batches


class Stage(NamedTuple):
    """So many steps on clips of so many frames and pixels a side."""

    steps: int
    frames: int
    size: int


@dataclass(frozen=True)
class ClipOptions:
    """What the method "lingen" takes.

    Args:
        clip_schedule: "steps,frames,size;..." one after the other; `max_train_steps` is their sum
            unless given, and the last one goes on.
        clip_stride: every so many frames of a file are one of a clip.
        proportion_stills: share of batches that are single frames, of the pictures in the folder
            or, where there are none, of the clips.

    Raises:
        ValueError: a schedule that is none.
    """

    clip_schedule: str = ""
    clip_stride: Count = 1
    proportion_stills: Share = STILLS

    def __post_init__(self) -> None:
        if re.fullmatch(f"({_STAGE};)*{_STAGE}", self.clip_schedule) is None:
            raise ValueError(
                f"clip_schedule: got {self.clip_schedule!r}, accepted is steps,frames,size;..."
            )

    @property
    def stages(self) -> list[Stage]:
        """Of the schedule."""
        return [Stage(*map(int, part.split(","))) for part in self.clip_schedule.split(";")]
