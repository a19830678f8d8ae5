"""Models that two GPUs share over NCCL, against one of them. Run by `make test-gpu`.

Never run so far: the machines at hand have had one GPU at most.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map

from linfusion.linearize import linearize
from tests.parallel.pool import Pool
from tests.parallel.sharing import difference, shared
from tests.tiny import tiny_xl_unet, unet_inputs
from tests.tiny_dit import pixart_inputs, tiny_pixart
from tests.tiny_joint import flux_inputs, tiny_flux
from tests.tiny_video import tiny_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

MODELS = {
    "unet": lambda: (linearize(tiny_xl_unet(), "linfusion"), unet_inputs(tiny_xl_unet(), 16)),
    "flux": lambda: (linearize(tiny_flux(), "clear", radius=3), flux_inputs()),
    "pixart": lambda: (linearize(tiny_pixart(), "lit", heads=2), pixart_inputs(14, 8)),
    "lingen": lambda: (
        tiny_transformer(causal=True),
        {
            "hidden_states": torch.arange(2048.0).sin().view(1, 4, 8, 16, 4),
            "timestep": torch.tensor([300.0]),
            "encoder_hidden_states": torch.ones(1, 3, 32),
        },
    ),
}


def job(ranks, name):
    model, inputs = MODELS[name]()
    model = model.cuda()
    given = tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, inputs)
    with torch.no_grad():
        alone = model(**given).sample
        with shared(ranks, model, "cuda"):
            return difference(model(**given).sample, alone)


@pytest.fixture(scope="module")
def pair():
    pool = Pool(2, "nccl")
    yield pool
    pool.close()


@pytest.mark.parametrize("name", MODELS)
def test_two_gpus_give_what_one_gives(pair, name):
    assert max(pair.run(2, job, name)) < 1e-4
