"""The last picture: into a file, or as the caller wants it."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from linfusion.files.picture_reader import bytes_needed, writer
from linfusion.pipelines.highres.denoise import whole_picture
from linfusion.pipelines.highres.forecast import latent_size
from linfusion.pipelines.highres.stages import Job, Stage

Bands = Generator[np.ndarray, None, None]


def write_bands(job: Job, bands: Bands, about: dict[str, Any]) -> Path:
    """The file that the job names, from bands of uint8 rows, with what it was made by."""
    assert job.output is not None
    with (
        writer(job.output, job.width, job.height, parameters=about) as file,
        contextlib.closing(bands),
    ):
        for band in bands:
            file.write(band)
    return job.output


def as_images(job: Job, bands: Bands, stage: Stage) -> Any:
    """One picture, of that stage, as the job's `output_type` asks for it."""
    picture = whole_picture(bands, stage.height, stage.width)
    if job.output_type == "pil":
        return [Image.fromarray(picture)]
    values = picture[None].astype(np.float32) / 255
    if job.output_type == "pt":
        return torch.from_numpy(values).permute(0, 3, 1, 2)
    return values


def check_disk(pipe: Any, job: Job, state: str | Path | None) -> None:
    """What is sure not to fit is refused, what may not is said."""
    if job.output is not None:
        need = bytes_needed(job.output, job.width, job.height)
        free = shutil.disk_usage(job.output.parent).free
        message = f"output: {job.output} takes up to {need:,} bytes, and {free:,} are free"
        if free < need and job.output.suffix.lower() in (".tif", ".tiff"):
            raise ValueError(message)
        if free < need:
            warnings.warn(message, stacklevel=4)
    if state is not None:
        folder = Path(state).resolve()
        while not folder.exists():
            folder = folder.parent
        sizes = [latent_size(pipe, s) for s in job.stages]
        held = 4 * pipe.vae.config.latent_channels
        need = held * (2 * sum(h * w for h, w in sizes) + 8 * sizes[-1][0] * sizes[-1][1])
        if (free := shutil.disk_usage(folder).free) < need:
            raise ValueError(f"state: {state} takes up to {need:,} bytes, and {free:,} are free")
