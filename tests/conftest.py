"""What every test shares: no network, one thread, tiny pipelines, and the device they run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.on_device import OnDevice

GPU = torch.cuda.is_available()
if not GPU:  # read when the kernels are imported: Triton interprets them
    os.environ.setdefault("TRITON_INTERPRET", "1")

NO_GPU = "no CUDA or ROCm device here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none: `gpu` marks, and all of `make test-gpu`."""
    for item in items:
        if not GPU and (item.get_closest_marker("gpu") or chosen_device() != "cpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def chosen_device() -> str:
    """Where kernels and processors are tested: "cpu", or what `make test-gpu` says."""
    return os.environ.get("LINFUSION_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of the run; tests of kernels and processors make their tensors there unasked."""
    device = torch.device(chosen_device())
    if device.type == "cpu" or not {"kernels", "attention"} & set(request.path.parts):
        yield device
        return
    with OnDevice(device):
        yield device


@pytest.fixture
def tiny_pipeline():
    """A fresh Stable Diffusion pipeline of 64 px with random weights."""
    from tests.tiny import tiny_sd_pipeline

    return tiny_sd_pipeline()
