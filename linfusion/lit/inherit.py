"""What a LiT student takes over from its teacher, and what it starts anew (Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.attention import lit
from linfusion.layers.find import model_of, shorten
from linfusion.layers.offload import lifted
from linfusion.layers.projections import attention_parameters, refuse_copied
from linfusion.layers.record import MARKER, Record, mark, record_of

PARTS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
POLICIES = {"lit": "", "lit-t2i": "o", "full": "qkvo"}


@dataclass(frozen=True)
class Inheritance:
    """Names of all tensors of a student, by where they came from.

    Attributes:
        parts: of the attention that were taken over, of "qkvo".
        inherited: equal to the teacher's, to the bit.
        reinitialised: the teacher has them as well, but the student starts anew.
        new: the teacher has no such tensor.
    """

    parts: str
    inherited: list[str]
    reinitialised: list[str]
    new: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for json."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{len(self.inherited)} tensors inherited, {len(self.reinitialised)} re-initialised"
            f" ({shorten(self.reinitialised) or 'none'}), {len(self.new)} new"
            f" ({shorten(self.new) or 'none'})"
        )


def inherit(
    student: Any,
    teacher: Any = None,
    policy: str | Iterable[str] = "lit",
    *,
    seed: int = 0,
) -> Inheritance:
    """Give a student of method "lit" the weights it starts its training from.

    Projections that are not inherited are drawn as in DiT (Xavier, biases 0). The convolution is
    drawn as PyTorch's default; under "full" it is 0, so that the student starts as plain linear
    attention. `linfusion.restore` then gives the teacher.

    Args:
        student: a pipeline or model after `linfusion.linearize(student, "lit", ...)`.
        teacher: a model of the same shape, a pipeline, or its tensors by name; None is the model
            that the student was made of. One that is linear itself, as the 512 px student of a
            1,024 px one, hands on its convolutions under "full".
        policy: "lit", all but attention, as the authors' class-conditional models; "lit-t2i", also
            the output projection, as their text-to-image code; "full", everything; or the parts of
            attention to take over, some of q, k, v and o, as "kv" or ["k", "v"].
        seed: of what is drawn.

    Returns:
        Which tensor came from where; the three lists together are all tensors of the student.

    Raises:
        ValueError: an unknown policy or part; the student is not of method "lit"; tensors the
            teacher lacks or has too many, of other shapes, or in a type that the student's would
            round. The student is as it was.
    """
    parts = _parts(policy)
    if type(seed) is not int or seed < 0:
        raise ValueError(f"seed: got {seed!r}, expected a whole number of at least 0")
    model = model_of(student)
    record = record_of(model)
    if record is None or record.method != lit.NAME:
        state = "not linearized" if record is None else f"of method {record.method!r}"
        raise ValueError(
            f'student: {type(model).__name__} is {state}; call linfusion.linearize(student, "lit")'
            " first"
        )
    for path in record.layers:
        refuse_copied(path, model.get_submodule(path))
    with lifted(model):
        ours = model.state_dict()
        theirs = _own_teacher(model, record, ours) if teacher is None else _tensors(teacher)
        anew = _restarted(record, ours, parts)
        new = [name for name in ours if _is_learned(record, name)]
        if parts == "qkvo":  # a teacher that is linear hands on what it learned
            new = [name for name in new if name not in theirs or teacher is None]
        inherited = [name for name in ours if name not in {*anew, *new}]
        _check(record, ours, theirs, inherited, anew)
        with torch.no_grad():
            for name in inherited:
                ours[name].copy_(theirs[name])
            generator = torch.Generator().manual_seed(seed)
            for name in anew:
                _lay_aside(model, record, name, theirs.get(name))
            ours = model.state_dict()  # laying aside has exchanged tensors
            for name in (*anew, *new):
                ours[name].copy_(_drawn(name, ours, generator, zero=parts == "qkvo"))
        _forget(record, ours, inherited)
        differing = [n for n in inherited if not torch.equal(ours[n], theirs[n].to(ours[n]))]
    report = Inheritance(parts, inherited, anew, new)
    if differing or len(inherited) + len(anew) + len(new) != len(ours):
        raise RuntimeError(f"inheritance does not add up: {report}; differing {differing}")
    marker = getattr(model, "config", {}).get(MARKER)
    if marker is not None:
        aside = any(taken.base_weights for taken in record.layers.values())
        mark(model, {**marker, "attention_weights": aside})
    return report


def _parts(policy: str | Iterable[str]) -> str:
    """The parts of attention that a policy takes over, in the order of PARTS."""
    known = f"expected one of {', '.join(POLICIES)}, or some of q, k, v, o"
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]
    if not isinstance(policy, Iterable):
        raise ValueError(f"policy: got {policy!r}, {known}")
    chosen = list(policy)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        what = repr(policy) if isinstance(policy, str) else repr(unknown[0])
        raise ValueError(f"policy: got {what}, {known}")
    return "".join(part for part in PARTS if part in chosen)


def _tensors(teacher: Any) -> dict[str, Tensor]:
    if isinstance(teacher, Mapping):
        return dict(teacher)
    model: nn.Module = model_of(teacher)
    return model.state_dict()


def _own_teacher(model: nn.Module, record: Record, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model before `linearize`: what lies aside in place of what stands there."""
    laid = {
        f"{path}.{name}": tensor
        for path, taken in record.layers.items()
        for name, tensor in taken.base_weights.items()
    }
    return {name: t for name, t in {**ours, **laid}.items() if not _is_learned(record, name)}


