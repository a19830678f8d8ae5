"""Students to linearize with: a learned part that is not fresh, as if it had been distilled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import linfusion
from linfusion.students.saving import learned
from linfusion.students.student import LinFusion

GOLDEN = Path(__file__).parent / "golden"


def student_for(
    model: nn.Module, *, attention_weights: bool = False, seed: int = 7, **kwargs: object
) -> LinFusion:
    """A random learned part for a model of this shape; the model stays softmax."""
    linfusion.linearize(model, **kwargs)
    side = learned(model, attention_weights=attention_weights)
    state = {name: torch.empty_like(tensor) for name, tensor in side.state_dict().items()}
    config = dict(side.config)
    linfusion.restore(model)
    torch.manual_seed(seed)
    for tensor in state.values():
        nn.init.normal_(tensor, std=0.2)
    fresh = LinFusion(
        modules_list=config["modules_list"], layout="paths", attention_weights=attention_weights
    )
    fresh.load_state_dict(state)
    return fresh.eval()


def self_attention_names(model: nn.Module) -> Iterator[str]:
    """Paths of the spatial self-attention of a UNet, by their names."""
    return (
        name for name, _ in model.named_modules() if name.endswith("attn1") and "motion" not in name
    )
