"""Every transformer and UNet of diffusers: windows equal to a dense mask, restored to the bit."""

from __future__ import annotations

import pytest
import torch

import linfusion
from linfusion.layers.record import record_of
from tests.hosts.images import IMAGES
from tests.hosts.oracle import masked
from tests.hosts.tiny import Random, build, outputs
from tests.hosts.unets import UNETS
from tests.hosts.videos import VIDEOS

TAKEN = IMAGES | VIDEOS | UNETS
RADIUS = 2.3


@pytest.mark.parametrize("name", TAKEN)
def test_a_window_is_softmax_under_a_dense_mask_and_leaves_nothing_behind(name):
    row = TAKEN[name]
    model, arguments = build(name, row), row.inputs(Random(0))
    before = outputs(model, arguments)
    linfusion.linearize(model, "clear", radius=RADIUS)
    paths = list(record_of(model).layers)
    got = outputs(model, arguments)
    linfusion.restore(model)
    with masked(model, paths, row, RADIUS) as called:
        expected = outputs(model, arguments)
    assert set(called) == set(paths)
    assert (before - expected).abs().max() > 1e-3  # what the test can see
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert torch.equal(outputs(model, arguments), before)
    assert not any("Hosted" in type(getattr(m, "processor", None)).__name__ for m in model.modules())
