"""What the trainer minimises with: AdamW, or Muon for matrices beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn


def build_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> torch.optim.Optimizer:
    """The optimizer of all that a model has to learn.

    "muon" is Muon (Jordan et al. 2024) for the matrices of linear layers inside blocks, scaled to
    the updates of AdamW (Liu et al. 2025, arXiv:2502.16982, section 2.2), which has everything
    else; one learning rate serves both.
    """
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    options: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay, "eps": eps}
    if name == "adamw":
        return torch.optim.AdamW(learned.values(), lr, **options)
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    matrices = [
        path
        for path in learned
        if path.rpartition(".")[0] in linear
        and path.endswith(".weight")
        and any(part.isdigit() for part in path.split("."))
    ]
    if not matrices:
        raise ValueError("optimizer: got 'muon', but the student learns no matrix inside a block")
    others = [p for path, p in learned.items() if path not in set(matrices)]
    muon = torch.optim.Muon(
        [learned[path] for path in matrices],
        lr,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together([muon, torch.optim.AdamW(others, lr, **options)] if others else [muon])


class Together(torch.optim.Optimizer):
    """Several optimizers as one; their groups are its groups.

    Prepared one by one, accelerate would update the scaler of fp16 after the first, which forgets
    that the gradients of the second are unscaled already.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts = parts

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """{"parts": that of each}."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
