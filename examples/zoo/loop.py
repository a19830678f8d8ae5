"""What the zoo's training scripts share: whole checkpoints, the learning rate, a log line."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch


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