def _is_learned(record: Record, name: str) -> bool:
    """Whether a tensor is below the child `lit` of a layer."""
    return any(name.startswith(f"{path}.{lit.NAME}.") for path in record.layers)


def _restarted(record: Record, ours: Mapping[str, Tensor], parts: str) -> list[str]:
    """Projections of the linear layers, and of no other, that are not taken over."""
    prefixes = tuple(
        f"{path}.{linear}."
        for path in record.layers
        for part, linear in PARTS.items()
        if part not in parts
    )
    return [name for name in ours if name.startswith(prefixes)] if prefixes else []


def _check(
    record: Record,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    inherited: list[str],
    anew: list[str],
) -> None:
    """Whether the teacher has every tensor to inherit, no other, and each as the student's is."""
    missing = [name for name in inherited if name not in theirs]
    unexpected = [name for name in theirs if name not in ours]
    misshapen = [
        f"{name} {tuple(theirs[name].shape)}, expected {tuple(ours[name].shape)}"
        for name in (*inherited, *anew)
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    rounded = [
        f"{name} {theirs[name].dtype}, the student's is {ours[name].dtype}"
        for name in inherited
        if name in theirs
        and torch.promote_types(theirs[name].dtype, ours[name].dtype) != ours[name].dtype
    ]
    problems = [
        f"{kind}: {shorten(names)}."
        for kind, names in (
            ("Missing", missing),
            ("Unexpected", unexpected),
            ("Misshapen", misshapen),
            ("Rounded", rounded),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"teacher: its tensors are not those of the student's {len(record.layers)} linear"
            " layers and the rest of the model. " + " ".join(problems)
        )


def _lay_aside(model: nn.Module, record: Record, name: str, theirs: Tensor | None) -> None:
    """Keep the teacher's projection for `restore`, and put a fresh tensor in its place."""
    path = next(path for path in record.layers if name.startswith(f"{path}."))
    leaf = name.removeprefix(f"{path}.")
    parameter = attention_parameters(model.get_submodule(path))[leaf]
    kept = parameter.data if theirs is None else theirs
    record.layers[path].base_weights[leaf] = kept.detach().to("cpu", parameter.dtype, copy=True)
    parameter.data = torch.empty_like(parameter.data)


def _forget(record: Record, ours: Mapping[str, Tensor], inherited: list[str]) -> None:
    """What lies aside of a projection that stands in its place again is not needed."""
    for path, taken in record.layers.items():
        for leaf in list(taken.base_weights):
            if f"{path}.{leaf}" in inherited:
                del taken.base_weights[leaf]


def _drawn(
    name: str, ours: Mapping[str, Tensor], generator: torch.Generator, *, zero: bool
) -> Tensor:
    """What a tensor starts from, float32 on the CPU."""
    fresh = torch.zeros(ours[name].shape)
    module, _, leaf = name.rpartition(".")
    if module.endswith((".norm_q", ".norm_k")):
        return fresh.fill_(1)
    if module.endswith(f".{lit.NAME}.dwc"):
        # PyTorch's default of a convolution with one input channel: 1/√(k²) for weight and bias.
        bound = 1 / ours[f"{module}.weight"].shape[-1]
        return fresh if zero else fresh.uniform_(-bound, bound, generator=generator)
    if leaf == "weight":
        nn.init.xavier_uniform_(fresh, generator=generator)
    return fresh
