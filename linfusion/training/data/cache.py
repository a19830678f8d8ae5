"""Latents and text states, computed once and kept on disk in safetensors.

A cache is a folder named by a hash of all that its content depends on (`rows` fills it).
"""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import (
    find_nearest_bucket,
    generate_aspect_ratio_buckets,
    parse_buckets_string,
)
from PIL import ImageOps
from torch import Tensor, nn

from linfusion.pipelines.arguments import text_length
from linfusion.training.config import TrainConfig
from linfusion.training.data.pictures import Example, digest, fit, read_prompts
from linfusion.training.data.rows import Rows, cached_rows
from linfusion.training.teachers.base import Teacher

Size = tuple[int, int]


class Item(NamedTuple):
    """One example at one size; `flip` mirrors it."""

    example: int
    flip: bool
    height: int
    width: int


def module_digest(*modules: nn.Module) -> str:
    """Hash of the weights and configurations of some modules."""
    parts = []
    for module in modules:
        given: Any = module.config
        config = given if isinstance(given, dict) else given.to_dict()
        # Where the files lie and who wrote them is no part of what the module computes.
        kept = {k: v for k, v in config.items() if k[0] != "_" and k != "transformers_version"}
        parts.append(f"{type(module).__name__} {kept}")
        for name, tensor in module.state_dict().items():
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            parts.append(name + digest(raw.tobytes()))
    return digest("|".join(parts))


def plan_sizes(config: TrainConfig, multiple: int) -> list[list[Size]]:
    """The buckets of each resolution; a picture is seen once in one bucket of each.

    Args:
        config: resolution, extra_resolutions and the bucket arguments.
        multiple: what every side must be a multiple of.

    Raises:
        ValueError: a side that is not.
    """
    if config.use_aspect_ratio_buckets and config.aspect_ratio_buckets is not None:
        levels = [parse_buckets_string(config.aspect_ratio_buckets)]
    elif config.use_aspect_ratio_buckets:
        levels = [generate_aspect_ratio_buckets(config.resolution, divisibility=multiple)]
    else:
        levels = [[(config.resolution, config.resolution)]]
    for resolution in config.extra_resolutions:
        if config.use_aspect_ratio_buckets:
            levels.append(generate_aspect_ratio_buckets(resolution, divisibility=multiple))
        else:
            levels.append([(resolution, resolution)])
    for height, width in (size for level in levels for size in level):
        if height % multiple or width % multiple:
            raise ValueError(
                f"resolution: got {height}x{width}, accepted are multiples of {multiple} here"
            )
    return levels


def plan_items(
    config: TrainConfig, examples: Sequence[Example], levels: list[list[Size]]
) -> list[Item]:
    """Every example at every resolution, mirrored as well if `random_flip`."""
    items = []
    for i, example in enumerate(examples):
        for level in levels:
            h, w = level[0]
            if len(level) > 1:
                width, height = example.size()
                h, w = level[find_nearest_bucket(height, width, level)]
            items += [
                Item(i, flip, h, w) for flip in ((False, True) if config.random_flip else (False,))
            ]
    return items


