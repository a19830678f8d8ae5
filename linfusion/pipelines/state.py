"""What a run has done so far, in a folder, so that a killed one goes on where it was.

    parameters.json         everything that decides the picture
    stage-00.safetensors    latents of a finished stage, and the generator's state behind it
    start-01.safetensors    the latents that a stage starts from
    step.safetensors        after the last step: latents, generator, what the scheduler remembers

Every file is sealed (`linfusion.files.whole_files`), and a folder has one run at a time. A run that
goes on calls the pipeline again with a denoiser that does nothing for the steps that are done
(`Replay`), and then puts back what the last of them left.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linfusion.files import whole_files

_VERSION = 2


@dataclass
class Step:
    """What the last step of a stage left.

    Attributes:
        stage: index of the stage.
        number: steps that are done.
        latents: after them.
        generator: its state after them.
        scheduler: its attributes after them.
    """

    stage: int
    number: int
    latents: Tensor
    generator: Tensor
    scheduler: dict[str, Any]


class State:
    """The folder of a run; without one, nothing is kept and nothing found.

    Use it as a context manager, or `close` it: until then no other run gets into the folder.

    Args:
        folder: made where it is missing; None keeps nothing.
        parameters: everything that decides the picture, as JSON values.
        resume: go on with what is there; without it, a folder that holds a run is refused.
        read_only: for ranks of which another one writes: no lock, and nothing may be saved.

    Raises:
        ValueError: the folder holds a run and `resume` is not set, or a run with other parameters
            (all that differ are named), or a damaged one, or it cannot be written, or another run
            is in it.
    """

    def __init__(
        self,
        folder: str | Path | None,
        parameters: dict[str, Any],
        *,
        resume: bool,
        read_only: bool = False,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self._lock: whole_files.Lock | None = None
        if self.folder is None:
            if resume:
                raise ValueError("resume: got True without state, the folder of the run to resume")
            return
        parameters = {"version": _VERSION, **json.loads(json.dumps(parameters))}
        if read_only:
            if (self.folder / "parameters.json").is_file():
                _refuse_other(self.folder, parameters_of(self.folder), parameters)
            return
        whole_files.writable_folder("state", self.folder)
        self._lock = whole_files.Lock(self.folder, "state")
        try:
            self._open(parameters, resume)
        except BaseException:
            self.close()
            raise

    def _open(self, parameters: dict[str, Any], resume: bool) -> None:
        assert self.folder is not None
        whole_files.remove_leftovers(self.folder)
        file = self.folder / "parameters.json"
        if not file.is_file():
            try:
                whole_files.write_json(file, parameters)
            except OSError as error:
                raise ValueError(f"state: {error.strerror}") from error
        elif not resume:
            raise ValueError(
                f"state: {self.folder} holds a run; pass resume=True to go on with it, or"
                " another folder"
            )
        else:
            _refuse_other(self.folder, parameters_of(self.folder), parameters)

    def close(self) -> None:
        """Let other runs into the folder. Twice does nothing more."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self, stage: int) -> tuple[Tensor, Tensor] | None:
        """Latents of a stage and the generator's state behind it, if it was finished."""
        found = self.read(f"stage-{stage:02}")
        return None if found is None else (found[0]["latents"], found[0]["generator"])

    def finish(self, stage: int, latents: Tensor, generator: torch.Generator) -> None:
        """Keep the latents of a finished stage."""
        tensors = {"latents": latents, "generator": generator.get_state()}
        self.save(f"stage-{stage:02}", tensors, {})
        if self.folder is not None:
            (self.folder / "step.safetensors").unlink(missing_ok=True)

    def start(self, stage: int) -> Tensor | None:
        """The latents that a stage starts from, if they are there."""
        found = self.read(f"start-{stage:02}")
        return None if found is None else found[0]["latents"]

    def begin(self, stage: int, latents: Tensor) -> None:
        """Keep the latents that a stage starts from."""
        self.save(f"start-{stage:02}", {"latents": latents}, {})

    def step(self, stage: int) -> Step | None:
        """What the last step of this stage left, if there was one."""
        found = self.read("step")
        if found is None or found[1]["stage"] != stage:
            return None
        tensors, about = found
        return Step(
            stage,
            about["number"],
            tensors["latents"],
            tensors["generator"],
            unpack(about["scheduler"], tensors),
        )

    def save_step(
        self, stage: int, number: int, latents: Tensor, generator: torch.Generator, scheduler: Any
    ) -> None:
        """Replace what the step before left."""
        if self.folder is None:
            return
        tensors = {"latents": latents, "generator": generator.get_state()}
        packed = pack(scheduler, tensors)
        self.save("step", tensors, {"stage": stage, "number": number, "scheduler": packed})

    def save(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep tensors, and what JSON holds about them, under a name."""
        if self.folder is None:
            return
        file = self.folder / f"{name}.safetensors"
        try:
            whole_files.save_tensors(file, tensors, {"about": json.dumps(about)})
        except OSError as error:
            raise OSError(
                error.errno, f"state: {error.strerror}, and resume=True goes on from it"
            ) from error

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is kept under a name, if anything is.

        Raises:
            ValueError: it is not as it was written.
        """
        if self.folder is None or not (file := self.folder / f"{name}.safetensors").is_file():
            return None
        try:
            tensors, metadata = whole_files.load_tensors(file)
        except ValueError as error:
            raise ValueError(f"state: {error}") from error
        return tensors, json.loads(metadata["about"])


class Replay:
    """Passes quickly over the steps of a stage that are done.

    `skip` goes around the forwards of UNet and ControlNets, `restore` is asked after each step.
    """

    def __init__(self, step: Step | None) -> None:
        self.step, self.now = step, 0
        self.done = 0 if step is None else step.number

    def skip(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Zeros at once where the step is done.

        What it returns is contiguous: tensors from a file are, and with another layout the same
        numbers round differently in the next forward.
        """
        if self.now >= self.done:
            return (forward(*args, **kwargs)[0].contiguous(),)
        sample = _first(args, kwargs)
        return (torch.zeros_like(sample, memory_format=torch.contiguous_format),)

    def skip_control(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """No residuals at once where the step is done."""
        if self.now >= self.done:
            return forward(*args, **kwargs)
        if "sample" not in kwargs and not args:  # FLUX's has two lists, and None for an empty one
            return None, None
        sample = _first(args, kwargs)
        return [], sample.new_zeros(len(sample))

    def restore(self, scheduler: Any, generator: torch.Generator, number: int) -> Tensor | None:
        """Whether step `number` (from 1) was done before: then the latents to go on with, if it was
        the last of them."""
        self.now = number
        if self.step is None or number != self.done:
            return None
        scheduler.__dict__.update(self.step.scheduler)
        generator.set_state(self.step.generator)
        return self.step.latents


def _first(args: Any, kwargs: Any) -> Tensor:
    """What a denoiser is to denoise."""
    return args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))


def pack(scheduler: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What a scheduler remembers, as JSON values; its tensors are put into `tensors`.

    Raises:
        ValueError: it holds something else, such as a random source of its own.
    """
    kept = {k: v for k, v in scheduler.__dict__.items() if k != "_internal_dict"}
    if hasattr(scheduler, "noise_sampler"):  # it is made at the first step
        kept["noise_sampler"] = object()
    try:
        return pack_values(kept, tensors, "scheduler")
    except TypeError as error:
        raise ValueError(
            f"state: {type(scheduler).__name__} keeps a {error}, which cannot be saved; accepted"
            " are schedulers that draw from the pipeline's generator alone"
        ) from error


def pack_values(values: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Nested values as JSON values; their tensors are put into `tensors`, named from `prefix` on.

    Raises:
        TypeError: there is something else among them; the message is its class and its name.
    """
    return {k: _packed(v, f"{prefix}.{k}", tensors) for k, v in values.items()}


def unpack(
    packed: dict[str, Any], tensors: dict[str, Tensor], device: Any = None
) -> dict[str, Any]:
    """What `pack` or `pack_values` packed, on the device it was on or another."""
    return {k: _unpacked(v, tensors, device) for k, v in packed.items()}


def seed_of(folder: str | Path | None) -> int | None:
    """The seed of the run in a folder, if there is one."""
    seed: int | None = None if folder is None else parameters_of(folder).get("seed")
    return seed


def parameters_of(folder: str | Path) -> dict[str, Any]:
    """What decides the run in a folder; nothing where there is none.

    Raises:
        ValueError: its file is not as it was written.
    """
    file = Path(folder) / "parameters.json"
    try:
        return whole_files.read_json(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"state: {error}") from error


# Not closures: such refer to themselves, and keep what they saw until garbage is collected.
def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name, "device": str(value.device)}
    if isinstance(value, (np.ndarray, np.generic)):
        tensors[name] = torch.from_numpy(np.array(value))
        return {"array": name}
    if isinstance(value, (list, tuple)):
        items = [_packed(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _packed(v, f"{name}.{k}", tensors) for k, v in value.items()}}
    raise TypeError(f"{type(value).__name__} in {name.partition('.')[2]}")


def _unpacked(value: Any, tensors: dict[str, Tensor], device: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to(device or value["device"])
    if "array" in value:
        array = tensors[value["array"]].numpy()
        return array if array.ndim else array[()]
    if "dict" in value:
        return {k: _unpacked(v, tensors, device) for k, v in value["dict"].items()}
    if "list" in value:
        return [_unpacked(v, tensors, device) for v in value["list"]]
    return tuple(_unpacked(v, tensors, device) for v in value["tuple"])


def _refuse_other(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{name} (there {_brief(there.get(name))}, wanted {_brief(wanted.get(name))})"
        for name in sorted({*there, *wanted})
        if there.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"state: {folder} holds a run with other parameters: {'; '.join(differing)}"
        )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
