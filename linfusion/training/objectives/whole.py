"""A student that is trained whole, beside a frozen teacher (Wang et al. 2025, LiT, section 4)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.files.whole_files import filling
from linfusion.linearize import linearize
from linfusion.lit.inherit import inherit
from linfusion.training.objectives.hybrid import hybrid_losses
from linfusion.training.teachers.variance import VarianceTeacher


class WholeStudent:
    """A copy of a pipeline's transformer with LiT's attention, and the transformer as teacher.

    While this is open the pipeline has the student. All its weights are trained, in fp32, but for
    the embeddings of time and class, of which diffusers' DiT has one copy a block: trained, they
    would drift apart.

    Args:
        host: the pipeline.
        policy: of `linfusion.inherit`: what the student starts from.
        weights: a student to go on from, as this one is saved; then nothing is inherited.
        teacher: another transformer to learn from; None is the one of the pipeline.
        kd_weight, kd_variance_weight: λ₁ and λ₂ of `hybrid_losses`.
        log_variance: see there.
        seed: of what is drawn anew.
        **options: of method "lit".

    Raises:
        ValueError: as `linfusion.linearize` and `linfusion.inherit`; a teacher that takes other
            inputs or, for λ₂, predicts no variance. The pipeline is then as it was.
    """

    def __init__(
        self,
        host: VarianceTeacher,
        *,
        policy: str = "lit",
        weights: str | Path | None = None,
        teacher: nn.Module | None = None,
        kd_weight: float = 0.5,
        kd_variance_weight: float = 0.05,
        log_variance: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self._host, self._own = host, host.model
        self._taught_by: Any = self._own if teacher is None else teacher
        self._check_teacher(kd_variance_weight)
        if weights is None:
            student = copy.deepcopy(self._own).float()
            linearize(student, "lit", **options)
            self.inheritance = inherit(student, policy=policy, seed=seed)
        else:
            student = type(self._own).from_pretrained(weights, torch_dtype=torch.float32)
            linearize(student, **options)
        self.model = student.eval().requires_grad_(True)
        for name, parameter in student.named_parameters():
            if ".norm1.emb." in name:
                parameter.requires_grad_(False)
        self._frozen = [p for p in self._taught_by.parameters() if p.requires_grad]
        self._was_training = self._taught_by.training
        self._taught_by.requires_grad_(False).eval()
        self.weights = {
            "simple": 1.0,
            "bound": 1.0,
            "kd": kd_weight,
            "variance": kd_variance_weight,
        }
        self._log_variance = log_variance
        host.model = student

    def _check_teacher(self, kd_variance_weight: float) -> None:
        ours, theirs = self._own.config, self._taught_by.config
        for name in ("in_channels", "num_embeds_ada_norm", "cross_attention_dim"):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"teacher_model_name_or_path: its {name} is {theirs.get(name)}, that of the"
                    f" student {ours.get(name)}; they have to take the same inputs"
                )
        if kd_variance_weight and theirs.out_channels != 2 * theirs.in_channels:
            raise ValueError(
                f"kd_variance_weight: got {kd_variance_weight}, but the teacher has"
                f" {theirs.out_channels} output channels and no variance head; accepted is 0"
            )
        sizes = [sum(p.numel() for p in m.parameters()) for m in (self._taught_by, self._own)]
        if sizes[0] < sizes[1]:
            warnings.warn(
                f"the teacher has {sizes[0]:,} parameters, the student {sizes[1]:,}: LiT's authors"
                " found that a weaker teacher makes the student worse than none",
                stacklevel=3,
            )

    def trained(self) -> dict[str, nn.Parameter]:
        """What the student learns, by path."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the pipeline draws with the teacher."""
        running, self._host.model = self._host.model, self._taught_by
        try:
            yield
        finally:
            self._host.model = running

    def losses(
        self, student: nn.Module, inputs: dict[str, Any], target: Tensor
    ) -> dict[str, Tensor]:
        """The terms of `hybrid_losses`; one drop of the condition serves teacher and student.

        Args:
            student: what to call for the student: the model, or its wrapper for several processes.
            inputs: arguments of the model's forward.
            target: noise and clean latents [B, 2C, h, w].

        Returns:
            {"simple", "bound", "kd", "variance"}, each a scalar; the last two are 0 if not asked
            for.
        """
        kd, variance = self.weights["kd"], self.weights["variance"]
        taught = None
        if kd or variance:
            with torch.no_grad():
                taught = self._taught_by(**inputs, return_dict=False)[0]
        guess = student(**inputs, return_dict=False)[0]
        noise, clean = target.chunk(2, 1)
        found = hybrid_losses(
            guess,
            taught,
            noise,
            inputs["hidden_states"],
            clean,
            inputs["timestep"],
            self._host.scheduler,
            kd_noise=kd,
            kd_variance=variance,
            log_variance=self._log_variance,
        )
        return {
            "simple": found.simple,
            "bound": found.bound,
            "kd": found.noise,
            "variance": found.variance,
        }

    def save(self, folder: str | Path) -> None:
        """Write the student whole, as diffusers' `from_pretrained` and `linearize` read it."""
        with filling(folder) as temporary:
            self.model.save_pretrained(temporary)

    def close(self) -> None:
        """The pipeline has its own transformer again."""
        self._host.model = self._own
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._taught_by.train(self._was_training)
