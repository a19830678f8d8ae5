"""Stage 1 of a hybrid's training: each layer alone, on the activations of its own teacher.

As Attention Surgery (arXiv:2509.24899) and ReHyAt (arXiv:2601.04342) begin: only what was added to
a layer is trained, by the L1 distance of its attention to that of the teacher, on what the teacher
computes from prompts. There is no data, and nothing is kept of one step to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention.hybrid.form import NAME
from linfusion.layers.find import models_of
from linfusion.layers.record import record_of


class _Lesson(nn.Module):
    """In the place of a layer's form: gives the teacher's attention, and trains the form on it.

    With no learning rate it only measures.
    """

    def __init__(self, form: Any, lr: float | None) -> None:
        super().__init__()
        self.form: Any = form
        self.lr = lr
        self.optimizer = None if lr is None else torch.optim.Adam(form.parameters(), lr=lr)
        self.errors: list[Tensor] = []
        self.softmax: list[int] = []  # keys times queries
        self.ours: list[float] = []

    def begin(self, done: float) -> None:
        """Before a picture, when this share of them is done: the rate falls along a cosine."""
        self.errors.clear()
        assert self.optimizer is not None and self.lr is not None
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
        with torch.set_grad_enabled(self.optimizer is not None):
            loss = (self.form(q, k, v, grid=grid, context=context, scale=scale) - exact).abs()
            loss = loss.float().mean()
        if self.optimizer is not None:
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        pixels, others = k.shape[1], keys.shape[1] - k.shape[1]
        self.softmax.append(pixels * (pixels + others))
        self.ours.append(pixels * (self.form.keys(grid) + others))
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
        pipe: linearized by "hybrid".
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


@dataclass(frozen=True)
class Choice:
    """What `choose_layers` measured of a layer.

    Attributes:
        path: of the layer.
        error: mean of |ours - softmax| over mean of |softmax|.
        cost: products of scores and values, as a share of those of softmax.
        weight: its softmax products, as a share of those of all layers.
        chosen: whether it is to run linear.
    """

    path: str
    error: float
    cost: float
    weight: float
    chosen: bool


def choose_layers(
    pipe: Any,
    prompts: Sequence[str],
    *,
    budget: float,
    seed: int = 0,
    report: Callable[[list[Choice]], None] | None = None,
    **call: Any,
) -> list[str]:
    """The layers to run linear, for the least error of attention at a given cost of all.

    Errors are measured on what the teacher computes from the prompts; which layers those are is a
    knapsack, as Attention Surgery chooses its rates (arXiv:2509.24899), solved by dynamic
    programming over a thousand steps of cost.

    Args:
        pipe: with one model, linearized by "hybrid".
        prompts: a few; each is drawn once.
        budget: products of all layers together, as a share of those of softmax; between 0 and 1.
        seed: of the noise.
        report: gets what was measured and chosen of every layer, to print or keep.
        **call: of the pipeline, as height, width and num_inference_steps.

    Returns:
        Paths, for `linearize(pipe, ..., layers=...)`.

    Raises:
        ValueError: no choice of layers is within the budget; the message has the least there is.
    """
    if not prompts:
        raise ValueError(f"prompts: got {prompts!r}, expected some")
    if isinstance(budget, bool) or not 0 < budget < 1:
        raise ValueError(f"budget: got {budget!r}, expected a share of softmax between 0 and 1")
    if len(models_of(pipe)) > 1:
        raise ValueError(
            f"pipe: got {type(pipe).__name__} with models {sorted(models_of(pipe))}; a choice is of"
            " the layers of one"
        )
    with _lessons(pipe, None) as lessons:
        for i, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + i)
            pipe(prompt, generator=generator, output_type="latent", **call)
        errors = [_mean(lesson.errors) for lesson in lessons.values()]
        softmax = [sum(lesson.softmax) for lesson in lessons.values()]
        ours = [sum(lesson.ours) for lesson in lessons.values()]
    total = sum(softmax)
    least = sum(min(a, b) for a, b in zip(ours, softmax, strict=True)) / total
    if least > budget:
        raise ValueError(
            f"budget: got {budget}, but all layers that are cheaper linear together are"
            f" {least:.3f} of softmax at this size; a smaller window or larger cells cost less"
        )
    saved = [(b - a) / total for a, b in zip(ours, softmax, strict=True)]
    chosen = _knapsack(saved, errors, 1 - budget)
    if report is not None:
        report(
            [
                Choice(path, error, a / b, b / total, i in chosen)
                for i, (path, error, a, b) in enumerate(
                    zip(lessons, errors, ours, softmax, strict=True)
                )
            ]
        )
    return [path for i, path in enumerate(lessons) if i in chosen]


def _knapsack(saved: Sequence[float], errors: Sequence[float], need: float) -> set[int]:
    """The items that save at least `need` together, for the least sum of errors."""
    # Savings are rounded down, so that what is found is enough.
    steps = 1000
    units = [int(s / need * steps) for s in saved]
    best: list[tuple[float, frozenset[int]]] = [(math.inf, frozenset())] * (steps + 1)
    best[0] = (0.0, frozenset())
    for i, (unit, error) in enumerate(zip(units, errors, strict=True)):
        if unit <= 0:
            continue
        for have in range(steps, -1, -1):
            reached = min(steps, have + unit)
            candidate = best[have][0] + error
            if candidate < best[reached][0]:
                best[reached] = (candidate, best[have][1] | {i})
    if best[steps][0] == math.inf:  # rounding alone is in the way: everything that saves
        return {i for i, s in enumerate(saved) if s > 0}
    return set(best[steps][1])


def _mean(errors: list[Tensor]) -> float:
    return float(torch.stack(errors).mean()) if errors else math.nan


@contextmanager
def _lessons(pipe: Any, lr: float | None) -> Iterator[dict[str, _Lesson]]:
    """Lessons in the place of the forms of all layers, by path; the forms are put back."""
    homes: list[tuple[nn.Module, nn.Module]] = []
    lessons: dict[str, _Lesson] = {}
    models = models_of(pipe)
    for name, model in models.items():
        record = record_of(model)
        if record is None or record.method != NAME:
            got = "softmax" if record is None else repr(record.method)
            raise ValueError(f"pipe: its {name or 'model'} is {got}, expected {NAME!r}")
        for path in record.layers:
            attn = model.get_submodule(path)
            form = attn.get_submodule(NAME)
            if lr is not None and not list(form.parameters()):
                raise ValueError(
                    f"pipe: {path} has nothing to learn; linearize with maps=True or features="
                )
            homes.append((attn, form))
            lessons[f"{name}.{path}" if len(models) > 1 else path] = _Lesson(form, lr)
    try:
        for (attn, _), lesson in zip(homes, lessons.values(), strict=True):
            attn.add_module(NAME, lesson)
        yield lessons
    finally:
        for attn, form in homes:
            attn.add_module(NAME, form)
