"""What every test shares: no network, one thread, tiny pipelines as fixtures."""

from __future__ import annotations

import os

# Read when the kernels are imported: there is no GPU here, Triton interprets them.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture
def tiny_pipeline():
    """A fresh Stable Diffusion pipeline of 64 px with random weights."""
    from tests.tiny import tiny_sd_pipeline

    return tiny_sd_pipeline()
