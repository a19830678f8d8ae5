"""The arguments of a distillation run, named as in diffusers' train_text_to_image.py."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from linfusion.training.data.schedule import ClipOptions
from linfusion.training.schema import (
    Count,
    Positive,
    Share,
    Steps,
    Weight,
    check_mapping,
    hints_of,
)

SOURCES = ("train_data_dir", "dataset_name", "train_shards_path_or_url", "train_prompts")
LINGEN = "lingen"  # trains a whole model without a teacher, and so is no method of `linearize`
_RECIPES = Path(__file__).parent / "recipes"
_OF_LIT = ("teacher_model_name_or_path", "kd_variance_weight")


@dataclass(kw_only=True)
class TrainConfig:
    """What `distill` does, on what, for how long.

    Exactly one source of pictures is given: `train_data_dir`, `dataset_name`,
    `train_shards_path_or_url` or `train_prompts`.

    Attributes:
        pretrained_model_name_or_path: folder or hub name of the teacher pipeline, or "zoo:emoji".
        revision, variant: passed to `from_pretrained`.
        method: of `linfusion.linearize`: "linfusion" for UNets, "clear" and "hybrid" for FLUX and
            Stable Diffusion 3, "lit" for DiT and PixArt, "mate" for Wan, SANA-Video and CogVideoX.
            "lingen" trains the whole transformer of a LinGenPipeline on clips and pictures,
            without a teacher.
        options: of the method, the dataclass that `linfusion.attention.get_method(method).options`
            is, or a mapping of its fields; what is not given is as the method says, or the weights.
            Recipes have them in a table [options], or beside the other arguments.
        weights: student weights to start from; None starts from the teacher's own.
        train_projections: also train to_q, to_k, to_v, to_out of each replaced layer.
        projection_rank: what each projection learns is kept a difference of this rank to the
            teacher's, and saved as that; None leaves it free.
        inherit: of "lit": what the student takes over, as `linfusion.inherit`.
        teacher_model_name_or_path: of "lit": a pipeline whose transformer teaches; None is the one
            that the student starts from.
        kd_variance_weight: of "lit": weight of the teacher's variance head; None is 0.
        log_variance: of "lit": compare log σ² instead of the raw head.
        train_data_dir: image folder; captions in metadata.jsonl, metadata.csv or a .txt beside. Of
            "mate": folder of clips, safetensors with "latents" [C, T, h, w] as the denoiser takes
            them, each with its caption in a .txt beside; `encode_clips` writes such.
        dataset_name, dataset_config_name: a `datasets` set (hub name or folder), its train split.
        image_column, caption_column: their names in metadata files and `datasets` sets.
        metadata_anywhere: metadata files may name pictures outside of their folder.
        train_shards_path_or_url: WebDataset .tar shards on this machine; glob and {000..009}.
        train_prompts: text file, one prompt a line: the teacher draws the pictures.
        num_teacher_images: pictures the teacher draws for `train_prompts` (default one a prompt).
        teacher_steps, teacher_guidance_scale: how it draws them.
        max_train_samples: use only the first so many examples.
        resolution: pixels of the (short) side.
        extra_resolutions: further sizes at which each picture is also seen.
        random_flip: also train on mirrored pictures.
        image_interpolation_mode: one of nearest, bilinear, bicubic, lanczos.
        use_aspect_ratio_buckets: crop to the nearest bucket instead of a square.
        aspect_ratio_buckets: "h,w;h,w" in pixels; None makes them from `resolution`.
        cache_dir: where latents and text states are kept; None is `output_dir`/cache.
        vae_encode_batch_size: pictures or captions encoded at a time.
        proportion_empty_prompts: share of examples whose caption is dropped, in [0, 1].
        kd_weight, feature_weight: weights of L_kd and L_feat.
        feature_layers: layers that L_feat compares, as `linfusion.linearize` selects them; none
            given takes all of a UNet, every fourth single block of FLUX. Of "mate" it compares the
            hidden states after the blocks they are in; none given takes every fourth.
        guidance_embedding: the guidance that a model with an embedding of it is told.
        output_dir: gets the student's weights, checkpoints, samples and logs.
        seed: of every random draw.
        train_batch_size: examples per process and micro-step.
        num_train_epochs: passes over the data when `max_train_steps` is None.
        max_train_steps: optimizer steps.
        gradient_accumulation_steps, gradient_checkpointing, mixed_precision, allow_tf32,
        learning_rate, scale_lr, lr_scheduler, lr_warmup_steps, adam_beta1, adam_beta2,
        adam_weight_decay, adam_epsilon, max_grad_norm: as in diffusers' scripts.
        optimizer: "adamw", or "muon" for the matrices inside blocks and AdamW for the rest.
        use_ema: keep a moving average of the learned part; it is then what is saved.
        ema_decay: its greatest decay.
        checkpointing_steps: optimizer steps between checkpoints; 0 writes none but the last.
        checkpoints_total_limit: keep only the newest so many.
        resume_from_checkpoint: "latest", or the path of a checkpoint-N folder.
        validation_prompts: prompts of the teacher | student grid.
        validation_steps: optimizer steps between grids; 0 draws none.
        report_to: None or "tensorboard" (extra `train`).
        logging_steps: optimizer steps between reports of the losses.
    """

    pretrained_model_name_or_path: str = "zoo:emoji"
    revision: str | None = None
    variant: str | None = None
    method: str = "linfusion"
    options: Any = None
    weights: str | None = None
    train_projections: bool = True
    projection_rank: Count | None = None
    inherit: str = "lit"
    teacher_model_name_or_path: str | None = None
    kd_variance_weight: Weight | None = None
    log_variance: bool = False

    train_data_dir: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    metadata_anywhere: bool = False
    train_shards_path_or_url: str | None = None
    train_prompts: str | None = None
    num_teacher_images: Count | None = None
    teacher_steps: Count = 50
    teacher_guidance_scale: float = 7.5
    max_train_samples: Count | None = None

    resolution: Count = 512
    extra_resolutions: tuple[Count, ...] = ()
    random_flip: bool = False
    image_interpolation_mode: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "lanczos"
    use_aspect_ratio_buckets: bool = False
    aspect_ratio_buckets: str | None = None
    cache_dir: str | None = None
    vae_encode_batch_size: Count = 32
    proportion_empty_prompts: Share = 0.1

    kd_weight: Weight = 0.5
    feature_weight: Weight = 0.5
    feature_layers: tuple[str, ...] = ()
    guidance_embedding: Weight = 3.5

    output_dir: str = "linfusion-distilled"
    seed: int = 0
    train_batch_size: Count = 16
    num_train_epochs: Count = 100
    max_train_steps: Count | None = None
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    allow_tf32: bool = False
    learning_rate: Weight = 1e-4
    scale_lr: bool = False
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: Steps = 500
    optimizer: Literal["adamw", "muon"] = "adamw"
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_weight_decay: Weight = 0.0
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    use_ema: bool = True
    ema_decay: Share = 0.9999

    checkpointing_steps: Steps = 500
    checkpoints_total_limit: Count | None = None
    resume_from_checkpoint: str | None = None
    validation_prompts: tuple[str, ...] = ()
    validation_steps: Steps = 0
    report_to: Literal["tensorboard"] | None = None
    logging_steps: Count = 50

    @classmethod
    def of(cls, **given: Any) -> TrainConfig:
        """The arguments with the options of the method beside them, as `radius=8`.

        Raises:
            ValueError: a name that is neither, or as for the arguments.
        """
        options = given.pop("options", None) or {}
        if not isinstance(options, Mapping):
            return cls(**given, options=options)
        known = {field.name for field in fields(cls)}
        method = given.get("method", cls.method)
        beside = {name: given.pop(name) for name in list(given) if name not in known}
        if not beside:
            return cls(**given, options=options)
        return cls(**given, options={**options, **_options_among(beside, method)})

    @classmethod
    def from_recipe(cls, recipe: str | Path, **changes: Any) -> TrainConfig:
        """The arguments of a published run, and what of them is to be otherwise.

        Args:
            recipe: one of `recipes()`, or a .toml file of arguments.
            **changes: arguments, and options of the method, that win over the recipe's; it never
                has a source of pictures.

        Raises:
            ValueError: no such recipe, an argument there is not, or as for the arguments.
        """
        published = read_recipe(recipe)
        for given in (published, changes):
            if isinstance(given.get("options"), Mapping):
                given |= given.pop("options")
        return cls.of(**{**published, **changes})

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        values = {name: getattr(self, name) for name in hints if name != "options"}
        for name, value in check_mapping(values, type(self)).items():
            setattr(self, name, value)
        self.options = _read_options(self.options, self.method)
        self._check_choices()
        self._check_source()
        self._check_clips()

    def _check_choices(self) -> None:
        from diffusers.optimization import SchedulerType

        schedules = [s.value for s in SchedulerType if s.value != "piecewise_constant"]
        if self.lr_scheduler not in schedules:
            raise ValueError(
                f"lr_scheduler: got {self.lr_scheduler!r}, accepted are {', '.join(schedules)}"
            )
        for name in _OF_LIT:
            if self.method != "lit" and getattr(self, name) is not None:
                raise ValueError(f"{name}: given, but only method 'lit' has it")
        if self.projection_rank is not None and (
            self.method == "lit" or not self.train_projections
        ):
            raise ValueError("projection_rank: given, but the student keeps whole projections")
        buckets = self.aspect_ratio_buckets
        if buckets is not None and not re.fullmatch(
            r"[1-9]\d*,[1-9]\d*(;[1-9]\d*,[1-9]\d*)*", buckets
        ):
            raise ValueError(f"aspect_ratio_buckets: got {buckets!r}, accepted is h,w;h,w;...")

    def _check_source(self) -> None:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' / '.join(SOURCES)}: exactly one is needed, got {', '.join(given) or 'none'}"
            )
        if self.aspect_ratio_buckets is not None and not self.use_aspect_ratio_buckets:
            raise ValueError("aspect_ratio_buckets: given, but use_aspect_ratio_buckets is off")
        if self.random_flip and self.train_prompts is not None:
            raise ValueError("random_flip: on, but what the teacher draws is not mirrored")
        if self.method == "mate":
            for name, accepted in (("train_data_dir", True), ("random_flip", False),
                                   ("validation_steps", False)):  # fmt: skip
                if bool(getattr(self, name)) != accepted:
                    raise ValueError(
                        f"{name}: {'missing' if accepted else 'given'}, but method 'mate' learns"
                        " from a folder of clips alone, and draws no grids"
                    )
        if self.validation_steps and not self.validation_prompts:
            raise ValueError("validation_prompts: none given, but validation_steps is on")

    def _check_clips(self) -> None:
        """Of "lingen": what it needs, and what it has no use for; then how long it runs."""
        if self.method != LINGEN:
            return
        if self.train_data_dir is None:
            raise ValueError("train_data_dir: missing, but 'lingen' learns from a folder alone")
        for name in ("validation_steps", "random_flip", "use_aspect_ratio_buckets"):
            if getattr(self, name):
                raise ValueError(f"{name}: given, but method 'lingen' does not do that")
        if self.extra_resolutions:
            raise ValueError("extra_resolutions: given, but sizes are in clip_schedule")
        if self.max_train_steps is None:
            self.max_train_steps = sum(stage.steps for stage in self.options.stages)

    @property
    def method_options(self) -> dict[str, Any]:
        """Options of `linfusion.linearize`: those that are not as the method says."""
        default = type(self.options)()
        found = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        return {name: v for name, v in found.items() if v != getattr(default, name)}

    @property
    def cache_path(self) -> Path:
        """Folder of the cached latents and text states."""
        return Path(self.cache_dir) if self.cache_dir else Path(self.output_dir) / "cache"


def recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.stem for file in _RECIPES.glob("*.toml"))


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The arguments in a recipe, by name.

    Raises:
        ValueError: no such recipe, no TOML, or an argument there is not.
    """
    file = Path(recipe) if str(recipe).endswith(".toml") else _RECIPES / f"{recipe}.toml"
    if not file.is_file():
        raise ValueError(f"recipe: {str(recipe)!r} is no .toml file and none of {recipes()}")
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe: {file} is no TOML ({error})") from error
    return found


