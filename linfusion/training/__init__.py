"""Distillation of a linear student from its own softmax teacher."""

import importlib

_HOME = {
    "TrainConfig": "config",
    "distill": "trainer",
    "encode_clips": "data.clips",
    "Distillation": "objectives.distillation",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
