"""Clips and pictures that a video model learns from: read, encoded once, and given in batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from linfusion.files.video_reader import count_frames, frames
from linfusion.pipelines.lingen.latents import encode_clip, latent_frames, ratios
from linfusion.training.config import TrainConfig
from linfusion.training.data.cache import module_digest, text_states
from linfusion.training.data.pictures import (
    IMAGE_SUFFIXES,
    captioned_files,
    digest,
    file_digest,
    fit,
)
from linfusion.training.data.rows import filled
from linfusion.training.data.schedule import Stage
from linfusion.training.teachers.lingen import LinGenHost

VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")
SUFFIXES = (*IMAGE_SUFFIXES, ".gif", *VIDEO_SUFFIXES)


@dataclass(frozen=True)
class Film:
    """A clip, or a picture, which has one frame; its caption, and what its content goes by."""

    path: Path
    caption: str
    digest: str
    frames: int

    def pictures(self, stride: int) -> Iterator[Image.Image]:
        """Every `stride`-th frame."""
        for i, frame in enumerate(frames(self.path, "train_data_dir")):
            if i % stride == 0:
                yield Image.fromarray(frame)


def film_folder(config: TrainConfig) -> list[Film]:
    """Clips and pictures of `train_data_dir`, captioned as those of an image folder.

    Animated pictures and videos are clips; videos are read with PyAV.

    Raises:
        ImportError: PyAV is missing (extra `video`) and there is a video.
        ValueError: no such folder, nothing in it, something without caption, or that cannot be
            read.
    """
    assert config.train_data_dir is not None  # TrainConfig takes no other source
    pairs = captioned_files(
        config.train_data_dir,
        SUFFIXES,
        image_column=config.image_column,
        caption_column=config.caption_column,
        anywhere=config.metadata_anywhere,
    )
    stride = config.options.clip_stride
    return [
        Film(path, caption, file_digest(path), -(-count_frames(path, "train_data_dir") // stride))
        for path, caption in pairs[: config.max_train_samples]
    ]


def check_films(config: TrainConfig, host: LinGenHost, films: Sequence[Film]) -> None:
    """Refuse a schedule that the model, its VAE or the clips do not fit.

    Raises:
        ValueError: it does not; the message names the stage.
    """
    ratio, patch = ratios(host.pipe.vae)[0], host.model.config.patch_size[0]
    clips = [film for film in films if film.frames > 1]
    if not clips:
        raise ValueError(f"train_data_dir: {config.train_data_dir} has pictures alone, no clip")
    shortest = min(clips, key=lambda film: film.frames)
    for stage in config.options.stages:
        where = f"clip_schedule: {','.join(map(str, stage))}"
        if stage.size % host.multiple:
            raise ValueError(f"{where}: the size is no multiple of {host.multiple}")
        made = 1 + (latent_frames(host.pipe.vae, stage.frames, patch) - 1) * ratio
        if made != stage.frames:
            raise ValueError(f"{where}: the VAE and the model make {made} frames of these")
        if stage.frames > shortest.frames:
            raise ValueError(f"{where}: {shortest.path} has only {shortest.frames} frames")
        tokens = ((stage.frames - 1) // ratio + 1) // patch
        model = host.model.config
        counted = model.causal_blocks and model.get("time_positions", "video") == "video"
        if counted and tokens > model.pos_embed_size[0]:
            raise ValueError(f"{where}: the model has positions for {model.pos_embed_size[0]}")


class FilmSet:
    """Cached latents of clips and pictures with their text states; a batch is a function.

    A batch is of clips as the schedule has them at its step or, with chance `proportion_stills`, of
    single frames: of the pictures, or of the clips where there are none. What a batch holds depends
    on the seed, its number and the process alone.

    Args:
        config: seed, batch size, schedule, share of stills and of empty prompts.
        host: encodes what the cache lacks.
        films: such as `check_films` lets pass.
        processes: how many share a batch number.
    """

    batches_per_epoch = 1  # a run has the steps of its schedule

    def __init__(
        self, config: TrainConfig, host: LinGenHost, films: Sequence[Film], *, processes: int = 1
    ) -> None:
        self._config, self._films = config, films
        self._stages = config.options.stages
        self._ratio = ratios(host.pipe.vae)[0]
        self._clips = [i for i, film in enumerate(films) if film.frames > 1]
        self._stills = [i for i, film in enumerate(films) if film.frames == 1] or self._clips
        sizes = sorted({stage.size for stage in self._stages})
        self._files = {size: _encoded(config, host, films, size) for size in sizes}
        self._text, self._row = text_states(config, host, [film.caption for film in films])

    def stage(self, number: int) -> Stage:
        """Of a batch; the last one goes on."""
        step = number // self._config.gradient_accumulation_steps
        ends = accumulate(stage.steps for stage in self._stages)
        return next(
            (s for s, end in zip(self._stages, ends, strict=True) if step < end), self._stages[-1]
        )

    def batch(self, number: int, process: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents [B, C, T, h, w] and text states and masks of each encoder.

        Args:
            number: of the batch, counted from the start of the run.
            process: rank.
            generator: chooses clips and where they begin, and drops captions.
        """
        config, stage = self._config, self.stage(number)
        shared = random.Random(f"{config.seed}/{number}")  # every process has the same shape
        still = shared.random() < config.options.proportion_stills
        among = self._stills if still else self._clips
        picked = torch.randint(len(among), (config.train_batch_size,), generator=generator)
        frames = 1 if still else (stage.frames - 1) // self._ratio + 1
        chosen = [among[i] for i in picked]
        latents = [self._cut(self._files[stage.size][i], frames, generator) for i in chosen]
        empty = torch.rand(len(chosen), generator=generator) < config.proportion_empty_prompts
        captions = [
            "" if drop else self._films[i].caption
            for i, drop in zip(chosen, empty.tolist(), strict=True)
        ]
        return {"latents": torch.stack(latents)} | self._text[[self._row[c] for c in captions]]

    def _cut(self, file: Path, frames: int, generator: torch.Generator) -> Tensor:
        """A part of a clip; from its start if the VAE has seen the frames before."""
        with safe_open(file, framework="pt") as tensors:
            whole = tensors.get_slice("latents")
            room = whole.get_shape()[1] - frames if self._ratio == 1 else 0
            start = int(torch.randint(room + 1, (1,), generator=generator))
            return whole[:, start : start + frames].float()


def _encoded(
    config: TrainConfig, host: LinGenHost, films: Sequence[Film], size: int
) -> dict[int, Path]:
    """A file with the "latents" [C, T, h, w] of each film, in half precision."""
    vae, stride = host.pipe.vae, config.options.clip_stride
    key = f"{module_digest(vae)}|{config.image_interpolation_mode}|{size}|{stride}"
    folder = config.cache_path / f"films-{digest(key)}"
    files = [folder / f"{film.digest}.safetensors" for film in films]
    ratio = ratios(vae)[0]

    def encode(i: int) -> dict[str, Tensor]:
        fitted = [
            np.asarray(fit(picture, size, size, config.image_interpolation_mode))
            for picture in films[i].pictures(stride)
        ]
        whole = (len(fitted) - 1) // ratio * ratio + 1
        video = torch.from_numpy(np.stack(fitted[:whole])).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            return {"latents": encode_clip(vae, video / 127.5 - 1)[0].half()}

    filled(files, encode, description=f"latents {size} px")
    return dict(enumerate(files))