def picture_latents(
    config: TrainConfig,
    pipe: DiffusionPipeline,
    examples: Sequence[Example],
    by_size: dict[Size, list[Item]],
) -> dict[Size, Rows]:
    """Scaled latent mean and deviation of each picture: {"mean", "std"} [C, h, w] in fp16.

    For a model with size conditioning also "time_ids" [6] (SDXL).
    """
    vae, key = pipe.vae, module_digest(pipe.vae)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor

    def encode(items: Sequence[Item]) -> dict[str, Tensor]:
        pixels, time_ids = [], []
        for item in items:
            image = examples[item.example].open()
            original = image.height, image.width
            image = fit(image, item.height, item.width, config.image_interpolation_mode)
            image = ImageOps.mirror(image) if item.flip else image
            pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
            time_ids.append([*original, 0, 0, item.height, item.width])
        with torch.no_grad():
            batch = torch.stack(pixels).to(vae.device, vae.dtype)
            posterior = vae.encode(batch).latent_dist
        rows = {"mean": (posterior.mean - shift) * scale, "std": posterior.std * scale}
        return {k: v.half().cpu() for k, v in rows.items()} | {
            "time_ids": torch.tensor(time_ids, dtype=torch.float32)
        }

    found = {}
    for size, items in by_size.items():
        content = [(examples[i.example].digest, i.flip) for i in items]
        name = digest(f"{key}|{config.image_interpolation_mode}|{size}|{content}")
        found[size] = cached_rows(
            config.cache_path / f"latents-{name}",
            len(items),
            partial(lambda items, rows: encode([items[r] for r in rows]), items),
            batch_size=config.vae_encode_batch_size,
            description=f"latents {size[0]}x{size[1]}",
        )
    return found


def teacher_latents(
    config: TrainConfig,
    teacher: Teacher,
    prompts: Sequence[str],
    by_size: dict[Size, list[Item]],
) -> dict[Size, Rows]:
    """Latents of pictures that the teacher draws: {"mean", "time_ids"}; picture i from seed + i."""
    pipe = teacher.pipe
    modules = [
        m for m in pipe.components.values() if isinstance(m, nn.Module) and m is not pipe.vae
    ]
    key = module_digest(*modules)

    def draw(items: Sequence[Item], size: Size) -> dict[str, Tensor]:
        generators = [torch.Generator().manual_seed(config.seed + i.example) for i in items]
        latents = teacher.latents([prompts[i.example] for i in items], size, config, generators)
        ids = torch.tensor([[*size, 0, 0, *size]] * len(items), dtype=torch.float32)
        return {"mean": latents.half().cpu(), "time_ids": ids}

    found = {}
    for size, items in by_size.items():
        content = [(prompts[i.example], config.seed + i.example) for i in items]
        name = digest(
            f"{key}|{pipe.scheduler.config}|{config.teacher_steps}|"
            f"{config.teacher_guidance_scale}|{size}|{content}"
        )
        found[size] = cached_rows(
            config.cache_path / f"drawn-{name}",
            len(items),
            partial(lambda items, size, rows: draw([items[r] for r in rows], size), items, size),
            batch_size=config.vae_encode_batch_size,
            description=f"teacher draws {size[0]}x{size[1]}",
        )
    return found


def text_states(
    config: TrainConfig, teacher: Teacher, captions: Sequence[str]
) -> tuple[Rows, dict[str, int]]:
    """Text states of each distinct caption and of the empty one, and the row of each.

    Rows are what `Teacher.text_states` gives, in the encoder's dtype.
    """
    distinct = sorted({"", *captions})
    parts = {
        kind: [getattr(teacher.pipe, kind + end, None) for end in ("", "_2", "_3")]
        for kind in ("tokenizer", "text_encoder")
    }
    ids = [t(distinct, truncation=True).input_ids for t in parts["tokenizer"] if t is not None]
    key = module_digest(*(e for e in parts["text_encoder"] if e is not None))

    def encode(rows: range) -> dict[str, Tensor]:
        with torch.no_grad():
            states = teacher.text_states([distinct[r] for r in rows])
        return {name: t.cpu() for name, t in states.items()}

    content = f"{key}|{ids}|{distinct}|{text_length(teacher.pipe)}"
    rows = cached_rows(
        config.cache_path / f"text-{digest(content)}",
        len(distinct),
        encode,
        batch_size=config.vae_encode_batch_size,
        description="text states",
    )
    return rows, {caption: i for i, caption in enumerate(distinct)}


