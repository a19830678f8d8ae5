"""Teacher and student in one UNet, and the three losses between them (LinFusion, section 3.4)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

import linfusion
from linfusion.attention.base import self_attention
from linfusion.attention.linfusion import NAME, LinFusionProcessor
from linfusion.layers import RECORD
from linfusion.weights import save

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class Distillation:
    """A UNet that is the student, and inside `teacher()` its own softmax teacher, bit for bit.

    The student's replaced layers hold their own projections and feature maps, in fp32, initialised
    from the teacher; all other weights are shared and frozen. Switching swaps the processors and
    the projections of those layers and copies nothing.

    Args:
        unet: the teacher. `close()` gives it back as it came.
        weights: student weights to start from, as `linfusion.linearize` takes them; None starts
            from the teacher's projections and feature maps that change nothing.
        train_projections: also train to_q, to_k, to_v, to_out.
        projection_mid_dim: hidden width of the feature maps; None is the layer's own width.

    Raises:
        ValueError: as `linfusion.linearize`; the UNet is then unchanged.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        weights: str | Path | None = None,
        train_projections: bool = True,
        projection_mid_dim: int | None = None,
    ) -> None:
        candidates = self_attention(unet, processor=LinFusionProcessor)
        softmax = {path: attn.processor for path, attn in candidates.items()}
        base = {path: _projections(attn) for path, attn in candidates.items()}
        if weights is None:
            linfusion.linearize(unet, "linfusion", projection_mid_dim=projection_mid_dim)
        else:  # loading overwrites the projections, so the teacher needs its own
            base = copy.deepcopy(base)
            linfusion.linearize(unet, "linfusion", weights=weights)

        self.unet = unet
        # While it is laid aside nothing warns of a fresh student, or of softmax in the teacher.
        self._record = unet.__dict__.pop(RECORD)
        self.layers = {path: attn for path, attn in candidates.items() if hasattr(attn, NAME)}
        self._trains_projections = train_projections
        self._was_training = unet.training
        self._frozen = [p for p in unet.parameters() if p.requires_grad]
        unet.requires_grad_(False).eval()
        self._own = {path: _projections(attn) for path, attn in self.layers.items()}
        self._teacher = {path: (softmax[path], base[path]) for path in self.layers}
        self._student = {}
        for path, attn in self.layers.items():
            getattr(attn, NAME).requires_grad_(True).float()
            projections = self._own[path]
            if train_projections:
                projections = copy.deepcopy(projections)
                for module in projections.values():
                    module.requires_grad_(True).float()
            self._student[path] = (attn.processor, projections)
        self._install(self._student)

        self._teaching = False
        self._taught: dict[str, Tensor] = {}
        self._feature_losses: dict[str, Tensor] = {}
        self._hooks = [
            attn.register_forward_hook(self._feature_hook(path))
            for path, attn in self.layers.items()
        ]

    def trained(self) -> dict[str, nn.Parameter]:
        """What the student learns, by path."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the UNet computes what it did before it had a student."""
        self._install(self._teacher)
        self._teaching = True
        try:
            yield
        finally:
            self._teaching = False
            self._install(self._student)

    def losses(
        self, student: nn.Module, sample: Tensor, timesteps: Tensor, target: Tensor, **kwargs: Any
    ) -> dict[str, Tensor]:
        """L_simple, L_kd and L_feat of one batch, each a mean of squares in fp32.

        L_simple = |s − target|², L_kd = |s − t|², L_feat = mean over layers of |a_s − a_t|², where
        s, t are the outputs of student and teacher and a_s, a_t those of a replaced layer, each on
        its own running input.

        Args:
            student: what to call for the student: the UNet, or its wrapper for several processes.
            sample: noisy latents [B, C, H, W].
            timesteps: [B].
            target: noise or velocity [B, C, H, W]; see `training_target`.
            kwargs: encoder_hidden_states and whatever else the UNet takes.

        Returns:
            {"simple", "kd", "feature"}, each a scalar.
        """
        with self.teacher(), torch.no_grad():
            taught = self.unet(sample, timesteps, return_dict=False, **kwargs)[0]
        self._feature_losses.clear()
        guess = student(sample, timesteps, return_dict=False, **kwargs)[0]
        return {
            "simple": F.mse_loss(guess.float(), target.float()),
            "kd": F.mse_loss(guess.float(), taught.float()),
            "feature": torch.stack(list(self._feature_losses.values())).mean(),
        }

    def save(self, folder: str | Path) -> None:
        """Write the student's weights, as `linfusion.linearize(..., weights=folder)` takes them."""
        setattr(self.unet, RECORD, self._record)
        try:
            save(self.unet, folder, attention_weights=True if self._trains_projections else None)
        finally:
            delattr(self.unet, RECORD)

    def close(self) -> None:
        """Take the student off: the UNet is the teacher again, with the weights it came with."""
        setattr(self.unet, RECORD, self._record)
        for hook in self._hooks:
            hook.remove()
        self._taught.clear()
        self._feature_losses.clear()
        for path, attn in self.layers.items():
            attn._modules.update(self._own[path])
        linfusion.restore(self.unet)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.unet.train(self._was_training)

    def _install(self, parts: dict[str, tuple[Any, dict[str, nn.Module]]]) -> None:
        for path, (processor, projections) in parts.items():
            self.layers[path].processor = processor
            self.layers[path]._modules.update(projections)

    def _feature_hook(self, path: str) -> Any:
        # The loss is taken in the hook, not from kept features, so that gradient checkpointing
        # recomputes it too and no layer's output outlives its block.
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._teaching:
                self._taught[path] = output
            elif torch.is_grad_enabled():
                taught = self._taught[path].float()
                self._feature_losses[path] = F.mse_loss(output.float(), taught)

        return hook


def noise_scheduler(scheduler: Any) -> DDPMScheduler:
    """The forward process of a pipeline's scheduler.

    Raises:
        ValueError: a prediction type other than epsilon and v_prediction.
    """
    given = scheduler.config.get("prediction_type", "epsilon")
    if given not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type: the scheduler has {given!r}, accepted are epsilon, v_prediction"
        )
    # diffusers drops what a config lists there, even if it was changed since.
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return DDPMScheduler.from_config(config)


def training_target(
    scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the UNet is to predict: ε, or v = √ᾱ ε − √(1−ᾱ) x₀."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps)


def _projections(attn: nn.Module) -> dict[str, nn.Module]:
    return {name: getattr(attn, name) for name in PROJECTIONS}
