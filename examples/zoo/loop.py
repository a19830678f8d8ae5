"""What the zoo's training scripts share: the loop, whole checkpoints, previews, a log line."""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image


def save(path: Path, **state) -> None:
    """torch.save under a temporary name, then rename: a killed run leaves a whole checkpoint."""
    tmp = path.with_suffix(".tmp")
    torch.save(state, tmp)
    os.replace(tmp, path)


def load(path: Path) -> dict | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, x))))


@torch.no_grad()
def ema_update(ema: list[torch.Tensor], params: list[torch.Tensor], decay: float) -> None:
    torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - decay)


@contextmanager
def averaged(params: list[torch.Tensor], ema: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters are their average; what is drawn there moves no later draw."""
    kept = [p.detach().clone() for p in params]
    rng = torch.get_rng_state()
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    yield
    with torch.no_grad():
        torch._foreach_copy_(params, kept)
    torch.set_rng_state(rng)


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    output: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    preview_every: int = 1000,
) -> None:
    """Flags that `run` reads, with the defaults of one script."""
    parser.add_argument("--data", type=Path, help="folder of the pictures; fetched when not given")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--preview-every", type=int, default=preview_every)
    parser.add_argument("--checkpoint-every", type=int, default=250, help="steps")
    parser.add_argument("--seed", type=int, default=0)


def run(
    args: argparse.Namespace,
    params: list[torch.nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    examples: int,
    losses: Callable[[list[int], int], dict[str, torch.Tensor]],
    preview: Callable[[Path], None],
    *,
    warmup: int = 200,
    rng: random.Random | None = None,
) -> None:
    """Train from the last checkpoint to the last step; the parameters are then their average.

    Args:
        args: of `add_arguments`.
        params: what is trained.
        optimizers: of them, all at one learning rate.
        examples: how many there are; each is taken once a pass.
        losses: of the examples of a batch, at a step; "loss" is what is minimised, the others are
            logged.
        preview: draws into a file, from the averaged parameters.
        warmup: steps to the full learning rate.
        rng: of the script, kept in checkpoints.
    """
    ema = [p.detach().clone() for p in params]
    first = 0
    checkpoint = args.output / "checkpoint.pt"
    if state := load(checkpoint):
        with torch.no_grad():
            torch._foreach_copy_(params, state["params"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        ema, first = state["ema"], state["step"]
        torch.set_rng_state(state["torch_rng"])
        if rng is not None:
            version, internal, gauss = state["python_rng"]
            rng.setstate((version, tuple(internal), gauss))
    order: list[int] = state["order"] if state else []

    clock = Clock(50)
    for step in range(first + 1, args.steps + 1):
        for optimizer in optimizers:
            rate = learning_rate(step, args.steps, args.learning_rate, warmup)
            optimizer.param_groups[0]["lr"] = rate
        if len(order) < args.batch_size:
            order += torch.randperm(examples).tolist()
        index, order = order[: args.batch_size], order[args.batch_size :]
        found = losses(index, step)
        found["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema_update(ema, params, min(0.999, (1 + step) / (10 + step)))
        clock.log(step, **{name: value.detach() for name, value in found.items()}, norm=norm)
        if step % args.checkpoint_every == 0 or step == args.steps:
            save(
                checkpoint,
                params=[p.detach() for p in params],
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                ema=ema,
                step=step,
                torch_rng=torch.get_rng_state(),
                python_rng=None if rng is None else rng.getstate(),
                order=order,
            )
        if step % args.preview_every == 0 or step == args.steps:
            with averaged(params, ema):
                preview(args.output / f"preview-{step}.png")
    with torch.no_grad():
        torch._foreach_copy_(params, ema)


def sheet(images: list, columns: int, size: int) -> Image.Image:
    """Square pictures in rows."""
    rows = -(-len(images) // columns)
    found = Image.new("RGB", (size * columns, size * rows))
    for i, image in enumerate(images):
        found.paste(image, (size * (i % columns), size * (i // columns)))
    return found


class Clock:
    """Prints the mean of what is logged, and the seconds a step takes, every `every` steps."""

    def __init__(self, every: int) -> None:
        self.every, self.sums, self.n, self.start = every, {}, 0, time.time()

    def log(self, step: int, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.n += 1
        if step % self.every == 0:
            means = "  ".join(f"{name} {total / self.n:.4g}" for name, total in self.sums.items())
            seconds = (time.time() - self.start) / self.n
            print(f"step {step}  {means}  {seconds:.2f} s/step", flush=True)
            self.sums, self.n, self.start = {}, 0, time.time()
