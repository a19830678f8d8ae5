"""The transformers that the engine of bands knows."""

from __future__ import annotations

TRANSFORMERS = ("FluxTransformer2DModel", "SD3Transformer2DModel")