def options_type(method: str) -> type:
    """The dataclass of the options of a method of the trainer.

    Raises:
        ValueError: there is no such method.
    """
    from linfusion.attention import get_method, names

    if method == LINGEN:
        return ClipOptions
    if method not in names():
        raise ValueError(f"method: got {method!r}, accepted are {', '.join([*names(), LINGEN])}")
    return get_method(method).options


def _read_options(given: Any, method: str) -> Any:
    """Options as the dataclass of their method."""
    from linfusion.attention import get_method

    kind = options_type(method)
    if isinstance(given, kind):
        check_mapping({f.name: getattr(given, f.name) for f in fields(kind)}, kind)
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(
            f"options: got {given!r}, accepted are a mapping and {kind.__qualname__} for method"
            f" {method!r}"
        )
    nullable = () if method == LINGEN else get_method(method).nullable
    known = _options_among(dict(given or {}), method)
    known = {name: v for name, v in known.items() if v is not None or name in nullable}
    return kind(**check_mapping(known, kind))


def _options_among(given: dict[str, Any], method: str) -> dict[str, Any]:
    """What was given, if all of it are options of the method."""
    from linfusion.attention import names

    own = hints_of(options_type(method))
    for name in given:
        if name in own:
            continue
        others = [m for m in [*names(), LINGEN] if name in hints_of(options_type(m))]
        if others and given[name] is not None:
            raise ValueError(f"{name}: given, but only method {others[0]!r} has it")
        if not others:
            raise ValueError(
                f"{name}: no argument of TrainConfig and no option of method {method!r}, which has"
                f" {', '.join(own)}"
            )
    return {name: value for name, value in given.items() if name in own}
