"""A student's attention weights as a low-rank difference to those of its base model."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linfusion.layers.difference import LowRank
from linfusion.layers.find import compute_dtype, model_of
from linfusion.layers.offload import lifted
from linfusion.layers.projections import attention_parameters
from linfusion.layers.record import record_of
from linfusion.students.student import LinFusion, modules_list

# Up to here all singular values are computed; above, the largest by subspace iteration.
_EXACT = 512


@dataclass(frozen=True)
class LowRankReport:
    """What storing a student at a low rank lost; errors are of what is read back, rounding too.

    Attributes:
        folder: where it was written.
        rank: of the difference of every projection; biases are kept in full.
        error: |Δ - B A| / |Δ| over all projections together, Δ = student - base, Frobenius norms.
        layer_errors: the same for each projection.
        parameters: numbers stored of the projections.
        full_parameters: numbers that they have in full.
    """

    folder: Path
    rank: int
    error: float
    layer_errors: dict[str, float]
    parameters: int
    full_parameters: int

    def __str__(self) -> str:
        worst = max(self.layer_errors, key=self.layer_errors.__getitem__)
        return (
            f"rank {self.rank}: {self.parameters / self.full_parameters:.1%} of the numbers;"
            f" {self.error:.2%} of the difference to the base model lost"
            f" (at most {self.layer_errors[worst]:.2%}, in {worst})"
        )


def save_low_rank(
    model_or_pipe: Any,
    folder: str | os.PathLike[str],
    *,
    rank: int,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> LowRankReport:
    """Write a student whose attention weights are a difference of low rank to the base model's.

    `linfusion.linearize(base, method, weights=folder)` adds it to the weights of `base`, which
    should be the model it was made on, or one fine-tuned from it.

    Args:
        model_or_pipe: linearized with weights that replaced the attention projections.
        folder: where to; each file appears whole or not at all.
        rank: of the difference of every projection.
        dtype: of what is stored; None is that of the model.
        **kwargs: as `ModelMixin.save_pretrained`.

    Returns:
        What was lost; `config.json` has the error as `rank_error`.

    Raises:
        ValueError: the model is not linearized, has its own projections, or has fewer channels than
            `rank`; or the folder cannot be written.
    """
    model = model_of(model_or_pipe)
    record = record_of(model)
    if record is None:
        raise ValueError(f"model_or_pipe: {type(model).__name__} is not linearized")
    if not all(taken.base_weights for taken in record.layers.values()):
        raise ValueError(
            "model_or_pipe: its attention projections are the base model's own, so there is no"
            " difference to store"
        )
    layers: dict[str, Any] = {path: taken.layer for path, taken in record.layers.items()}
    check_rank("rank", rank, layers.values())
    dtype = compute_dtype(model) if dtype is None else dtype
    state: dict[str, Tensor] = {}
    lost: dict[str, tuple[float, float]] = {}
    full = 0
    with lifted(model):
        for path, taken in record.layers.items():
            attn = layers[path]
            child = attn.get_submodule(record.method).state_dict()
            state |= {f"{path}.{record.method}.{n}": t.contiguous() for n, t in child.items()}
            for name, parameter in attention_parameters(attn).items():
                full += parameter.numel()
                key, _, leaf = f"{path}.{name}".rpartition(".")
                base = taken.base_weights[name].to(parameter.device, torch.float32)
                difference = parameter.detach().float() - base
                if leaf == "weight":
                    b, a = (x.to(dtype) for x in low_rank_factors(difference, rank))
                    error = (difference - b.float() @ a.float()).norm()
                    lost[key] = (float(error) ** 2, float(difference.norm()) ** 2)
                    state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = a, b
                else:
                    state[f"{key}.lora_B.{leaf}"] = difference.to(dtype)
        whole = _ratio(sum(e for e, _ in lost.values()), sum(n for _, n in lost.values()))
        with torch.device("meta"):
            side = LinFusion(
                modules_list=modules_list(model, record.method, record.settings),
                layout="paths",
                attention_weights=True,
                method=record.method,
                rank=rank,
                rank_error=whole,
            )
        side.load_state_dict(state, strict=True, assign=True)
        side.save_pretrained(folder, **kwargs)
    stored = sum(
        p.numel() for m in side.modules() if isinstance(m, LowRank) for p in m.parameters()
    )
    errors = {key: _ratio(*pair) for key, pair in lost.items()}
    return LowRankReport(Path(folder), rank, whole, errors, stored, full)


def low_rank_factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [m, r] and A [r, n], of one size, with B A the nearest to `difference` [m, n]."""
    if min(difference.shape) <= _EXACT:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):  # the same file every time
            torch.manual_seed(0)
            wide = min(rank + 16, min(difference.shape))
            u, s, v = torch.svd_lowrank(difference, q=wide, niter=4)
        vh = v.mT
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).contiguous(), (root[:, None] * vh[:rank]).contiguous()


def _ratio(error: float, norm: float) -> float:
    return (error / norm) ** 0.5 if norm else 0.0


def check_rank(argument: str, rank: Any, layers: Iterable[Any]) -> None:
    """ValueError, blaming `argument`, for a rank that no projection of these layers has."""
    weights = (p for attn in layers for p in attention_parameters(attn).values() if p.ndim == 2)
    widest = min(min(weight.shape) for weight in weights)
    if type(rank) is not int or not 1 <= rank <= widest:
        raise ValueError(f"{argument}: got {rank!r}, expected a whole number from 1 to {widest}")
