"""UNets, ControlNets and VAEs that ranks share give what they give alone."""

from __future__ import annotations

import pytest
import torch

from linfusion.linearize import linearize
from tests.parallel.pool import run
from tests.parallel.sharing import difference, shared
from tests.tiny import (
    denoise,
    tiny_unet,
    tiny_xl_unet,
    unet_inputs,
)


def lively(unet):
    """Fresh feature maps that do something."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in unet.named_parameters():
        if ".linfusion." in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def rectangle(unet, height, width, batch=2):
    inputs = unet_inputs(unet, batch=batch)
    generator = torch.Generator().manual_seed(5)
    inputs["sample"] = torch.randn(batch, 4, height, width, generator=generator)
    return inputs


def double(tree):
    from torch.utils._pytree import tree_map

    return tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )


def unet_job(ranks, make, height, dtype):
    unet = lively(linearize(make(), "linfusion")).to(dtype)
    inputs = rectangle(unet, height, 6)
    inputs = double(inputs) if dtype == torch.float64 else inputs
    alone = denoise(unet, **inputs)
    with shared(ranks, unet):
        together = denoise(unet, **inputs)
    again = denoise(unet, **inputs)
    return difference(together, alone), difference(again, alone), "forward" in unet.__dict__


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("make", [tiny_unet, tiny_xl_unet])
def test_a_shared_unet_is_the_one_alone(world, make):
    # 10 rows are 5 at the lower level, and not the same for any two ranks or more.
    for error, undone, left in run(world, unet_job, make, 10, torch.float64):
        # Time embeddings and moments of float64 tensors are float64; the models' own casts are not.
        assert error < 1e-10 and undone == 0 and not left


def test_rows_that_levels_do_not_divide_are_shared_as_well():
    assert max(e for e, _, _ in run(3, unet_job, tiny_unet, 11, torch.float64)) < 1e-10
