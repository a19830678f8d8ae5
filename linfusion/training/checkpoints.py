"""Checkpoints that are whole or not there, and hold only what is learned."""

import dataclasses
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from linfusion.training.config import TrainConfig

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_only_what_is_learned(
    accelerator: Accelerator,
    names: tuple[str, ...],
    parameters: tuple[torch.nn.Parameter, ...],
    ema: EMAModel | None,
) -> None:
    """Make checkpoints hold the learned part and its average instead of the whole UNet."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_file(
                dict(zip(names, parameters, strict=True)), Path(folder, "student.safetensors")
            )
            if ema is not None:
                shadow = dict(zip(names, ema.shadow_params, strict=True))
                save_file(shadow, Path(folder, "ema.safetensors"))

    def load(models: list[Any], folder: str) -> None:
        models.clear()
        saved = load_file(Path(folder, "student.safetensors"))
        if set(saved) != set(names):
            raise ValueError(
                f"resume_from_checkpoint: {folder} has other learned layers than this run: "
                f"{', '.join(sorted(set(saved) ^ set(names))[:4])}"
            )
        with torch.no_grad():
            for name, parameter in zip(names, parameters, strict=True):
                parameter.copy_(saved[name])
            if ema is not None:
                shadow = load_file(Path(folder, "ema.safetensors"))
                for name, average in zip(names, ema.shadow_params, strict=True):
                    average.copy_(shadow[name])
                ema.optimization_step = step_of(Path(folder))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(config: TrainConfig, accelerator: Accelerator, step: int) -> None:
    """Write output_dir/checkpoint-N; a folder of that name is whole whenever it is looked at."""
    out = Path(config.output_dir)
    final, partial = out / f"checkpoint-{step}", out / f".partial-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    (partial / "train_config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
    for file in partial.iterdir():  # rename must not reach the disk before what it names
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    _discard(final)
    os.replace(partial, final)
    if config.checkpoints_total_limit is not None:
        others = [checkpoint for checkpoint in _checkpoints(out) if checkpoint != final]
        for old in others[: max(0, len(others) + 1 - config.checkpoints_total_limit)]:
            _discard(old)


def _discard(checkpoint: Path) -> None:
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".partial-{checkpoint.name}")
        os.replace(checkpoint, doomed)  # so that a half-deleted one is never taken for whole
        shutil.rmtree(doomed)


def _checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done when it was written."""
    return int(checkpoint.name.partition("-")[2])


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """What `resume_from_checkpoint` names; None where there is nothing to resume.

    Raises:
        ValueError: it names something that is no checkpoint, or a new run would mix its
            checkpoints with those of an earlier one.
    """
    found = _checkpoints(Path(config.output_dir))
    if config.resume_from_checkpoint is None:
        if found:
            raise ValueError(
                f"output_dir: {config.output_dir} has checkpoints of an earlier run; give "
                'resume_from_checkpoint="latest", or another folder'
            )
        return None
    if config.resume_from_checkpoint == "latest":
        return found[-1] if found else None
    path = Path(config.resume_from_checkpoint)
    if not path.is_dir() or not CHECKPOINT.fullmatch(path.name):
        raise ValueError(
            f"resume_from_checkpoint: got {path}, accepted are latest or a checkpoint-N folder"
        )
    return path


def remove_leftovers(out: Path) -> None:
    """Delete what a killed run was still writing."""
    for partial in out.glob(".partial-*"):
        shutil.rmtree(partial)


def warn_of_changes(checkpoint: Path, config: TrainConfig) -> None:
    """Warn if a run is resumed with settings that make it another run."""
    before = json.loads((checkpoint / "train_config.json").read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    harmless = {"resume_from_checkpoint", "output_dir", "cache_dir", "checkpointing_steps",
                "checkpoints_total_limit", "logging_steps", "report_to", "validation_steps",
                "validation_prompts"}  # fmt: skip
    changed = [k for k in now if k not in harmless and before.get(k) != now[k]]
    if changed:
        warnings.warn(
            f"{checkpoint} was written with other settings ({', '.join(changed)}): this run will "
            "not be the one that was interrupted",
            stacklevel=2,
        )
