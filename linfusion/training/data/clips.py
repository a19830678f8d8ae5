"""Clips as cached latents, which video transformers are distilled on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from linfusion.attention.grids import video as volumes
from linfusion.files.whole_files import save_tensors, writable_folder, writing
from linfusion.pipelines.arguments import pixel_multiple
from linfusion.training.config import TrainConfig
from linfusion.training.data.cache import TrainingSet
from linfusion.training.data.pictures import caption_beside
from linfusion.training.teachers.base import Batch, Teacher

KEY = "latents"


@dataclass(frozen=True)
class Clip:
    """A safetensors file with the latents of a video, [C, T, h, w] as the denoiser takes them."""

    path: Path
    caption: str
    shape: tuple[int, ...]


def clip_folder(folder: str | Path) -> list[Clip]:
    """Clips of a folder, at any depth, in the order of their paths.

    A clip is a safetensors file with a tensor "latents", [C, T, h, w], normalised as the denoiser
    takes them, and a .txt file of its name with the caption.

    Raises:
        ValueError: no such folder, no clips, a file that is none, or one without a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"train_data_dir: there is no folder {folder}")
    clips = []
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                found = tensors.get_slice(KEY).get_shape() if KEY in tensors.keys() else []  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"train_data_dir: cannot read {path}: {error}") from error
        if len(found) != 4 or 0 in found:
            raise ValueError(
                f"train_data_dir: {path} has {KEY!r} of shape {found or None}; expected"
                " [C, T, h, w]"
            )
        clips.append(Clip(path, caption_beside(path, "train_data_dir"), tuple(found)))
    if not clips:
        raise ValueError(f"train_data_dir: no clips (.safetensors with {KEY!r}) in {folder}")
    return clips


def encode_clips(
    pipe: DiffusionPipeline, clips: Iterable[tuple[Tensor, str]], folder: str | Path
) -> list[Path]:
    """Write videos and captions as the clips that `clip_folder` reads.

    Latents are the mode of the posterior of the pipeline's VAE, normalised as the pipeline does.

    Args:
        pipe: of Wan, SANA-Video or CogVideoX.
        clips: videos, uint8 [F, H, W, 3], and their captions.
        folder: made if missing; files are numbered. Each appears whole or not at all.

    Returns:
        The files with latents.

    Raises:
        ValueError: a video of another shape, or that the VAE would cut.
    """
    given: Any = pipe
    vae, step = given.vae, given.vae_scale_factor_temporal
    multiple = pixel_multiple(pipe)
    folder = writable_folder("folder", folder)
    paths = []
    for number, (video, caption) in enumerate(clips):
        if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[3] != 3:
            raise ValueError(
                f"clips: number {number} is {video.dtype} {tuple(video.shape)}; expected uint8"
                " [F, H, W, 3]"
            )
        frames, height, width, _ = video.shape
        if (frames - 1) % step or height % multiple or width % multiple:
            raise ValueError(
                f"clips: number {number} has {frames} frames of {height} by {width} pixels;"
                f" expected a multiple of {step} and 1 more, and multiples of {multiple}"
            )
        pixels = video.permute(3, 0, 1, 2)[None].to(vae.device, vae.dtype) / 127.5 - 1
        with torch.no_grad():
            encoded = vae.encode(pixels)
        found = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        mean, std = latent_statistics(vae)
        path = folder / f"{number:06d}.safetensors"
        with writing(path.with_suffix(".txt")) as file:
            file.write(caption.encode())
        save_tensors(path, {KEY: ((found - mean.to(found)) / std.to(found))[0]})
        paths.append(path)
    return paths


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a VAE's latents, [1, C or 1, 1, 1, 1], that denoisers see taken out."""
    stored = {**vae.config, **dict(vae.named_buffers())}
    mean, std = stored.get("latents_mean"), stored.get("latents_std")
    if mean is None or std is None:
        # SANA-Video takes latents without statistics as they are.
        scale = vae.config.get("scaling_factor") if "CogVideoX" in type(vae).__name__ else None
        mean, std = [0.0], [1 / (scale or 1.0)]
    shape = (1, -1, 1, 1, 1)
    return torch.as_tensor(mean).view(shape), torch.as_tensor(std).view(shape)


class ClipSet(TrainingSet):
    """Clips with their text states, in batches of one shape whose order is a function.

    Args:
        config: seed, batch size, share of empty prompts.
        teacher: before it has a student; it encodes what the cache of text states lacks.
        clips: of `clip_folder`, such as `check_clips` lets pass.
        processes: how many processes share a batch number.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: Teacher,
        clips: Sequence[Clip],
        *,
        processes: int = 1,
    ) -> None:
        clips = clips[: config.max_train_samples]
        rows: dict[Any, list[int]] = {}
        for i, clip in enumerate(clips):
            rows.setdefault(clip.shape, []).append(i)
        self._clips = {shape: [clips[i].path for i in found] for shape, found in rows.items()}
        self._index(config, teacher, [clip.caption for clip in clips], rows, processes)

    def latents(self, size: Any, rows: Sequence[int], generator: torch.Generator) -> Batch:
        found = [load_file(self._clips[size][row])[KEY].float() for row in rows]
        return {"latents": torch.stack(found)}


def check_clips(teacher: Teacher, clips: Sequence[Clip]) -> None:
    """Refuse clips that the denoiser does not take.

    Raises:
        ValueError: another number of channels, or sides that are no multiples of its patches.
    """
    config = teacher.model.config
    for clip in clips:
        channels, *size = clip.shape
        patch = volumes.patch_of(config)
        whole = all(n % p == 0 for n, p in zip(size, patch, strict=True))
        if channels != config.in_channels or not whole:
            raise ValueError(
                f"train_data_dir: {clip.path} has latents of shape {clip.shape};"
                f" {type(teacher.model).__name__} takes {config.in_channels} channels, and frames,"
                f" height and width that are multiples of {patch}"
            )
