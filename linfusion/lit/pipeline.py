"""Sampling from class-conditional DiT, softmax or linear, with the variance it has learned."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, ImagePipelineOutput
from diffusers import DiTPipeline as StockDiTPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from linfusion.lit.authors_checkpoints import TIMESTEPS, use_official_timesteps

_LEARNED = ("learned", "learned_range")
_OUTPUTS = ("pil", "np", "pt", "latent")
_TENSORS = ("latents",)


class DiTPipeline(StockDiTPipeline):
    """diffusers' `DiTPipeline` that keeps the variance half of the model's output.

    With `DDPMScheduler(variance_type="learned_range")` it samples as DiT's authors do, for their
    figures in 250 steps with `timestep_spacing="linspace"`. Every other scheduler gets the noise
    alone. The parts, and folders that `save_pretrained` writes, are those of diffusers' pipeline;
    `DiTPipeline.from_pipe(pipe)` takes one over.

    The class without a picture of its own is the last row of the model's table, so that models of
    any number of classes are guided.
    """

    def __init__(
        self,
        transformer: DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_to_config(id2label=id2label)
        if getattr(transformer, "config", {}).get(TIMESTEPS) == "official":
            use_official_timesteps(transformer)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """A pipeline of the same parts, as diffusers', and of the same names of classes.

        Args:
            pipeline: diffusers' `DiTPipeline`, or one of ours.
            **kwargs: as diffusers' `from_pipe`: parts to replace.
        """
        names: dict[int, list[str]] = {}
        for name, number in getattr(pipeline, "labels", {}).items():
            names.setdefault(number, []).append(name)
        if names and "id2label" not in kwargs:
            kwargs["id2label"] = {i: ", ".join(same) for i, same in names.items()}
        return super().from_pipe(pipeline, **kwargs)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        cfg_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = _TENSORS,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures of classes.

        Args:
            class_labels: a class or several, each by its number or its name.
            height, width: in pixels; DiT can only make squares. Its sample size by default.
            num_inference_steps: of the scheduler.
            guidance_scale: s in ε∅ + s (ε - ε∅); 1 is none.
            cfg_channels: of the noise that are guided: all, or 3 as the authors' code does, which
                leaves the fourth channel of the latents to the class alone.
            generator: for the first noise and that of the steps; one, or one a picture.
            latents: [B, C, h, w] to start from, of unit variance.
            output_type: "pil", "np" [B, H, W, 3], "pt" [B, 3, H, W], or "latent".
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.
            callback_on_step_end: called as (pipeline, i, t, tensors) after each step.
            callback_on_step_end_tensor_inputs: which tensors it gets; there is "latents".

        Raises:
            ValueError: a class there is not, or another argument that is out of range.
        """
        ids = self._class_ids(class_labels)
        config = self.transformer.config
        channels, null = config.in_channels, config.num_embeds_ada_norm
        size = self._latent_size(height, width)
        self._check(num_inference_steps, guidance_scale, cfg_channels, output_type, generator, ids)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(_TENSORS))
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: got {unknown[0]!r}, expected of {_TENSORS}"
            )
        shape = (len(ids), channels, *size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents: got {tuple(latents.shape)}, expected {shape}")
        scheduler, with_variance = self._scheduler_for_model()

        device, dtype = self._execution_device, self.transformer.dtype
        guided = guidance_scale > 1
        scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = latents.to(device, dtype) * scheduler.init_noise_sigma
        classes = torch.tensor(ids, device=device)
        if guided:
            classes = torch.cat([classes, torch.full_like(classes, null)])
        extra = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            extra["generator"] = generator

        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, t in enumerate(scheduler.timesteps):
                out = torch.cat([x, x]) if guided else x
                out = scheduler.scale_model_input(out, t)
                out = self.transformer(out, t.expand(len(out)), classes, return_dict=False)[0]
                noise, variance = out[:, :channels], out[:, channels:]
                if guided:
                    noise = _guide(noise, guidance_scale, cfg_channels)
                    variance = variance.chunk(2)[0]
                if with_variance:
                    noise = torch.cat([noise, variance], 1)
                x = scheduler.step(noise, t, x, **extra, return_dict=False)[0].to(dtype)
                if callback_on_step_end is not None:
                    tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, i, t, tensors)
                    x = (changed or {}).get("latents", x)
                bar.update()

        images: Any = x
        if output_type != "latent":
            x = x.to(self.vae.dtype) / self.vae.config.scaling_factor
            images = (self.vae.decode(x, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.float().cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _class_ids(self, class_labels: Any) -> list[int]:
        """Numbers of classes given by number or name."""
        several = not isinstance(class_labels, int | str)
        given = list(class_labels) if several else [class_labels]
        count = self.transformer.config.num_embeds_ada_norm
        if not given:
            raise ValueError("class_labels: got none, expected at least one class")
        ids = []
        for label in given:
            if isinstance(label, Tensor) and label.ndim == 0:
                label = label.item()
            if isinstance(label, str) and label in self.labels:
                ids.append(self.labels[label])
            elif isinstance(label, str):
                names = ", ".join(sorted(self.labels, key=self.labels.__getitem__)[:20])
                raise ValueError(
                    f"class_labels: there is no class {label!r}; there are"
                    f" {names or 'numbers alone'}{', ...' if len(self.labels) > 20 else ''}"
                )
            elif type(label) is int and 0 <= label < count:
                ids.append(label)
            else:
                raise ValueError(
                    f"class_labels: got {label!r}, expected a number from 0 to {count - 1}"
                    + (" or a name" if self.labels else "")
                )
        return ids

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config, scale = self.transformer.config, self.vae_scale_factor
        default = config.sample_size * scale
        height = (width or default) if height is None else height
        width = height if width is None else width
        step = scale * config.patch_size
        for name, value in (("height", height), ("width", width)):
            if type(value) is not int or value < step or value % step:
                raise ValueError(f"{name}: got {value!r}, expected a positive multiple of {step}")
        if height != width:
            raise ValueError(
                f"height, width: got {height} by {width}; {type(self.transformer).__name__} makes"
                " squares alone"
            )
        return height // scale, width // scale

    def _check(
        self,
        steps: int,
        guidance_scale: float,
        cfg_channels: int | None,
        output_type: str,
        generator: Any,
        ids: list[int],
    ) -> None:
        channels = self.transformer.config.in_channels
        if type(steps) is not int or steps < 1:
            raise ValueError(f"num_inference_steps: got {steps!r}, expected at least 1")
        if not isinstance(guidance_scale, int | float) or not 1 <= guidance_scale < float("inf"):
            raise ValueError(f"guidance_scale: got {guidance_scale!r}, expected at least 1 (none)")
        if cfg_channels not in (None, 3, channels):
            raise ValueError(f"cfg_channels: got {cfg_channels!r}, expected 3, {channels} or None")
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type: got {output_type!r}, expected one of {_OUTPUTS}")
        if isinstance(generator, list) and len(generator) != len(ids):
            raise ValueError(
                f"generator: got {len(generator)}, expected one, or one for each of {len(ids)}"
                " classes"
            )

    def _scheduler_for_model(self) -> tuple[Any, bool]:
        """The scheduler to step with, and whether it takes the variance half."""
        scheduler, config = self.scheduler, self.transformer.config
        learned = scheduler.config.get("variance_type") in _LEARNED
        # The others cut a learned variance off at the third channel, as if latents were RGB.
        takes = learned and "predicted_variance" in _parameters(scheduler, "_get_variance")
        if takes and config.out_channels != 2 * config.in_channels:
            raise ValueError(
                f"scheduler: variance_type is {scheduler.config['variance_type']!r}, but the model"
                f" has {config.out_channels} output channels and no variance half; use"
                ' "fixed_small"'
            )
        if learned and not takes:
            scheduler = type(scheduler).from_config(scheduler.config, variance_type=None)
        return scheduler, takes


def with_learned_variance(pipe: Any) -> Any:
    """diffusers' own DiT pipeline as a `DiTPipeline` of the same parts; any other as it is."""
    if not isinstance(pipe, StockDiTPipeline) or isinstance(pipe, DiTPipeline):
        return pipe
    names = {number: name for name, number in pipe.labels.items()}
    return DiTPipeline(pipe.transformer, pipe.vae, pipe.scheduler, names or None)


def _guide(noise: Tensor, scale: float, channels: int | None) -> Tensor:
    """Classifier-free guidance of the first channels; the rest is that of the class."""
    of_class, of_none = noise.chunk(2)
    guided = of_none + scale * (of_class - of_none)
    if channels is None or channels == noise.shape[1]:
        return guided
    return torch.cat([guided[:, :channels], of_class[:, channels:]], 1)


def _parameters(scheduler: Any, name: str) -> Sequence[str]:
    method = getattr(scheduler, name, None)
    return [] if method is None else list(inspect.signature(method).parameters)
