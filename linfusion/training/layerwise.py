"""Stage 1 of a hybrid's training: each layer alone, on the activations of its own teacher.

As Attention Surgery (arXiv:2509.24899) and ReHyAt (arXiv:2601.04342) begin: only what was added to
a layer is trained, by the L1 distance of its attention to that of the teacher, on what the teacher
computes from prompts. There is no data, and nothing is kept of one step to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention import get_method
from linfusion.attention.hosts.processor import HostedProcessor
from linfusion.layers.find import models_of
from linfusion.layers.record import record_of

METHODS = ("clear", "hybrid")  # those whose form is a module of its own


class _Lesson(nn.Module):
    """In the place of a layer's form: gives the teacher's attention, and trains the form on it."""

    def __init__(self, form: nn.Module, lr: float) -> None:
        super().__init__()
        self.form = form
        self.lr = lr
        self.optimizer = torch.optim.Adam(form.parameters(), lr=lr)
        self.errors: list[Tensor] = []

    def begin(self, done: float) -> None:
        """Before a picture, when this share of them is done: the rate falls along a cosine."""
        self.errors.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        grid: tuple[int, ...],
        context: tuple[Tensor, Tensor] | None,
        scale: float | None,
    ) -> Tensor:
        q, k, v = q.detach(), k.detach(), v.detach()
        keys, values = k, v
        if context is not None:
            keys, values = torch.cat([context[0], k], 1), torch.cat([context[1], v], 1)
        exact = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), scale=scale
        ).transpose(1, 2)
        with torch.enable_grad():
            loss = (self.form(q, k, v, grid=grid, context=context, scale=scale) - exact).abs()
            loss = loss.float().mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.errors.append((loss / exact.float().abs().mean()).detach())
        return exact


def fit_layers(
    pipe: Any,
    prompts: Sequence[str],
    *,
    pictures: int,
    lr: float = 5e-4,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    **call: Any,
) -> dict[str, float]:
    """Train what `linearize` put on each layer of a pipeline, by its own attention before that.

    The pipeline generates as its softmax teacher does, prompt after prompt, and every layer learns
    from every step of it.

    Args:
        pipe: linearized by "hybrid" (or "clear" with pooling on a host whose own processor runs).
        prompts: in turn.
        pictures: how many are generated.
        lr: of Adam, falling to zero along a cosine.
        seed: of the noise.
        progress: (pictures made, mean relative error of their layers), after each.
        **call: of the pipeline, as height, width and num_inference_steps.

    Returns:
        Mean relative L1 error of each layer's attention in the last picture.

    Raises:
        ValueError: it is not linearized by such a method, has nothing to learn, or there is no
            prompt or no picture.
    """
    if not prompts:
        raise ValueError(f"prompts: got {prompts!r}, expected some")
    if type(pictures) is not int or pictures < 1:
        raise ValueError(f"pictures: got {pictures!r}, expected a positive number")
    with _lessons(pipe, lr) as lessons:
        for made in range(pictures):
            for lesson in lessons.values():
                lesson.begin(made / pictures)
            generator = torch.Generator().manual_seed(seed + made)
            pipe(prompts[made % len(prompts)], generator=generator, output_type="latent", **call)
            errors = {path: _mean(lesson.errors) for path, lesson in lessons.items()}
            if progress is not None:
                progress(made + 1, sum(errors.values()) / len(errors))
    return errors


def _mean(errors: list[Tensor]) -> float:
    return float(torch.stack(errors).mean()) if errors else math.nan


@contextmanager
def _lessons(pipe: Any, lr: float) -> Iterator[dict[str, _Lesson]]:
    """Lessons in the place of the forms of all layers, by path; the forms are put back."""
    homes: list[tuple[nn.Module, str, nn.Module]] = []
    lessons: dict[str, _Lesson] = {}
    for name, model in models_of(pipe).items():
        record = record_of(model)
        if record is None or record.method not in METHODS:
            got = "softmax" if record is None else record.method
            raise ValueError(f"pipe: its {name or 'model'} is {got}, expected one of {METHODS}")
        for path in record.layers:
            attn = model.get_submodule(path)
            form = attn.get_submodule(get_method(record.method).name)
            if not isinstance(attn.processor, HostedProcessor):
                raise ValueError(f"pipe: {path} has no form of its own to train alone")
            if not list(form.parameters()):
                raise ValueError(
                    f"pipe: {path} has nothing to learn; linearize with maps=True or features="
                )
            homes.append((attn, record.method, form))
            lessons[f"{name}.{path}" if name else path] = _Lesson(form, lr)
    try:
        for (attn, method, _), lesson in zip(homes, lessons.values(), strict=True):
            attn.add_module(method, lesson)
        yield lessons
    finally:
        for attn, method, form in homes:
            attn.add_module(method, form)
