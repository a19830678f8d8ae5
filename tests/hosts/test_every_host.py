"""Every transformer and UNet of diffusers: windows equal to a dense mask, restored to the bit."""

from __future__ import annotations

import diffusers
import pytest
import torch

import linfusion
from linfusion.layers.record import record_of
from tests.hosts.images import IMAGES
from tests.hosts.oracle import windowed
from tests.hosts.refused import REFUSED
from tests.hosts.support import PAGE, page
from tests.hosts.tiny import Random, build, outputs
from tests.hosts.unets import UNETS
from tests.hosts.videos import VIDEOS

TAKEN = IMAGES | VIDEOS | UNETS
RADIUS = 2.3
# Method: its options, and the side of the cells that sum up what the window does not see.
METHODS = {
    "clear": ({"radius": RADIUS}, 0),
    "hybrid": ({"window": RADIUS, "cell": 3}, 3),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_window_is_softmax_under_a_dense_mask_and_leaves_nothing_behind(name):
    row = TAKEN[name]
    if row.needs is not None:
        pytest.importorskip(row.needs)
    model, arguments = build(name, row), row.inputs(Random(0))
    before = outputs(model, arguments)
    for method, (options, cell) in METHODS.items():
        linfusion.linearize(model, method, **options)
        paths = list(record_of(model).layers)
        got = outputs(model, arguments)
        linfusion.restore(model)
        with windowed(model, paths, row, RADIUS, cell) as called:
            expected = outputs(model, arguments)
        assert set(called) == set(paths)
        assert (before - expected).abs().max() > 1e-3, method  # what the test can see
        assert (got - expected).abs().max() < 1e-5, method
    assert torch.equal(outputs(model, arguments), before)
    assert not any("Hosted" in type(getattr(m, "processor", 0)).__name__ for m in model.modules())


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_pixels_to_see_is_refused_with_the_reason(name):
    config, reason = REFUSED[name]
    model = getattr(diffusers, name)(**config)
    for method in METHODS:
        with pytest.raises(ValueError, match=f"model_or_pipe: {name}.*{reason}"):
            linfusion.linearize(model, method)
    assert record_of(model) is None


def test_no_class_of_diffusers_is_forgotten():
    from diffusers.models import controlnets, transformers, unets

    homes = tuple(package.__name__ for package in (controlnets, transformers, unets))
    found = {
        name
        for name in dir(diffusers)
        if isinstance(kind := getattr(diffusers, name), type)
        and issubclass(kind, diffusers.ModelMixin)
        and kind.__module__.startswith(homes)
        and "Multi" not in name  # several of one class
        and "Adapter" not in name  # parts for another model
    }
    assert found == set(TAKEN) | set(REFUSED)


def test_the_support_table_is_that_of_this_diffusers():
    assert page() == PAGE.read_text(), "run python -m tests.hosts.support --write"
