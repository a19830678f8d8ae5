"""A transformer that learns from data alone, without a teacher."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.files.whole_files import filling
from linfusion.training.teachers.lingen import LinGenHost


class FromData:
    """A transformer that is trained whole, in float32, and has no teacher.

    Args:
        host: the pipeline; it gets its own transformer back from `close`.
        weights: a folder to start from instead.
    """

    def __init__(self, host: LinGenHost, *, weights: str | Path | None = None) -> None:
        self._host, self._own = host, host.model
        kind = type(self._own)
        if weights is None:
            self.model = kind.from_config(self._own.config)
            self.model.load_state_dict(self._own.state_dict())
        else:
            self.model = kind.from_pretrained(weights, torch_dtype=torch.float32)
        self.model.to(self._own.device).train().requires_grad_(True)
        self.weights = {"simple": 1.0}
        host.model = self.model

    def trained(self) -> dict[str, nn.Parameter]:
        """All of it, by path."""
        return dict(self.model.named_parameters())

    def teacher(self) -> AbstractContextManager[None]:
        """There is none: inside, the pipeline is as outside."""
        return nullcontext()

    def losses(
        self, student: nn.Module, inputs: dict[str, Any], target: Tensor
    ) -> dict[str, Tensor]:
        """MSE to the target over the frames that have noise.

        Args:
            student: what to call: the model, or its wrapper for several processes.
            inputs: arguments of the model's forward.
            target: [B, C, T, h, w].
        """
        v = student(**inputs, return_dict=False)[0]
        error = (v.float() - target.float()).square().mean((1, 3, 4))
        noisy = inputs["timestep"] > 0
        return {
            "simple": error[noisy.repeat_interleave(error.shape[1] // noisy.shape[1], 1)].mean()
        }

    def save(self, folder: str | Path) -> None:
        """Write the transformer, as `from_pretrained` reads it."""
        with filling(folder) as temporary:
            self.model.save_pretrained(temporary)

    def close(self) -> None:
        """The pipeline has its own transformer again."""
        self._host.model = self._own
