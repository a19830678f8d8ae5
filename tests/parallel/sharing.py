"""Models that ranks share, against the same models alone."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from linfusion.parallel import collectives
from linfusion.parallel.parallelize import parallelize, unparallelize


def mesh_over(ranks, device="cpu"):
    """The mesh of one axis, "sp", over the ranks of a job."""
    group = _resolve_process_group(ranks.group)
    return DeviceMesh.from_group(group, device, mesh_dim_names=("sp",))


@contextlib.contextmanager
def shared(ranks, model_or_pipe, device="cpu"):
    parallelize(model_or_pipe, mesh=mesh_over(ranks, device))
    try:
        yield model_or_pipe
    finally:
        unparallelize(model_or_pipe)


def difference(a, b):
    """Largest difference, of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def alone_and_shared(ranks, model, inputs):
    """How far the output and gradients of a model that is shared are from those it has alone.

    Gradients are averaged over ranks, as FSDP and DDP do, of a loss on the whole output.
    """
    found = []
    for context in (contextlib.nullcontext(), shared(ranks, model)):
        with context:
            model.zero_grad()
            with torch.enable_grad():
                out = model(**inputs).sample
                weight = torch.randn(
                    out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
                )
                (out * weight.to(out)).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append((out.detach(), grads))
    (out, grads), (out_shared, grads_shared) = found
    assert grads.keys() == grads_shared.keys()
    names = [n for n, g in grads.items() if g.abs().max() > 1e-9]
    errors = [difference(ranks.gather(grads_shared[n]).mean(0), grads[n]) for n in names]
    return difference(out_shared, out), max(errors)


@contextlib.contextmanager
def watched():
    """Bytes that leave this rank in each collective, in the order of their calls.

    They are counted where PyTorch is called: of a gather, what the rank has times the others.
    """
    sent = []
    places = ((collectives, "_ALL_GATHER"), (dist, "all_to_all_single"))

    def gathering(call):
        def watching(out, x, group):
            sent.append(x.nbytes * (dist.get_world_size(group) - 1))
            return call(out, x, group=group)

        return watching

    def exchanging(call):
        def watching(out, x, receive, send, group):
            sent.append(sum(send) - send[dist.get_rank(group)])
            return call(out, x, receive, send, group=group)

        return watching

    before = [getattr(home, name) for home, name in places]
    try:
        watches = (gathering, exchanging)
        for (home, name), call, watch in zip(places, before, watches, strict=True):
            setattr(home, name, watch(call))
        yield sent
    finally:
        for (home, name), call in zip(places, before, strict=True):
            setattr(home, name, call)