class TrainingSet:
    """Cached latents with their text states, in batches of one size whose order is a function.

    Batch number n of a run depends on (seed, n) alone: a run that resumes needs no reader's state.

    Args:
        config: source, sizes, seed, batch size.
        teacher: before it has a student; it encodes what the cache lacks.
        processes: how many processes share a batch number.
    """

    def __init__(
        self,
        config: TrainConfig,
        teacher: Teacher,
        examples: Sequence[Example] | None,
        *,
        processes: int = 1,
    ) -> None:
        levels = plan_sizes(config, teacher.multiple)
        if examples is None:
            assert config.train_prompts is not None  # the only source without examples
            prompts = read_prompts(config.train_prompts)
            count = config.num_teacher_images or len(prompts)
            captions = [prompts[i % len(prompts)] for i in range(count)][: config.max_train_samples]
            items = [
                Item(i, False, *level[i % len(level)])
                for i in range(len(captions))
                for level in levels
            ]
        else:
            examples = examples[: config.max_train_samples]
            captions = [example.caption for example in examples]
            items = plan_items(config, examples, levels)
        by_size: dict[Size, list[Item]] = {}
        for item in items:
            by_size.setdefault((item.height, item.width), []).append(item)

        if examples is None:
            self._latents = teacher_latents(config, teacher, captions, by_size)
        else:
            self._latents = picture_latents(config, teacher.pipe, examples, by_size)
        rows = {size: [item.example for item in items] for size, items in by_size.items()}
        self._index(config, teacher, captions, rows, processes)

    def _index(
        self,
        config: TrainConfig,
        teacher: Teacher,
        captions: Sequence[str],
        rows: dict[Size, list[int]],
        processes: int,
    ) -> None:
        """Text states of every row of every size, by the number of its caption, and the order."""
        self._text, row = text_states(config, teacher, captions)
        self._text_row = {size: [row[captions[i]] for i in rows[size]] for size in rows}
        self._empty = row[""]
        self._dropout = config.proportion_empty_prompts
        self._seed = config.seed
        self._batch_size, self._processes = config.train_batch_size, processes
        self._epoch: tuple[int, list[tuple[Size, list[int]]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each process sees in one pass."""
        whole = self._batch_size * self._processes
        return sum(-(-len(rows) // whole) for rows in self._text_row.values())

    def batch(self, number: int, process: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Latents [B, C, h, w], text "states" [B, L, D], and "pooled", "time_ids" where there are.

        Args:
            number: of the batch, counted from the start of the run.
            process: rank, which picks a share of the batch.
            generator: draws the latents from their posterior and drops captions.
        """
        epoch, position = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._order(epoch)
        size, rows = self._epoch[1][position]
        rows = rows[process * self._batch_size : (process + 1) * self._batch_size]
        latents = self.latents(size, rows, generator)
        dropped = (torch.rand(len(rows), generator=generator) < self._dropout).tolist()
        text = [
            self._empty if drop else self._text_row[size][r]
            for r, drop in zip(rows, dropped, strict=True)
        ]
        return latents | self._text[text]

    def latents(
        self, size: Size, rows: Sequence[int], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """ "latents" [B, C, h, w] of some rows of one size, and what else goes with them."""
        found = self._latents[size][rows]
        mean = found["mean"].float()
        if "std" in found:
            mean = mean + found["std"].float() * torch.randn(mean.shape, generator=generator)
        return {"latents": mean, "time_ids": found["time_ids"]}

    def _order(self, epoch: int) -> list[tuple[Size, list[int]]]:
        order = random.Random(f"{self._seed}/{epoch}")
        whole = self._batch_size * self._processes
        batches = []
        for size, rows in sorted(self._text_row.items()):
            shuffled = order.sample(range(len(rows)), len(rows))
            # The last batch is filled from the start of the pass: every batch has the same shape.
            shuffled = [shuffled[i % len(rows)] for i in range(-(-len(rows) // whole) * whole)]
            batches += [(size, shuffled[i : i + whole]) for i in range(0, len(shuffled), whole)]
        order.shuffle(batches)
        return batches
