"""The arguments of a distillation run, named as in diffusers' train_text_to_image.py."""

from __future__ import annotations

import re
import tempfile
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SOURCES = ("train_data_dir", "dataset_name", "train_shards_path_or_url", "train_prompts")
# Arguments that one method alone has.
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "linfusion": ("projection_mid_dim",),
    "clear": ("radius", "down_factor"),
    "hybrid": ("window", "cell", "maps", "features"),
    "lit": ("heads", "conv"),
    "mate": ("window", "branch_mix"),
    "lingen": ("clip_schedule", "clip_stride", "proportion_stills"),
}
_RECIPES = Path(__file__).parent / "recipes"
_OF_LIT = (*METHOD_OPTIONS["lit"], "teacher_model_name_or_path", "kd_variance_weight")
OPTIMIZERS = ("adamw", "muon")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


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
        weights: student weights to start from; None starts from the teacher's own.
        train_projections: also train to_q, to_k, to_v, to_out of each replaced layer.
        projection_rank: what each projection learns is kept a difference of this rank to the
            teacher's, and saved as that; None leaves it free.
        projection_mid_dim: of "linfusion": hidden width of the feature maps; None is the layer's
            own width.
        radius: of "clear": tokens nearer than this see one another; None is 8.
        down_factor: of "clear": above 1 adds the whole picture, averaged over so many tokens a
            side.
        cell: of "hybrid": side of the cells of tokens that it sums up; None is 4.
        maps: of "hybrid": whether cells have learned maps; None is True.
        features: of "hybrid": feature map of a linear state; None is no state.
        heads: of "lit": heads of its linear attention; None is 2.
        conv: of "lit": its convolution; None is "value_shared".
        window: of "mate": frames, height and width of its windows in tokens, as "8,4,4"; None is
            that. Of "hybrid": tokens nearer than this see one another; None is 8.
        branch_mix: of "mate": how its branches are put together; None is "gated".
        inherit: of "lit": what the student takes over, as `linfusion.lit.inherit`.
        teacher_model_name_or_path: of "lit": a pipeline whose transformer teaches; None is the one
            that the student starts from.
        kd_variance_weight: of "lit": weight of the teacher's variance head; None is 0.
        log_variance: of "lit": compare log σ² instead of the raw head.
        clip_schedule: of "lingen": "steps,frames,size;..." one after the other; `max_train_steps`
            is their sum unless given, and the last one goes on.
        clip_stride: of "lingen": every so many frames of a file are one of a clip; None is 1.
        proportion_stills: of "lingen": share of batches that are single frames, of the pictures in
            the folder or, where there are none, of the clips; None is 0.25.
        train_data_dir: image folder; captions in metadata.jsonl, metadata.csv or a .txt beside. Of
            "mate": folder of clips, safetensors with "latents" [C, T, h, w] as the denoiser takes
            them, each with its caption in a .txt beside; `encode_clips` writes such.
        dataset_name, dataset_config_name: a `datasets` set (hub name or folder), its train split.
        image_column, caption_column: their names in metadata files and `datasets` sets.
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
    weights: str | None = None
    train_projections: bool = True
    projection_rank: int | None = None
    projection_mid_dim: int | None = None
    radius: float | None = None
    down_factor: int | None = None
    cell: int | None = None
    maps: bool | None = None
    features: str | None = None
    heads: int | None = None
    conv: str | None = None
    window: str | None = None
    branch_mix: str | None = None
    inherit: str = "lit"
    teacher_model_name_or_path: str | None = None
    kd_variance_weight: float | None = None
    log_variance: bool = False
    clip_schedule: str | None = None
    clip_stride: int | None = None
    proportion_stills: float | None = None

    train_data_dir: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    train_shards_path_or_url: str | None = None
    train_prompts: str | None = None
    num_teacher_images: int | None = None
    teacher_steps: int = 50
    teacher_guidance_scale: float = 7.5
    max_train_samples: int | None = None

    resolution: int = 512
    extra_resolutions: tuple[int, ...] = ()
    random_flip: bool = False
    image_interpolation_mode: str = "lanczos"
    use_aspect_ratio_buckets: bool = False
    aspect_ratio_buckets: str | None = None
    cache_dir: str | None = None
    vae_encode_batch_size: int = 32
    proportion_empty_prompts: float = 0.1

    kd_weight: float = 0.5
    feature_weight: float = 0.5
    feature_layers: tuple[str, ...] = ()
    guidance_embedding: float = 3.5

    output_dir: str = "linfusion-distilled"
    seed: int = 0
    train_batch_size: int = 16
    num_train_epochs: int = 100
    max_train_steps: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    allow_tf32: bool = False
    learning_rate: float = 1e-4
    scale_lr: bool = False
    lr_scheduler: str = "constant_with_warmup"
    lr_warmup_steps: int = 500
    optimizer: str = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    use_ema: bool = True
    ema_decay: float = 0.9999

    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 0
    report_to: str | None = None
    logging_steps: int = 50

    @classmethod
    def from_recipe(cls, recipe: str | Path, **changes: Any) -> TrainConfig:
        """The arguments of a published run, and what of them is to be otherwise.

        Args:
            recipe: one of `recipes()`, or a .toml file of arguments.
            **changes: arguments that win over the recipe's; it never has a source of pictures.

        Raises:
            ValueError: no such recipe, an argument there is not, or as for the arguments.
        """
        return cls(**{**read_recipe(recipe), **changes})

    def __post_init__(self) -> None:
        self.extra_resolutions = tuple(self.extra_resolutions)
        self.validation_prompts = tuple(self.validation_prompts)
        self.feature_layers = tuple(self.feature_layers)
        self._check_choices()
        self._check_numbers()
        self._check_source()
        self._check_clips()

    def _check_choices(self) -> None:
        import torch
        from diffusers.optimization import SchedulerType

        schedules = [s.value for s in SchedulerType if s.value != "piecewise_constant"]
        for name, accepted in (
            ("method", tuple(METHOD_OPTIONS)),
            ("mixed_precision", ("no", "fp16", "bf16")),
            ("image_interpolation_mode", INTERPOLATIONS),
            ("lr_scheduler", schedules),
            ("optimizer", OPTIMIZERS),
            ("report_to", (None, "tensorboard")),
        ):
            if (given := getattr(self, name)) not in accepted:
                raise ValueError(
                    f"{name}: got {given!r}, accepted are {', '.join(map(str, accepted))}"
                )
        owners: dict[str, list[str]] = {}
        for method, names in {**METHOD_OPTIONS, "lit": _OF_LIT}.items():
            for name in names:
                owners.setdefault(name, []).append(method)
        for name, methods in owners.items():
            if self.method not in methods and getattr(self, name) is not None:
                which = " and ".join(map(repr, methods))
                raise ValueError(f"{name}: given, but only method {which} has it")
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer: 'muon' needs torch 2.9 or newer, got {torch.__version__}")
        if self.projection_rank is not None and (
            self.method == "lit" or not self.train_projections
        ):
            raise ValueError("projection_rank: given, but the student keeps whole projections")
        mate = self.method == "mate"
        form = r"\d+,\d+,\d+" if mate else r"\d+(\.\d+)?"
        if self.window is not None and re.fullmatch(form, self.window) is None:
            what = "frames, height and width as 8,4,4" if mate else "a number of tokens, as 8"
            raise ValueError(f"window: got {self.window!r}, accepted are {what}")

    def _check_numbers(self) -> None:
        at_least = dict.fromkeys(
            ("resolution", "train_batch_size", "num_train_epochs", "gradient_accumulation_steps",
             "vae_encode_batch_size", "teacher_steps", "logging_steps", "max_train_steps",
             "max_train_samples", "num_teacher_images", "checkpoints_total_limit", "clip_stride",
             "projection_rank"),
            1,
        ) | dict.fromkeys(
            ("lr_warmup_steps", "checkpointing_steps", "validation_steps", "kd_weight",
             "feature_weight", "kd_variance_weight", "guidance_embedding", "adam_weight_decay",
             "learning_rate"),
            0,
        )  # fmt: skip
        for name, least in at_least.items():
            given = getattr(self, name)
            if given is not None and not given >= least:  # `not >=` also refuses nan
                raise ValueError(f"{name}: got {given}, accepted is {least} or more")
        for given in self.extra_resolutions:
            if given < 1:
                raise ValueError(f"extra_resolutions: got {given}, accepted is 1 or more")
        for name in ("proportion_empty_prompts", "ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= (given := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: got {given}, accepted is 0 to 1")
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: got {self.max_grad_norm}, accepted is more than 0")

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
        if self.method != "lingen":
            return
        schedule = self.clip_schedule or ""
        if (
            re.fullmatch(r"([1-9]\d*,[1-9]\d*,[1-9]\d*;)*[1-9]\d*,[1-9]\d*,[1-9]\d*", schedule)
            is None
        ):
            raise ValueError(
                f"clip_schedule: got {self.clip_schedule!r}, accepted is steps,frames,size;..."
            )
        if not 0 <= (self.proportion_stills or 0) <= 1:
            raise ValueError(f"proportion_stills: got {self.proportion_stills}, accepted is 0 to 1")
        if self.train_data_dir is None:
            raise ValueError("train_data_dir: missing, but 'lingen' learns from a folder alone")
        for name in ("validation_steps", "random_flip", "use_aspect_ratio_buckets"):
            if getattr(self, name):
                raise ValueError(f"{name}: given, but method 'lingen' does not do that")
        if self.extra_resolutions:
            raise ValueError("extra_resolutions: given, but sizes are in clip_schedule")
        if self.max_train_steps is None:
            stages = schedule.split(";")
            self.max_train_steps = sum(int(stage.split(",")[0]) for stage in stages)

    @property
    def method_options(self) -> dict[str, Any]:
        """Options of `linfusion.linearize`, but for those that the weights to start from say."""
        names = () if self.weights is not None else METHOD_OPTIONS[self.method]
        options = {name: getattr(self, name) for name in names}
        if self.method == "hybrid" and options:
            options["maps"] = self.maps is not False
            options["window"] = None if self.window is None else float(self.window)
        elif options.get("window") is not None:
            options["window"] = tuple(int(n) for n in options["window"].split(","))
        return options

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
    known = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(set(found) - known):
        raise ValueError(f"recipe: {file} has {unknown[0]}, which is no argument of TrainConfig")
    return found


def writable_folder(argument: str, folder: str | Path) -> Path:
    """The folder, made if missing; a file can be written there.

    Raises:
        ValueError: it cannot; the message blames `argument`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{argument}: cannot write to {folder} ({error.strerror})") from error
    return folder
