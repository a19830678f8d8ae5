"""Distil the linear student of a pipeline from its softmax teacher (Liu et al. 2024, LinFusion)."""

from pathlib import Path

from diffusers import DiffusionPipeline

from linfusion.training.config import TrainConfig


def distill(config: TrainConfig, *, pipeline: DiffusionPipeline | None = None) -> Path:
    """Train, and return the folder of the student's weights (`config.output_dir`).

    Args:
        config: what to do; see `TrainConfig`.
        pipeline: the teacher, if it is in memory already; otherwise it is loaded from
            `config.pretrained_model_name_or_path`. It is given back as it came.
    """
    raise NotImplementedError
