"""What is asked of `linearize`: which layers, settings and numbers, and whether that is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.layers.difference import Difference
from linfusion.layers.find import (
    candidates,
    latent_size,
    refuse_linear_already,
    select,
    serving,
    tokens_at,
)
from linfusion.layers.paying import card_of, tokens_from
from linfusion.layers.projections import attention_parameters, refuse_quantized
from linfusion.layers.record import record_of
from linfusion.layers.watch import is_fresh
from linfusion.students.loading import fit, student_of

if TYPE_CHECKING:
    from linfusion.attention.method import Method
    from linfusion.layers.record import TakenLayer
    from linfusion.students.student import LinFusion


class Wanted:
    """What is asked of `linearize`, but for the weights."""

    def __init__(
        self,
        model_or_pipe: Any,
        mechanism: Method,
        layers: str | Iterable[str] | None,
        size: int | tuple[int, ...] | None,
        options: dict[str, Any],
    ) -> None:
        self.mechanism = mechanism
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.size = size
        self.options = {
            name: value
            for name, value in options.items()
            if value is not None or name in mechanism.nullable
        }
        mechanism.check_options(self.options)
        if layers != "auto" and size is not None:
            raise ValueError(f'size: got {size!r}, which only layers="auto" takes')
        self.latent = latent_size(model_or_pipe, size) if layers == "auto" else ()

    def of(
        self, model: nn.Module, found: dict[str, Any], side: LinFusion | None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Tensor | Difference]]]:
        """Settings of the layers to take, and their tensors, by path; once they are known to fit.

        Args:
            model: the model.
            found: its layers that the method may take.
            side: the student, or None.

        Raises:
            ValueError: as `linearize`.
        """
        mechanism = self.mechanism
        if side is not None and side.config["method"] != mechanism.name:
            raise ValueError(
                f"method: got {mechanism.name!r}, but the weights are a student of method"
                f" {side.config['method']!r}; give the two the same one"
            )
        stored = None if side is None else {entry.path: entry.setting for entry in side.entries}
        settings = mechanism.settings(found, stored, self.options)
        learned: dict[str, dict[str, Tensor | Difference]] = (
            {path: {} for path in found}
            if side is None
            else fit(model, found, side, partial=self.layers is not None)
        )
        paths = [path for path in found if path in learned and path in settings]
        if self.layers == "auto":
            card = card_of(model)
            paths = [
                path
                for path in paths
                if tokens_at(model, path, self.latent)
                > tokens_from(mechanism, found[path], settings[path], card)
            ]
            if not paths:
                raise ValueError(
                    'layers: "auto" found no layer where linear attention costs less at'
                    f" {self.size} pixels"
                )
        elif self.layers is not None:
            paths = select(paths, self.layers)
        if side is None and mechanism.inherit is not None:
            for path in paths:
                refuse_quantized(path, found[path])
        return {path: settings[path] for path in paths}, {path: learned[path] for path in paths}

    def is_there(self, model: nn.Module, weights: Any) -> bool:
        """Whether a model is what it would become: the same layers, settings and numbers."""
        record = record_of(model)
        if record is None or (weights is None and not is_fresh(record)):
            return False
        name = self.mechanism.name
        found = {path: taken.layer for path, taken in record.layers.items()}
        try:
            every = candidates(model, name) | found
            side = None if weights is None else student_of(model, every, weights, name)
            chosen, learned = self.of(model, every, side)
        except ValueError:
            return False
        return chosen == record.settings and all(
            _holds(record.layers[path], name, tensors) for path, tensors in learned.items()
        )


def _holds(taken: TakenLayer, method: str, tensors: dict[str, Tensor | Difference]) -> bool:
    """Whether a layer has these tensors, to rounding."""
    child = taken.layer.get_submodule(method).state_dict()
    here: dict[str, Tensor] = {f"{method}.{name}": tensor for name, tensor in child.items()}
    here |= attention_parameters(taken.layer)
    if {name for name in tensors if name.startswith("to_")} != set(taken.base_weights):
        return False
    for name, value in tensors.items():
        mine = here[name].detach()
        if isinstance(value, Difference):
            value = value.onto(taken.base_weights[name])
        if not torch.allclose(value.to(mine), mine, rtol=1e-3, atol=1e-6):
            return False
    return True


def layers_for(model: nn.Module, method: str, weights: Any) -> dict[str, Any]:
    """The layers that the method may take; where there are none, the error says what would do."""
    try:
        return candidates(model, method)
    except ValueError as error:
        refuse_linear_already(model)
        others = [get_method(name) for name in serving(model)]
        if not others:
            raise
        what = str(error).removeprefix("model_or_pipe: ")
        what = (
            f"model_or_pipe: {what}"
            if weights is None
            else f"weights: they are a student of method {method!r}, and {what}"
        )
        raise ValueError(
            f"{what}. Method {others[0].name!r} takes {type(model).__name__}:"
            f" linfusion.linearize(pipe, {others[0].student})"
        ) from error
