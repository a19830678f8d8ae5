"""Distances between sets of clips, over what their frames show and how they change, and figures
of motion and flicker of each clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from linfusion.evaluation.metrics import frechet_distance, kernel_distance

BATCH = 64  # frames that go through an extractor at a time


class ClipFeatures(NamedTuple):
    """Features [n, F] of n clips: of their frames, and of the differences between them."""

    frames: Tensor
    differences: Tensor


class ClipDistances(NamedTuple):
    """How far two sets of clips are apart, by what is seen (`frames`) and by what moves."""

    frames_frechet: float
    frames_kernel: float
    differences_frechet: float
    differences_kernel: float


def clip_features(clips: np.ndarray | Tensor, extract: Callable[[Tensor], Tensor]) -> ClipFeatures:
    """Mean features of the frames of each clip, and of the differences of neighbours.

    A clip is one row, for rows have to be independent and its frames are not. The difference of
    two frames is taken as the picture (x_{t+1} − x_t) / 2 + 1/2: grey where nothing moves.

    Args:
        clips: uint8 [n, f, H, W, 3]; f at least 2.
        extract: pictures [B, 3, H, W] in [0, 1] -> features [B, F], as in `features`.

    Raises:
        ValueError: clips of another shape or dtype.
    """
    frames, differences = [], []
    for clip in _pictures(clips, least=2):
        frames.append(_mean_features(clip, extract))
        differences.append(_mean_features(clip.diff(dim=0) / 2 + 0.5, extract))
    return ClipFeatures(torch.stack(frames), torch.stack(differences))


def clip_distances(
    x: ClipFeatures, y: ClipFeatures, *, pairs: Tensor | None = None
) -> ClipDistances:
    """Fréchet and kernel distances of two sets of clips, over both kinds of features.

    As with all distances over features, they compare only with others of the same extractor and
    the same number of clips.

    Args:
        x, y: `clip_features` of 2 clips or more each.
        pairs: as in `kernel_distance`, for the kernel distances alone.

    Raises:
        ValueError: as `frechet_distance` and `kernel_distance`.
    """
    return ClipDistances(
        frechet_distance(x.frames, y.frames),
        kernel_distance(x.frames, y.frames, pairs=pairs),
        frechet_distance(x.differences, y.differences),
        kernel_distance(x.differences, y.differences, pairs=pairs),
    )


def motion(clips: np.ndarray | Tensor) -> Tensor:
    """How much of each clip changes from frame to frame: mean |x_{t+1} − x_t|, 0 to 1.

    Args:
        clips: uint8 [n, f, H, W, 3]; f at least 2.

    Returns:
        [n], float64.

    Raises:
        ValueError: clips of another shape or dtype.
    """
    return torch.stack([x.diff(dim=0).abs().mean() for x in _pictures(clips, least=2)])


def flicker(clips: np.ndarray | Tensor) -> Tensor:
    """How far each frame lies from between its neighbours: mean |x_t − (x_{t−1} + x_{t+1}) / 2|.

    Steady change, as of brightness in a fade, has none. Of noise σ that is new in every frame it is
    √(3/4) of `motion`, of frames that alternate all of it; of slow motion a small part. Sharp edges
    that move leave some too, so compare clips of equal motion.

    Args:
        clips: uint8 [n, f, H, W, 3]; f at least 3.

    Returns:
        [n], float64, 0 to 1.

    Raises:
        ValueError: clips of another shape or dtype.
    """
    return torch.stack([x.diff(n=2, dim=0).abs().mean() / 2 for x in _pictures(clips, least=3)])


def _pictures(clips: np.ndarray | Tensor, least: int) -> Iterator[Tensor]:
    """Each clip as [f, 3, H, W] in [0, 1], float64."""
    x = torch.as_tensor(clips)
    if x.ndim != 5 or x.shape[-1] != 3 or x.dtype != torch.uint8 or 0 in x.shape:
        raise ValueError(
            f"clips: got {x.dtype} {tuple(x.shape)}, accepted is uint8 [n, f, H, W, 3]"
        )
    if x.shape[1] < least:
        raise ValueError(f"clips: got {x.shape[1]} frames, accepted is {least} or more")
    return (clip.permute(0, 3, 1, 2).double() / 255 for clip in x)


def _mean_features(pictures: Tensor, extract: Callable[[Tensor], Tensor]) -> Tensor:
    total = sum(extract(part.float()).double().sum(0) for part in pictures.split(BATCH))
    return torch.as_tensor(total) / len(pictures)
