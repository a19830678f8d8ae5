"""Judging pictures and videos: distances, scores, comparisons."""

import importlib

_HOME = {
    "evaluate": "compare",
    "frechet_distance": "metrics",
    "kernel_distance": "metrics",
    "kernel_distance_ratio": "metrics",
    "psnr": "metrics",
    "ssim": "metrics",
    "consistency": "large_pictures",
    "patch_distances": "large_pictures",
    "patch_features": "large_pictures",
    "repetition_score": "large_pictures",
    "seam_score": "large_pictures",
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
