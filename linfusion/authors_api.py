"""The call of the original authors' library, and the students they published."""

from __future__ import annotations

from typing import Any

from torch import nn

from linfusion.attention.linfusion.feature_map import NAME
from linfusion.layers.find import candidates, model_of
from linfusion.linearize import linearize
from linfusion.students.saving import learned
from linfusion.students.student import LinFusion

# The students their authors published, by what tells the teachers apart: the number of layers, the
# heads that occur, and the channels of the text. Names of repositories change; shapes do not.
PUBLISHED = {
    (16, (8,), 768): "Yuanshi/LinFusion-1-5",
    (16, (5, 10, 20), 1024): "Yuanshi/LinFusion-2-1",
    (70, (10, 20), 2048): "Yuanshi/LinFusion-XL",
}

# What the teachers are, besides: other models have UNets of these shapes. Kolors has that of SDXL
# with a text encoder of its own; Stable Video Diffusion and ModelScope have that of 2.1, for video.
TEACHERS = ("UNet2DConditionModel", "UNetMotionModel", "ControlNetModel")


def published_for(model_or_pipe: Any) -> str:
    """Hub name of the authors' student for a model of this kind and shape.

    Raises:
        ValueError: they published none.
    """
    model = model_of(model_or_pipe)
    kinds = {kind.__name__ for kind in type(model).__mro__}
    config = getattr(model, "config", {})
    other = None
    if not kinds & set(TEACHERS):
        other = f"it is a {type(model).__name__}"
    elif config.get("encoder_hid_dim") is not None:
        other = f"it projects a text of {config['encoder_hid_dim']} channels, as Kolors does"
    if other is not None:
        raise ValueError(
            f"model_or_pipe: no published student fits: {other}, and they are of Stable Diffusion"
            " 1.5, 2.1 and XL; give a folder or hub name"
        )
    found = candidates(model, NAME)
    heads = tuple(sorted({attn.heads for attn in found.values()}))
    text = getattr(getattr(model, "config", None), "cross_attention_dim", None)
    shape = (len(found), heads, text)
    if shape not in PUBLISHED:
        known = "; ".join(f"{name}: {key}" for key, name in PUBLISHED.items())
        raise ValueError(
            f"model_or_pipe: no published student fits a model with (layers, heads, text channels)"
            f" = {shape}; there are {known}. Give a folder or hub name."
        )
    return PUBLISHED[shape]


def construct_for(
    cls: type[LinFusion],
    pipeline: Any = None,
    unet: nn.Module | None = None,
    load_pretrained: bool = True,
    pretrained_model_name_or_path: Any = None,
    pipe_name_path: str | None = None,
) -> LinFusion:
    """Linearize a pipeline or UNet; the call of the original authors' library.

    Args:
        pipeline: a diffusers pipeline; its `unet` is taken.
        unet: a bare UNet instead.
        load_pretrained: False attaches a fresh learned part, for training.
        pretrained_model_name_or_path: folder or hub name; by default the published student
            that fits the shape of the UNet.
        pipe_name_path: accepted for the authors' signature and not needed, as the shape says
            which student fits.

    Returns:
        The learned part; its parameters are those that the UNet now uses.

    Raises:
        ValueError: neither or both of pipeline and unet, or no published student fits.
    """
    if (pipeline is None) == (unet is None):
        raise ValueError("pipeline, unet: expected exactly one of the two")
    target = unet if pipeline is None else pipeline
    weights = pretrained_model_name_or_path
    if load_pretrained and weights is None:
        weights = published_for(target)
    linearize(target, NAME, weights=weights if load_pretrained else None)
    return learned(target)


# Here and not in the class: it linearizes, and a format of files knows nothing of that.
LinFusion.construct_for = classmethod(construct_for)
