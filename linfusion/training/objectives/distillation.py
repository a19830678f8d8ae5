"""Teacher and student in one model, and the three losses between them.

LinFusion, section 3.4, and CLEAR, section 3.3, take the same three.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.layers.find import candidates, select
from linfusion.layers.projections import attention_parameters, refuse_quantized
from linfusion.layers.record import RECORD, record_of
from linfusion.linearize import linearize, restore
from linfusion.students.low_rank import check_rank, low_rank_factors, save_low_rank
from linfusion.students.saving import save

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
COMPARED = ("layer", "block")


class Distillation:
    """A model that is the student, and inside `teacher()` its own softmax teacher, bit for bit.

    The student's replaced layers hold their own projections and learned parts, in fp32, initialised
    from the teacher; all other weights are shared and frozen. Switching swaps the processors and
    the projections of those layers and copies nothing.

    Args:
        model: the teacher. `close()` gives it back as it came.
        method: of `linfusion.linearize`.
        weights: student weights to start from, as `linfusion.linearize` takes them; None starts
            from the teacher's projections and a learned part that changes nothing.
        train_projections: also train to_q, to_k, to_v, to_out.
        projection_rank: of what each of them learns, see `constrain`; None leaves it free.
        feature_layers: layers whose outputs are compared, as `linfusion.linearize` selects them;
            None takes all that are replaced.
        compare: "layer", their outputs, or "block", those of the blocks that they are in: the
            hidden states (LinMU, Wang 2026, arXiv:2601.01322).
        kd_weight, feature_weight: of L_kd and L_feat in the sum that is trained on.
        **options: of the method.

    Raises:
        ValueError: as `linfusion.linearize`; the model is then unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str = "linfusion",
        weights: str | Path | None = None,
        train_projections: bool = True,
        projection_rank: int | None = None,
        feature_layers: Sequence[str] | None = None,
        compare: str = "layer",
        kd_weight: float = 0.5,
        feature_weight: float = 0.5,
        **options: Any,
    ) -> None:
        if compare not in COMPARED:
            raise ValueError(f"compare: got {compare!r}, expected one of {COMPARED}")
        if record_of(model) is not None:
            raise ValueError(
                f"model: {type(model).__name__} is linearized already, and its softmax form is what"
                " teaches; call linfusion.restore first"
            )
        self._mechanism = get_method(method)
        found = candidates(model, method)
        features = list(found)
        if feature_layers is not None:
            features = select(features, feature_layers, "feature_layers")
        if train_projections:
            for path, attn in found.items():
                refuse_quantized(path, attn)
        softmax = {path: attn.processor for path, attn in found.items()}
        base = {path: _projections(attn) for path, attn in found.items()}
        if projection_rank is not None:
            check_rank("projection_rank", projection_rank, found.values())
        if weights is not None:  # loading overwrites the projections, so the teacher needs its own
            base = copy.deepcopy(base)
        linearize(model, method, weights=weights, **options)
        self._record = model.__dict__[RECORD]
        if feature_layers is None:
            features = list(self._record.layers)
        elif left := [path for path in features if path not in self._record.layers]:
            restore(model)
            raise ValueError(f"feature_layers: the student of {weights} does not replace {left}")

        self.model = model
        # While it is laid aside nothing warns of a fresh student, or of softmax in the teacher.
        del model.__dict__[RECORD]
        self.layers = {path: found[path] for path in self._record.layers}
        self._trains_projections = train_projections
        self._rank = projection_rank
        self._was_training = model.training
        self._frozen = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False).eval()
        self._own = {path: _projections(attn) for path, attn in self.layers.items()}
        self._teacher = {path: (softmax[path], base[path]) for path in self.layers}
        self._student = {}
        for path, attn in self.layers.items():
            getattr(attn, self._mechanism.name).requires_grad_(True).float()
            projections = self._own[path]
            if train_projections:
                projections = copy.deepcopy(projections)
                for module in projections.values():
                    module.requires_grad_(True).float()
            self._student[path] = (attn.processor, projections)
        self._install(self._student)

        self.weights = {"simple": 1.0, "kd": kd_weight, "feature": feature_weight}
        self._one_thread = threading.RLock()
        self._teaching = self._comparing = False
        self._taught: dict[str, Tensor] = {}
        self._feature_losses: dict[str, Tensor] = {}
        compared: dict[str, nn.Module] = {path: self.layers[path] for path in features}
        if compare == "block":
            compared = {path: model.get_submodule(path.rpartition(".")[0]) for path in features}
        self._hooks = [
            module.register_forward_hook(self._feature_hook(path))
            for path, module in compared.items()
        ]

    def trained(self) -> dict[str, nn.Parameter]:
        """What the student learns, by path."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Inside, the model computes what it did before it had a student.

        Raises:
            RuntimeError: another thread uses the model as a teacher.
        """
        with self._alone():
            self._mechanism.detach(self.model)
            self._install(self._teacher)
            self._teaching = True
            try:
                yield
            finally:
                self._teaching = False
                self._install(self._student)
                self._mechanism.attach(self.model, self._record.settings)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # Two threads would find each other's processors on the one model.
        if not self._one_thread.acquire(blocking=False):
            raise RuntimeError(
                "teacher: another thread uses this model as a teacher at the moment; teacher and"
                " student are one model, so give every thread an objective and a model of its own"
            )
        try:
            yield
        finally:
            self._one_thread.release()

    def losses(
        self, student: nn.Module, inputs: dict[str, Any], target: Tensor
    ) -> dict[str, Tensor]:
        """L_simple, L_kd and L_feat of one batch, each a mean of squares in fp32.

        L_simple = |s − target|², L_kd = |s − t|², L_feat = mean over layers of |a_s − a_t|², where
        s, t are the outputs of student and teacher and a_s, a_t those of a compared layer or block,
        each on its own running input.

        Args:
            student: what to call for the student: the model, or its wrapper for several processes.
            inputs: arguments of the model's forward.
            target: what it is to predict, of the shape of its output.

        Returns:
            {"simple", "kd", "feature"}, each a scalar.

        Raises:
            RuntimeError: another thread uses the model as a teacher.
        """
        with self._alone():
            self._taught.clear()
            with self.teacher(), torch.no_grad():
                taught = self.model(**inputs, return_dict=False)[0]
            self._comparing = True
            try:
                guess = student(**inputs, return_dict=False)[0]
                features = torch.stack(list(self._feature_losses.values())).mean()
            finally:
                self._comparing = False
                self._feature_losses.clear()
        return {
            "simple": F.mse_loss(guess.float(), target.float()),
            "kd": F.mse_loss(guess.float(), taught.float()),
            "feature": features,
        }

    @torch.no_grad()
    def constrain(self) -> None:
        """Bring every projection to the nearest one of the rank that its change may have."""
        if self._rank is None:
            return
        for path, attn in self.layers.items():
            base = self._base_weights(path)
            for name, parameter in attention_parameters(attn).items():
                if parameter.ndim == 2:
                    kept = base[name].to(parameter.device, torch.float32)
                    b, a = low_rank_factors(parameter - kept, self._rank)
                    parameter.copy_(kept.addmm(b, a))

    def save(self, folder: str | Path) -> None:
        """Write the student's weights, as `linfusion.linearize(..., weights=folder)` takes them."""
        record = self._record
        if self._rank is not None:  # a difference is one to the teacher's
            taken = {
                path: replace(layer, base_weights=self._base_weights(path))
                for path, layer in record.layers.items()
            }
            record = replace(record, layers=taken)
        setattr(self.model, RECORD, record)
        whole = True if self._trains_projections else None
        try:
            if self._rank is None:
                save(self.model, folder, attention_weights=whole)
            else:
                save_low_rank(self.model, folder, rank=self._rank, dtype=torch.float32)
        finally:
            delattr(self.model, RECORD)

    def close(self) -> None:
        """Take the student off: the UNet is the teacher again, with the weights it came with."""
        setattr(self.model, RECORD, self._record)
        for hook in self._hooks:
            hook.remove()
        self._taught.clear()
        self._feature_losses.clear()
        for path, attn in self.layers.items():
            attn._modules.update(self._own[path])
        restore(self.model)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.model.train(self._was_training)

    def _base_weights(self, path: str) -> dict[str, Tensor]:
        _, modules = self._teacher[path]
        return {
            f"{name}.{leaf}": parameter.detach()
            for name, module in modules.items()
            for leaf, parameter in module.named_parameters()
        }

    def _install(self, parts: dict[str, tuple[Any, dict[str, nn.Module]]]) -> None:
        for path, (processor, projections) in parts.items():
            self.layers[path].processor = processor
            self.layers[path]._modules.update(projections)

    def _feature_hook(self, path: str) -> Any:
        # The loss is taken in the hook, not from kept features, so that gradient checkpointing
        # recomputes it too and no layer's output outlives its block. What is recomputed is for the
        # gradient alone: kept, it would hold every layer's graph until the next step.
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._teaching:
                self._taught[path] = _joined(output)
            elif torch.is_grad_enabled():
                taught = self._taught[path].float()
                loss = F.mse_loss(_joined(output).float(), taught)
                if self._comparing:
                    self._feature_losses[path] = loss

        return hook


def _joined(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a layer or block returns: tokens [B, N, C], or those of the picture and of the text."""
    return output if isinstance(output, Tensor) else torch.cat(output, 1)


def _projections(attn: nn.Module) -> dict[str, nn.Module]:
    found = {name: getattr(attn, name, None) for name in PROJECTIONS}
    return {name: module for name, module in found.items() if module is not None}
