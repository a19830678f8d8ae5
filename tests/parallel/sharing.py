"""Models that ranks share, against the same models alone."""

from __future__ import annotations

import contextlib

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

from linfusion.parallel.parallelize import parallelize, unparallelize


def mesh_over(ranks):
    """The mesh of one axis, "sp", over the ranks of a job."""
    group = _resolve_process_group(ranks.group)
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("sp",))


@contextlib.contextmanager
def shared(ranks, model_or_pipe):
    parallelize(model_or_pipe, mesh=mesh_over(ranks))
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
