"""Who takes part in a run: its examples, its teacher, and the pair of teacher and student."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from linfusion import zoo
from linfusion.attention.grids import video as volumes
from linfusion.layers.find import candidates, select
from linfusion.layers.record import MARKER
from linfusion.linearize import linearize, restore
from linfusion.pipelines.load import load
from linfusion.training.config import TrainConfig
from linfusion.training.data.cache import plan_sizes
from linfusion.training.data.clips import Clip, check_clips, clip_folder
from linfusion.training.data.films import Film, check_films, film_folder
from linfusion.training.data.pictures import Example, datasets_set, image_folder, read_prompts
from linfusion.training.data.shards import webdataset_shards
from linfusion.training.objectives.distillation import Distillation
from linfusion.training.objectives.from_data import FromData
from linfusion.training.objectives.whole import WholeStudent
from linfusion.training.teachers.base import Teacher
from linfusion.training.teachers.images import FlowTeacher, NoiseTeacher
from linfusion.training.teachers.lingen import LinGenHost
from linfusion.training.teachers.variance import ClassTeacher, PixArtTeacher, VarianceTeacher
from linfusion.training.teachers.video import VideoTeacher

Pair = Distillation | WholeStudent | FromData
FROZEN_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_examples(config: TrainConfig) -> list[Example] | list[Clip] | list[Film] | None:
    """Pictures and captions of the configured source; None if the teacher is to draw them.

    Raises:
        ValueError, ImportError: as the sources in `linfusion.training.data.pictures`,
            `clip_folder` and `film_folder`.
    """
    if config.method == "lingen":
        return film_folder(config)
    if config.method == "mate":
        assert config.train_data_dir is not None  # TrainConfig takes no other source
        return clip_folder(config.train_data_dir)
    if config.train_data_dir is not None:
        return image_folder(
            config.train_data_dir,
            image_column=config.image_column,
            caption_column=config.caption_column,
            anywhere=config.metadata_anywhere,
        )
    if config.dataset_name is not None:
        return datasets_set(
            config.dataset_name,
            config.dataset_config_name,
            image_column=config.image_column,
            caption_column=config.caption_column,
        )
    if config.train_shards_path_or_url is not None:
        return webdataset_shards(
            config.train_shards_path_or_url, caption_column=config.caption_column
        )
    if config.train_prompts is not None:
        read_prompts(config.train_prompts)  # a missing file is found out before the model is loaded
    return None


def teacher_of(pipe: DiffusionPipeline, config: TrainConfig) -> Teacher:
    """The kind of teacher a pipeline is.

    Raises:
        ValueError: none that is known.
    """
    if (type(pipe).__name__ == "LinGenPipeline") != (config.method == "lingen"):
        raise ValueError(
            f"method: got {config.method!r} for a {type(pipe).__name__}; 'lingen' is for a"
            " LinGenPipeline, and it alone"
        )
    if config.method == "lingen":
        return LinGenHost(pipe)
    if getattr(pipe, "unet", None) is not None:
        return NoiseTeacher(pipe)
    kinds = {kind.__name__ for kind in type(getattr(pipe, "transformer", None)).__mro__}
    if kinds & {"FluxTransformer2DModel", "SD3Transformer2DModel"}:
        return FlowTeacher(pipe, config.guidance_embedding)
    if "DiTTransformer2DModel" in kinds:
        return ClassTeacher(pipe)
    if "PixArtTransformer2DModel" in kinds:
        return PixArtTeacher(pipe)
    if kinds & set(volumes.HOSTS):
        return VideoTeacher(pipe)
    raise ValueError(
        f"pretrained_model_name_or_path: {type(pipe).__name__} has neither a unet nor a transformer"
        " of FLUX, Stable Diffusion 3, DiT, PixArt, Wan, SANA-Video or CogVideoX, the models that"
        " are distilled"
    )


def check_student(config: TrainConfig, teacher: Teacher, examples: Any) -> None:
    """Refuse what this pipeline cannot do now, not after hours of filling the cache.

    Raises:
        ValueError: the data, the sizes, the options or the weights do not fit the model.
    """
    if isinstance(teacher, LinGenHost):
        check_films(config, teacher, examples)
        return
    levels = [] if config.method == "mate" else plan_sizes(config, teacher.multiple)
    oblong = [f"{h}x{w}" for level in levels for h, w in level if h != w]
    if oblong and teacher.squares_only:
        raise ValueError(
            f"aspect_ratio_buckets: got {oblong[0]}; {type(teacher.model).__name__} draws squares"
            " alone"
        )
    paths = list(candidates(teacher.model, config.method))
    if config.method == "mate":
        check_clips(teacher, examples)
    if config.feature_layers:
        select(paths, config.feature_layers, "feature_layers")
    if config.method == "lit":
        pair_of(config, teacher).close()
    # A student that was saved inside its model is not tried on: restore would forget that it is.
    elif config.weights is not None or MARKER not in teacher.model.config:
        linearize(teacher.model, config.method, weights=config.weights, **config.method_options)
        restore(teacher.model)


def pair_of(config: TrainConfig, teacher: Teacher) -> Pair:
    """Student and teacher of a run, as their method wants them."""
    if isinstance(teacher, LinGenHost):
        return FromData(teacher, weights=config.weights)
    if isinstance(teacher, VarianceTeacher):
        other: Any = None
        if config.teacher_model_name_or_path is not None:
            other = load(zoo.resolve(config.teacher_model_name_or_path)).transformer
            other.to(teacher.model.device, FROZEN_DTYPES[config.mixed_precision])
        return WholeStudent(
            teacher,
            policy=config.inherit,
            weights=config.weights,
            teacher=other,
            kd_weight=config.kd_weight,
            kd_variance_weight=config.kd_variance_weight or 0.0,
            log_variance=config.log_variance,
            seed=config.seed,
            **config.method_options,
        )
    paths = list(candidates(teacher.model, config.method))
    return Distillation(
        teacher.model,
        method=config.method,
        weights=config.weights,
        train_projections=config.train_projections,
        projection_rank=config.projection_rank,
        feature_layers=config.feature_layers or teacher.feature_layers(paths),
        compare="block" if config.method == "mate" else "layer",
        kd_weight=config.kd_weight,
        feature_weight=config.feature_weight,
        **config.method_options,
    )
