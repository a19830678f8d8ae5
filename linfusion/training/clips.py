"""Distilling a video transformer into MATE: its teacher, and clips as cached latents."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from linfusion.attention import volumes
from linfusion.pipelines.arguments import pixel_multiple, text_length
from linfusion.training.cache import TrainingSet
from linfusion.training.config import TrainConfig, writable_folder
from linfusion.training.data import caption_beside
from linfusion.training.teachers import Batch, Teacher, training_target

KEY = "latents"


class VideoTeacher(Teacher):
    """Wan and SANA-Video, which predict the velocity ε − x₀, and CogVideoX, noise or its velocity.

    Flow: x_σ = (1 − σ) x₀ + σ ε, with σ even in 1/1000 … 1 and then shifted as the pipeline's
    scheduler shifts it (rectified flow, Liu et al. 2022). CogVideoX: the forward process of its own
    scheduler.

    Args:
        pipe: a text-to-video pipeline.

    Raises:
        ValueError: it has two denoisers, each for some timesteps, or one that is also given other
            latents (image-to-video), or CogVideoX's scheduler predicts something else.
    """

    attribute = "transformer"

    def __init__(self, pipe: DiffusionPipeline) -> None:
        super().__init__(pipe)
        name = type(pipe).__name__
        if getattr(pipe, "transformer_2", None) is not None:
            raise ValueError(
                f"pretrained_model_name_or_path: {name} has a transformer and a transformer_2, each"
                " for some timesteps; one that has a single denoiser is distilled"
            )
        config = self.model.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"pretrained_model_name_or_path: the transformer of {name} takes"
                f" {config.in_channels} channels and predicts {config.out_channels}; one that makes"
                " videos from text alone is distilled"
            )
        self._kind = volumes.kind_of(self.model)
        self.scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        self._sigmas: Tensor | None = None
        if self._kind == volumes.JOINT:
            given = self.scheduler.config.prediction_type
            if given not in ("epsilon", "v_prediction"):
                raise ValueError(
                    f"prediction_type: the scheduler has {given!r}, accepted are epsilon,"
                    " v_prediction"
                )
        else:
            steps = self.scheduler.config.num_train_timesteps
            even = torch.arange(steps, 0, -1) / steps
            options = self.scheduler.config
            shift = options.get("flow_shift", options.get("shift")) or 1.0
            self._sigmas = shift * even / (1 + (shift - 1) * even)

    def text_states(self, captions: Sequence[str]) -> Batch:
        kwargs: dict[str, Any] = {"do_classifier_free_guidance": False}
        if (length := text_length(self.pipe)) is not None:
            kwargs["max_sequence_length"] = length
        name = "complex_human_instruction"  # SANA-Video puts its captions behind one
        accepted = inspect.signature(type(self.pipe).__call__).parameters
        if name in accepted:
            kwargs[name] = accepted[name].default
        found = self.pipe.encode_prompt(list(captions), **kwargs)
        states = {"states": found[0]}
        return states | ({"mask": found[1]} if len(found) == 4 else {})

    def example(self, batch: Batch, generator: torch.Generator) -> tuple[dict[str, Any], Tensor]:
        latents = batch["latents"]  # [B, C, T, h, w]
        noise = torch.randn(latents.shape, generator=generator)
        if self._sigmas is not None:
            chosen = torch.randint(len(self._sigmas), (len(latents),), generator=generator)
            sigma = self._sigmas[chosen]
            s = sigma[:, None, None, None, None]
            inputs: dict[str, Any] = {
                "hidden_states": (1 - s) * latents + s * noise,
                "timestep": sigma * len(self._sigmas),
                "encoder_hidden_states": batch["states"],
            }
            if "mask" in batch:
                inputs["encoder_attention_mask"] = batch["mask"]
            return inputs, noise - latents
        latents, noise = latents.transpose(1, 2), noise.transpose(1, 2)
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        )
        inputs = {
            "hidden_states": self.scheduler.add_noise(latents, noise, timesteps),
            "timestep": timesteps,
            "encoder_hidden_states": batch["states"],
        }
        if self.model.config.use_rotary_positional_embeddings:
            frames, height, width = latents.shape[1], *latents.shape[3:]
            scale = self.pipe.vae_scale_factor_spatial
            inputs["image_rotary_emb"] = self.pipe._prepare_rotary_positional_embeddings(
                height * scale, width * scale, frames, torch.device("cpu")
            )
        return inputs, training_target(self.scheduler, latents, noise, timesteps)

    def feature_layers(self, paths: Sequence[str]) -> list[str]:
        """Every fourth block from the second on."""
        return list(paths[1::4]) or list(paths)


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
        latents = ((found - mean.to(found)) / std.to(found))[0].cpu().contiguous()
        path = folder / f"{number:06d}.safetensors"
        for target, write in (
            (path.with_suffix(".txt"), lambda file, text=caption: file.write_text(text)),
            (path, lambda file, x=latents: save_file({KEY: x}, file)),
        ):
            partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            write(partial)
            os.replace(partial, target)
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
