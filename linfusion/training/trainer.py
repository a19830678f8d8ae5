"""Distil the linear student of a pipeline from its softmax teacher.

After Liu et al. 2024 (LinFusion), and for FLUX and Stable Diffusion 3 Liu et al. 2024 (CLEAR); for
video transformers with the hidden states of LinMU (Wang 2026). A LinGen transformer is trained
without a teacher.

Everything random in a step is drawn from a generator seeded by (seed, process, number of the
micro-step), and the order of the data is a function of the seed: a run that was killed continues
from its last checkpoint to the same weights, bit for bit on CPU.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from linfusion import zoo
from linfusion.files.sheets import side_by_side
from linfusion.files.whole_files import Lock, writable_folder, write_json, writing
from linfusion.pipelines.load import load
from linfusion.training.checkpoints import (
    checkpoint_to_resume,
    remove_leftovers,
    save_checkpoint,
    save_only_what_is_learned,
    step_of,
    warn_of_changes,
)
from linfusion.training.config import TrainConfig
from linfusion.training.data.cache import TrainingSet
from linfusion.training.data.clips import ClipSet
from linfusion.training.data.films import FilmSet
from linfusion.training.data.pictures import digest
from linfusion.training.objectives.distillation import Distillation
from linfusion.training.optimizers import build_optimizer
from linfusion.training.roles import (
    FROZEN_DTYPES,
    Pair,
    check_student,
    load_examples,
    pair_of,
    teacher_of,
)
from linfusion.training.teachers.base import Teacher
from linfusion.training.teachers.lingen import LinGenHost
from linfusion.training.teachers.video import VideoTeacher

CONSTRAINED_EVERY = 20  # steps


def distill(config: TrainConfig, *, pipeline: DiffusionPipeline | None = None) -> Path:
    """Train a linear student and save it.

    Args:
        config: what to do; see `TrainConfig`.
        pipeline: the teacher, if it is in memory already; otherwise it is loaded from
            `config.pretrained_model_name_or_path`. Its denoiser is given back as it came.

    Returns:
        `config.output_dir`, which holds the student's weights (of the moving average, if there is
        one) as `linfusion.linearize(pipe, weights=...)` takes them.

    Raises:
        ValueError: an argument that cannot be; nothing has been changed or written then.
        ImportError: an optional part that is missing; the message names the extra.
    """
    if config.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise ImportError('report_to needs tensorboard: pip install "linfusion[train]"')
    resume = checkpoint_to_resume(config)
    examples = load_examples(config)
    pipe = pipeline
    if pipe is None:
        where = {"revision": config.revision, "variant": config.variant}
        pipe = load(zoo.resolve(config.pretrained_model_name_or_path), **where)
        # The frozen weights of our own copy need no fp32; the VAE does, SDXL's overflows in fp16.
        for name in ("unet", "transformer"):
            if getattr(pipe, name, None) is not None and config.method != "lingen":
                getattr(pipe, name).to(FROZEN_DTYPES[config.mixed_precision])
    teacher = teacher_of(pipe, config)
    check_student(config, teacher, examples)

    out = writable_folder("output_dir", config.output_dir)
    writable_folder("cache_dir", config.cache_path)
    with _accelerator(config, out) as accelerator, ExitStack() as stack:
        set_seed(config.seed)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        if accelerator.is_main_process:
            stack.enter_context(Lock(out, "output_dir"))
            remove_leftovers(out)
            write_json(out / "train_config.json", dataclasses.asdict(config))

        pipe.to(accelerator.device)
        kind: Any = TrainingSet
        if isinstance(teacher, VideoTeacher):
            kind = ClipSet
        elif isinstance(teacher, LinGenHost):
            kind = FilmSet
        data = kind(config, teacher, examples, processes=accelerator.num_processes)
        if not config.validation_steps:  # nothing is encoded or decoded from here on
            for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
                if getattr(pipe, name, None) is not None and accelerator.device.type != "cpu":
                    getattr(pipe, name).to("cpu")

        pair = pair_of(config, teacher)
        checkpointing = teacher.model.is_gradient_checkpointing
        try:
            if config.gradient_checkpointing:
                teacher.model.enable_gradient_checkpointing()
            _train(config, accelerator, teacher, pair, data, resume)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                pair.save(out)
        finally:
            if config.gradient_checkpointing and not checkpointing:
                teacher.model.disable_gradient_checkpointing()
            teacher.model = accelerator.unwrap_model(teacher.model, keep_fp32_wrapper=False)
            pair.close()
    return out


@contextmanager
def _accelerator(config: TrainConfig, out: Path) -> Iterator[Accelerator]:
    """One for this run; the next run of the process may want another precision."""
    first = not AcceleratorState._shared_state
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "logs")),
    )
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        accelerator.free_memory()
        if first:
            AcceleratorState._reset_state()


def _train(
    config: TrainConfig,
    accelerator: Accelerator,
    teacher: Teacher,
    pair: Pair,
    data: TrainingSet | FilmSet,
    resume: Path | None,
) -> None:
    names, parameters = zip(*pair.trained().items(), strict=True)
    accumulation = config.gradient_accumulation_steps
    steps = config.max_train_steps
    if steps is None:
        steps = -(-config.num_train_epochs * data.batches_per_epoch // accumulation)
    lr = config.learning_rate
    if config.scale_lr:
        lr *= accumulation * config.train_batch_size * accelerator.num_processes
    optimizer = build_optimizer(
        config.optimizer,
        pair.model,
        lr=lr,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    # An accelerated schedule is stepped once a process: it counts in steps × processes.
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=steps * accelerator.num_processes,
    )
    student, optimizer, schedule = accelerator.prepare(pair.model, optimizer, schedule)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=True) if config.use_ema else None
    save_only_what_is_learned(accelerator, names, parameters, ema)
    if config.report_to is not None:
        accelerator.init_trackers("linfusion", config=_flat(config))

    done = 0
    if resume is not None:
        warn_of_changes(resume, config)
        accelerator.load_state(str(resume))
        done = step_of(resume)
    totals: dict[str, Tensor] = {}
    summed = 0
    bar = tqdm(total=steps, initial=done, desc="distil", disable=not accelerator.is_main_process)
    for step in range(done, steps):
        for micro in range(step * accumulation, (step + 1) * accumulation):
            with accelerator.accumulate(student):
                losses = _losses(config, accelerator, teacher, pair, student, data, micro)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach()
            summed += 1
        now = step + 1
        if isinstance(pair, Distillation) and (now % CONSTRAINED_EVERY == 0 or now == steps):
            pair.constrain()
        if ema is not None:
            ema.step(parameters)
        bar.update()

        if now % config.logging_steps == 0 or now == steps:
            means = {name: (value / summed).item() for name, value in totals.items()}
            totals.clear()
            summed = 0
            bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
            accelerator.log(means | {"lr": schedule.get_last_lr()[0]}, step=now)
        if now == steps or (config.checkpointing_steps and now % config.checkpointing_steps == 0):
            save_checkpoint(config, accelerator, now)
        if config.validation_steps and now % config.validation_steps == 0:
            if accelerator.is_main_process:
                with _averaged(ema, parameters):
                    _save_grid(config, teacher, pair, now)
            accelerator.wait_for_everyone()
    bar.close()
    if ema is not None:
        ema.copy_to(parameters)


def _losses(
    config: TrainConfig,
    accelerator: Accelerator,
    teacher: Teacher,
    pair: Pair,
    student: torch.nn.Module,
    data: TrainingSet | FilmSet,
    micro: int,
) -> dict[str, Tensor]:
    """The losses of micro-step number `micro`, which depend on its number and the weights alone."""
    draws = digest(f"{config.seed}/{accelerator.process_index}/{micro}")
    generator = torch.Generator().manual_seed(int(draws[:8], 16))
    batch = data.batch(micro, accelerator.process_index, generator)
    inputs, target = teacher.example(batch, generator)
    device, dtype = accelerator.device, next(pair.model.parameters()).dtype
    with accelerator.autocast():
        losses = pair.losses(student, _moved(inputs, device, dtype), target.to(device))
    weighted = [pair.weights[name] * value for name, value in losses.items()]
    return {"loss": torch.stack(weighted).sum()} | losses


def _moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a denoiser where it runs; what counts or points keeps its own dtype."""
    moved: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            moved[name] = _moved(value, device, dtype)
        elif value is None:
            moved[name] = None
        elif isinstance(value, tuple):  # a rotary table keeps its precision
            moved[name] = tuple(x.to(device) for x in value)
        elif isinstance(value, list):
            moved[name] = list(
                _moved({f"{name}_{i}": x for i, x in enumerate(value)}, device, dtype).values()
            )
        else:
            exact = name.endswith(("_ids", "timestep")) or not value.is_floating_point()
            moved[name] = value.to(device, None if exact else dtype)
    return moved


@contextmanager
def _averaged(ema: EMAModel | None, parameters: tuple[torch.nn.Parameter, ...]) -> Iterator[None]:
    """Inside, the student has its averaged weights."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _save_grid(config: TrainConfig, teacher: Teacher, pair: Pair, step: int) -> None:
    """One row a prompt: teacher | student, from the same noise."""
    with pair.teacher():
        left = teacher.pictures(config)
    folder = Path(config.output_dir) / "samples"
    folder.mkdir(exist_ok=True)
    sheet = side_by_side(left, teacher.pictures(config))
    with writing(folder / f"step-{step:07d}.png") as file:
        sheet.save(file, "PNG")


def _flat(config: TrainConfig) -> dict[str, Any]:
    """What a tracker can store: tuples as text."""
    fields = dataclasses.asdict(config)
    return {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in fields.items()}
