"""The two collectives that everything else is made of, as operators with gradients.

Both are opaque to torch.compile and move bytes as they are, so that a dtype which a backend does
not know is no matter. Their gradients are true adjoints of the sum of all ranks' losses: what a
rank sent to others gathers the gradients of all of them. Sums over ranks are in their order, so
that results do not depend on who came first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group

from linfusion.kernels.library import LIBRARY

# The old name warns from torch 2.13 on.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

LIBRARY.define("gather_ranks(Tensor x, str group, int world) -> Tensor")
LIBRARY.define("exchange_ranks(Tensor x, str group, int[] send, int[] receive) -> Tensor")


def gather(x: Tensor, group: str, world: int) -> Tensor:
    """x of every rank, [world, *x.shape]; x has one shape on all.

    Args:
        x: of this rank.
        group: name of the process group.
        world: its ranks.
    """
    out: Tensor = torch.ops.linfusion.gather_ranks(x, group, world)
    return out


def exchange(x: Tensor, group: str, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Rows to every rank and from every rank.

    Args:
        x: [sum(send), ...], those for rank 0 first.
        group: name of the process group.
        send, receive: how many rows go to and come from each rank.

    Returns:
        [sum(receive), ...], those of rank 0 first.
    """
    out: Tensor = torch.ops.linfusion.exchange_ranks(x, group, list(send), list(receive))
    return out


def group_named(name: Any) -> ProcessGroup:
    """The process group of that name."""
    return _resolve_process_group(name)


def _bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as [rows, bytes of a row]."""
    rows = x.shape[0]
    return x.view(rows, -1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def _gather(x: Tensor, group: str, world: int) -> Tensor:
    out = x.new_empty(world, *x.shape)
    if x.numel():
        mine = _bytes(x.contiguous()[None])
        _ALL_GATHER(_bytes(out).flatten(), mine.flatten(), group=group_named(group))
    return out


def _exchange(x: Tensor, group: str, send: list[int], receive: list[int]) -> Tensor:
    out = x.new_empty(sum(receive), *x.shape[1:])
    width = x[:1].numel() if x.shape[0] else out[:1].numel()
    size = width * x.element_size()
    dist.all_to_all_single(
        _bytes(out).flatten(),
        _bytes(x.contiguous()).flatten(),
        [n * size for n in receive],
        [n * size for n in send],
        group=group_named(group),
    )
    return out


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.world = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ones = [1] * ctx.world
    return exchange(grad, ctx.group, ones, ones).sum(0), None, None


def _exchange_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.group, ctx.send, ctx.receive = inputs


def _exchange_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return exchange(grad, ctx.group, ctx.receive, ctx.send), None, None, None


def _register() -> None:
    kernels = {"gather_ranks": _gather, "exchange_ranks": _exchange}
    fakes: dict[str, Any] = {
        "gather_ranks": lambda x, group, world: x.new_empty(world, *x.shape),
        "exchange_ranks": lambda x, group, send, receive: x.new_empty(sum(receive), *x.shape[1:]),
    }
    grads: dict[str, Any] = {
        "gather_ranks": (_gather_backward, _gather_setup),
        "exchange_ranks": (_exchange_backward, _exchange_setup),
    }
    for name, kernel in kernels.items():
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"linfusion::{name}", fakes[name], lib=LIBRARY)
        backward, setup = grads[name]
        torch.library.register_autograd(
            f"linfusion::{name}", backward, setup_context=setup, lib=LIBRARY
        )


_register()
