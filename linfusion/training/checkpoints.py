"""Checkpoints that are whole or not there, and hold only what is learned.

`files.json` in each is sealed and has the SHA-256 of all others, so damage is noticed on reading.
"""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linfusion.files import whole_files
from linfusion.training.config import TrainConfig

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_FILES = "files.json"


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
    """Write output_dir/checkpoint-N; a folder of that name is whole whenever it is looked at.

    Raises:
        OSError: it could not be written; those before are as they were.
    """
    out = Path(config.output_dir)
    final, partial = out / f"checkpoint-{step}", out / f".partial-{step}"
    if accelerator.is_main_process:
        _remove(partial)
        partial.mkdir()
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        whole_files.write_json(partial / "train_config.json", dataclasses.asdict(config))
        digests = {f.name: whole_files.digest_of_file(f) for f in partial.iterdir()}
        whole_files.write_json(partial / _FILES, digests)
        whole_files.settle(partial)  # rename must not reach the disk before what it names
        _discard(final)
        os.replace(partial, final)
    # torch.save and safetensors have exceptions of their own for a disk that takes no more.
    except (OSError, RuntimeError, SafetensorError) as error:
        _remove(partial)
        before = checkpoints(out)
        raise OSError(
            f"output_dir: {final} could not be written ({error}); "
            + (
                f'{before[-1].name} is whole: resume_from_checkpoint="latest" goes on from it'
                if before
                else "there is none before it"
            )
        ) from error
    if config.checkpoints_total_limit is not None:
        others = [checkpoint for checkpoint in checkpoints(out) if checkpoint != final]
        for old in others[: max(0, len(others) + 1 - config.checkpoints_total_limit)]:
            _discard(old)


def _discard(checkpoint: Path) -> None:
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".partial-{checkpoint.name}")
        os.replace(checkpoint, doomed)  # so that a half-deleted one is never taken for whole
        shutil.rmtree(doomed)


def _remove(partial: Path) -> None:
    if partial.is_symlink():
        partial.unlink()
    shutil.rmtree(partial, ignore_errors=True)


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in out.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that were done when it was written."""
    return int(checkpoint.name.partition("-")[2])


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """What `resume_from_checkpoint` names; None where there is nothing to resume.

    Raises:
        ValueError: it names something that is no checkpoint, or is damaged, or a new run would mix
            its checkpoints with those of an earlier one.
    """
    found = checkpoints(Path(config.output_dir))
    if config.resume_from_checkpoint is None:
        if found:
            raise ValueError(
                f"output_dir: {config.output_dir} has checkpoints of an earlier run; give "
                'resume_from_checkpoint="latest", or another folder'
            )
        return None
    if config.resume_from_checkpoint == "latest":
        for checkpoint in reversed(found):
            try:
                check_files(checkpoint)
            except ValueError as error:
                if checkpoint == found[0]:
                    raise
                warnings.warn(f"{error}; taking the one before", stacklevel=2)
                continue
            return checkpoint
        return None
    path = Path(config.resume_from_checkpoint)
    if not path.is_dir() or not CHECKPOINT.fullmatch(path.name):
        raise ValueError(
            f"resume_from_checkpoint: got {path}, accepted are latest or a checkpoint-N folder"
        )
    check_files(path)
    return path


def check_files(checkpoint: Path) -> None:
    """Refuse a checkpoint that is not as it was written.

    Raises:
        ValueError: a file of it is missing or differs; the message names it.
    """
    try:
        digests = whole_files.read_json(checkpoint / _FILES)
        for name, digest in digests.items():
            if whole_files.digest_of_file(file := checkpoint / name) != digest:
                reason = "is damaged" if file.stat().st_size else "is empty"
                raise ValueError(f"{file} {reason}: it is not the file that was written")
    except (OSError, ValueError) as error:
        raise ValueError(f"resume_from_checkpoint: {error}") from error


def remove_leftovers(out: Path) -> None:
    """Delete what a killed run was still writing."""
    for partial in out.glob(".partial-*"):
        _remove(partial)
    whole_files.remove_leftovers(out)


def warn_of_changes(checkpoint: Path, config: TrainConfig) -> None:
    """Warn if a run is resumed with settings that make it another run."""
    before = whole_files.read_json(checkpoint / "train_config.json")
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
