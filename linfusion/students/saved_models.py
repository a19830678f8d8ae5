"""The student in what a linearized model wrote with its own `save_pretrained`.

diffusers drops tensors it does not know when it loads a model, and keeps of where they came from
only the folder or hub name: neither subfolder nor variant nor revision. So the files that lie there
are compared with what was loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from linfusion.layers.find import shorten
from linfusion.layers.record import marker_of, source_of
from linfusion.students.student import LinFusion, modules_list

_SHARD = re.compile(r"-\d+(-of-\d+)")


def from_saved_model(model: nn.Module, file: str | Path | None = None) -> LinFusion:
    """The learned part of a model that was saved linearized.

    Args:
        model: loaded by diffusers; its config says that it was linearized and from where it came.
        file: one of the `.safetensors` files it was saved as, where it is known.

    Raises:
        ValueError: the tensors are not there, not those the config says, or there are several
            students that the model may have been saved with.
    """
    marker, source = marker_of(model), source_of(model)
    method = marker["method"]
    side = LinFusion(
        modules_list=modules_list(model, method, marker["layers"]),
        layout="paths",
        attention_weights=False,
        method=method,
    )
    expected = {name: tuple(t.shape) for name, t in side.state_dict().items()}
    saved = [_Saved(files) for files in (_groups([Path(file)]) if file else _saved_at(source))]
    fitting = [one for one in saved if one.shapes(expected) == expected]
    if not fitting:
        pickled = [f for folder in _folders(source) for f in folder.glob("*.bin")]
        why = (
            "its weights are pickled (safe_serialization=False), which is never read; save it once"
            " more with safe_serialization=True"
            if pickled and not saved
            else f"{shorten(sorted(expected))} cannot be read from {file or source} (was it saved"
            " once more without linfusion.linearize?)"
        )
        raise ValueError(
            f"weights: the model was saved linearized, but {why}; give the student's folder as"
            " weights=, or make it a plain model with linfusion.restore"
        )
    if len(fitting) > 1:
        own = {name: t for name, t in model.state_dict().items() if not t.is_meta}
        fitting = [one for one in fitting if one.holds(own)] or fitting
    states = [one.read(expected) for one in fitting]
    if any(not _same(states[0], state) for state in states[1:]):
        files = ", ".join(str(one.files[0]) for one in fitting)
        raise ValueError(
            f"weights: there are {len(fitting)} students for the weights that were loaded from"
            f" {source}, and diffusers does not say of which variant they are; give the one as"
            f" weights=: {files}"
        )
    side.load_state_dict(states[0])
    return side


class _Saved:
    """One checkpoint: a file, or the shards of one."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Of those tensors that are there; none from a file that cannot be read."""
        found = {}
        try:
            for name, tensors in self._each(names):
                found[name] = tuple(tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError):
            return {}
        return found

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensors.get_tensor(name) for name, tensors in self._each(names)}

    def holds(self, own: dict[str, Tensor]) -> bool:
        """Whether what a model has loaded is what stands here, in the model's dtypes."""
        for name, tensors in self._each(own):
            here = tensors.get_tensor(name)
            if here.shape == own[name].shape and not torch.equal(
                here.to(own[name].dtype), own[name].cpu()
            ):
                return False
        return True

    def _each(self, names: Iterable[str]) -> list[tuple[str, Any]]:
        """Every one of the names that is there, and the open file it is in."""
        wanted = set(names)
        opened = [safe_open(file, framework="pt") for file in self.files]
        return [(n, tensors) for tensors in opened for n in tensors.keys() if n in wanted]  # noqa: SIM118


def _saved_at(source: str | None) -> list[list[Path]]:
    """All checkpoints at a folder or hub name, and in the folders of its parts."""
    folders = _folders(source)
    return [group for folder in folders for group in _groups(sorted(folder.glob("*.safetensors")))]


def _folders(source: str | None) -> list[Path]:
    if not source:
        return []
    if Path(source).is_dir():
        roots = [Path(source)]
    else:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
        roots = sorted(cached.glob("snapshots/*"))
    return [f for root in roots for f in (root, *sorted(root.iterdir())) if f.is_dir()]


def _groups(files: list[Path]) -> list[list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(_SHARD.sub(r"\1", file.name), []).append(file)
    return list(groups.values())


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two students are one, in the coarser of their dtypes."""
    pairs = [sorted((t, other[name]), key=Tensor.element_size) for name, t in one.items()]
    return all(torch.equal(coarse, fine.to(coarse.dtype)) for coarse, fine in pairs)
