"""One class of diffusers at tiny size: its configuration, and the arguments of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TEXT = 5  # tokens


class Random:
    """Tensors from one seed, in the order in which they are asked for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


@dataclass(frozen=True)
class Tiny:
    """A row of the table.

    Attributes:
        config: of its constructor.
        inputs: random source -> arguments of its forward.
        grids: of its pictures or videos, in tokens, in their order.
        before: tokens before the pixels of each sample in joint attention; None is all that are
            left of a sequence.
        moved: name of the argument with the picture or video, in which a test moves one latent.
        levels: whether `grids` are those of the levels of a UNet.
        least: keys of the smallest call that is over pixels.
        loud: names of further weights to be made large, where attention is a small part.
        needs: a package that its forward takes, beside those of diffusers.
    """

    config: dict[str, Any]
    inputs: Callable[[Random], dict[str, Any]]
    grids: tuple[tuple[int, ...], ...] = ((4, 6),)
    before: tuple[int, ...] | None = (TEXT,)
    moved: str = "hidden_states"
    levels: bool = False
    least: int = 0
    loud: tuple[str, ...] = ()
    needs: str | None = None


def build(name: str, row: Tiny, seed: int = 0) -> nn.Module:
    """The model, with weights that make attention far from an average of all tokens."""
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**row.config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            norm = any(x in path for x in ("norm_q.", "norm_k.", "q_norm.", "k_norm."))
            norm = norm or any(x in path for x in ("query_norm.", "key_norm.", "norm_added"))
            if norm and path.endswith("weight"):
                parameter.fill_(1.5)
            elif parameter.ndim > 1 and any(
                f".{x}." in path
                for x in ("to_q", "to_k", "to_qkv", "to_query", "to_key", "qkv", *row.loud)
            ):
                parameter.normal_(std=0.4)
            elif parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.2)  # what starts at zero would hide everything behind it
    return model


def outputs(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Everything a forward returns, as one row of numbers."""
    with torch.no_grad():
        found = _tensors(model(**arguments))
    return torch.cat([x.flatten().float() for x in found])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [x for one in value or () for x in _tensors(one)] if isinstance(value, list | tuple) else []
    )


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def ids(height: int, width: int, axes: int = 3, picture: int = 0) -> Tensor:
    """Position ids of a picture in raster order: [N, axes], picture, row, column (, 0)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows = [torch.full_like(y, picture), y, x, torch.zeros_like(y)][:axes]
    return torch.stack(rows, -1).reshape(-1, axes).float()
