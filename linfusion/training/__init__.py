"""Distillation of a linear student from its own softmax teacher, and the metrics that judge it."""

import importlib

_HOME = {
    "TrainConfig": "config",
    "distill": "trainer",
    "encode_clips": "clips",
    "evaluate": "evaluation",
    "Distillation": "objective",
    "frechet_distance": "metrics",
    "kernel_distance": "metrics",
    "kernel_distance_ratio": "metrics",
    "kernel_distance_subsets": "metrics",
    "psnr": "metrics",
    "ssim": "metrics",
    "consistency": "large",
    "patch_distances": "large",
    "patch_features": "large",
    "repetition_score": "large",
    "seam_score": "large",
    "clip_distances": "video_metrics",
    "clip_features": "video_metrics",
    "flicker": "video_metrics",
    "motion": "video_metrics",
    "inception_features": "features",
    "random_features": "features",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
