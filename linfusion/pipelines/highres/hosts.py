"""What differs between pipelines with a UNet and the transformers FLUX and Stable Diffusion 3."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, AutoPipelineForImage2Image
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from linfusion.bands.hosts import TRANSFORMERS, unwrapped

_ACCEPTED = (
    "accepted is a text-to-image pipeline with a UNet, FLUX's or Stable Diffusion 3's transformer,"
    " such as StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline,"
    " StableDiffusion3Pipeline or their ControlNet forms"
)


@dataclass(frozen=True)
class Recipe:
    """What a call takes where it names nothing.

    Attributes:
        steps: of the scheduler, for every stage.
        guidance: one for the base stage and one for those after it.
        strengths: of the stages after the first, by strategy; the last one repeats.
    """

    steps: int
    guidance: tuple[float, float]
    strengths: Mapping[str, tuple[float, ...]]


# LinFusion's notebooks (Liu et al. 2024), by a UNet.
UNET = Recipe(
    steps=50,
    guidance=(7.5, 7.5),
    strengths={"sdedit": (0.4, 0.3, 0.2, 0.1), "superres": (0.32, 0.24, 0.16, 0.08)},
)
# CLEAR's notebooks (Liu et al. 2024, arXiv:2412.16112), by FLUX.1-dev; a base of Stable Diffusion 3
# takes the guidance of its own pipeline.
FLUX = Recipe(steps=20, guidance=(3.5, 7.5), strengths={"sdedit": (0.7,), "superres": (0.7,)})
SD3 = Recipe(steps=20, guidance=(7.0, 7.5), strengths={"sdedit": (0.7,), "superres": (0.7,)})
SHIFT = 3.0  # of the flow in their later stages
WINDOW = {"radius": 8, "ntk": 10.0, "proportional": True}


def called(pipe: Any) -> Any:
    """What the pipeline calls to denoise: UNet or transformer, or what it was compiled to."""
    unet = getattr(pipe, "unet", None)
    return pipe.transformer if unet is None else unet


def denoiser(pipe: Any) -> Any:
    """The UNet or the transformer of a pipeline."""
    return unwrapped(called(pipe))


def is_transformer(pipe: Any) -> bool:
    """Whether FLUX's or Stable Diffusion 3's transformer denoises."""
    return _transformer(pipe) in TRANSFORMERS


def is_packed(pipe: Any) -> bool:
    """Whether the pipeline's latents are tokens of two by two latent pixels, as FLUX's are."""
    return _transformer(pipe) == TRANSFORMERS[0]


def _transformer(pipe: Any) -> str:
    return type(unwrapped(getattr(pipe, "transformer", None))).__name__


def recipe(pipe: Any) -> Recipe:
    """The authors' constants for this kind of pipeline."""
    if not is_transformer(pipe):
        return UNET
    return FLUX if is_packed(pipe) else SD3


def window_options(pipe: Any, *, trained: bool) -> dict[str, Any]:
    """CLEAR's options in later stages.

    Weights that were trained know their radius; without a rotary embedding there is no frequency.
    """
    stretched = hasattr(denoiser(pipe).pos_embed, "theta")
    left_out = {"radius"} if trained else set()
    left_out |= set() if stretched else {"ntk"}
    return {k: v for k, v in WINDOW.items() if k not in left_out}


def controlnets(pipe: Any) -> list[Any]:
    """The ControlNets of a pipeline, each alone."""
    nets = getattr(pipe, "controlnet", None)
    return [] if nets is None else list(getattr(nets, "nets", [nets]))


def image_to_image(pipe: Any) -> Any:
    """The pipeline of the later stages: the same parts, another loop.

    Raises:
        ValueError: `pipe` has no denoiser that is known, or no image-to-image sibling in diffusers.
    """
    if not isinstance(getattr(pipe, "unet", None), nn.Module) and not is_transformer(pipe):
        raise ValueError(f"pipe: got {type(pipe).__name__}; {_ACCEPTED}")
    if reason := _unfit(pipe):
        raise ValueError(f"pipe: {type(pipe).__name__} {reason}; {_ACCEPTED}")
    try:
        sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no image-to-image form in diffusers ({error});"
            f" {_ACCEPTED}"
        ) from error
    if type(sibling) is type(pipe):
        raise ValueError(f"pipe: {type(pipe).__name__} is image-to-image; {_ACCEPTED}")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError(
            "pipe: its VAE has latents_mean; accepted are VAEs with a scaling_factor alone"
        )
    if is_packed(pipe) and controlnets(pipe):
        _take_latents(sibling)
    return sibling


def _unfit(pipe: Any) -> str | None:
    """Why a pipeline does not draw from a prompt alone what its VAE decodes, or None."""
    takes = inspect.signature(type(pipe).__call__).parameters
    if "strength" in takes and "mask_image" not in takes:
        return "is image-to-image"
    if "mask_image" in takes:
        return "fills masks"
    if "prompt" not in takes:
        return "draws from no prompt"
    if not isinstance(unwrapped(getattr(pipe, "vae", None)), AutoencoderKL):
        return f"has no AutoencoderKL as its vae, but {type(getattr(pipe, 'vae', None)).__name__}"
    if "control_image" in takes and not controlnets(pipe):
        return "draws after a control picture"
    if "original_inference_steps" in takes:
        return (
            "has steps and a guidance of its own; its UNet runs in a StableDiffusionPipeline with"
            " an LCMScheduler"
        )
    channels = denoiser(pipe).config.in_channels // (4 if is_packed(pipe) else 1)
    if channels != (latents := pipe.vae.config.latent_channels):
        return f"denoises {channels} channels, of which its VAE has {latents}"
    return None


def _take_latents(sibling: Any) -> None:
    """Have FLUX's ControlNet sibling start from latents, as all the others do by themselves."""
    channels = sibling.vae.config.latent_channels
    encode = sibling._encode_vae_image

    def start_from(image: Tensor, generator: Any) -> Tensor:
        return image if image.shape[1] == channels else encode(image, generator)

    sibling._encode_vae_image = start_from
    sibling.image_processor = VaeImageProcessor(
        vae_scale_factor=2 * sibling.vae_scale_factor, vae_latent_channels=channels
    )


def native_size(pipe: Any) -> int:
    """The side in pixels that the model was made for."""
    if is_packed(pipe):  # its transformer does not say; its VAE was made for the same
        return pipe.vae.config.sample_size
    if is_transformer(pipe):
        return pipe.transformer.config.sample_size * pipe.vae_scale_factor
    own = pipe.unet.config.sample_size
    return (max(own) if isinstance(own, (list, tuple)) else own) * pipe.vae_scale_factor


def later_steps(pipe: Any, steps: int, strength: float) -> int:
    """How many of `steps` an image-to-image pipeline takes at this strength."""
    if is_transformer(pipe):
        return steps - int(max(steps - min(steps * strength, steps), 0))
    return min(int(steps * strength), steps)


def unpacked(pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Latents as the pipeline returns them -> [1, C, height/f, width/f], f being the VAE's."""
    if not is_packed(pipe):
        return latents
    return pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
