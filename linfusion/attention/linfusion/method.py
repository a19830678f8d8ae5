"""What LinFusion offers `linearize`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from linfusion.attention import cost
from linfusion.attention.linfusion.fused import FusedLayer
from linfusion.attention.method import Method, self_attention

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
from linfusion.attention.linfusion.feature_map import NAME, FeatureMap, ResidualMLP
from linfusion.attention.linfusion.processor import (
    FUSED,
    LinFusionPAGCFGProcessor,
    LinFusionPAGProcessor,
    LinFusionProcessor,
)


@dataclass(frozen=True)
class Maps:
    """What `linearize(model, "linfusion")` takes.

    Args:
        projection_mid_dim: hidden channels of a fresh learned part; None is as many as the layer
            has, -1 none.

    Raises:
        ValueError: a value that is out of range.
    """

    projection_mid_dim: int | None = None

    def __post_init__(self) -> None:
        mid = self.projection_mid_dim
        if mid is not None and (type(mid) is not int or not (mid == -1 or mid > 0)):
            raise ValueError(
                f"projection_mid_dim: got {mid!r}, expected None (as many as the layer has), -1 (no"
                " MLP) or a positive number of channels"
            )


def _mid(attn: Attention, projection_mid_dim: int | None) -> int:
    mid = attn.query_dim if projection_mid_dim is None else projection_mid_dim
    return max(mid, 0)


def _is_fresh(child: nn.Module) -> bool:
    lasts = [m.last for m in child.modules() if isinstance(m, ResidualMLP) and m.mid != -1]
    # Offloaded layer by layer, it cannot be looked at, and was not trained either.
    return all(p.is_meta or not p.any() for last in lasts for p in last.parameters())


def break_even_tokens(attn: Attention, projection_mid_dim: int | None) -> int:
    """Tokens N at which 8·C·mid + 4·C·D (two MLPs, linear core) equals 4·N·C (softmax core)."""
    return 2 * _mid(attn, projection_mid_dim) + attn.inner_dim // attn.heads


def _passes(attn: Attention, projection_mid_dim: int | None, tokens: int) -> list[cost.Pass]:
    head_dim = attn.inner_dim // attn.heads
    return cost.linfusion(
        1, tokens, attn.heads, head_dim, projection_mid_dim, cost.LINFUSION_ONE_PASS
    )


def state_bytes(attn: Attention) -> int:
    """fp32 S [H, D, D] and m [H, D]."""
    head_dim = attn.inner_dim // attn.heads
    return 4 * attn.heads * head_dim * (head_dim + 1)


def _settings(
    paths: Iterable[str], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Hidden channels of the two MLPs of every layer."""
    mid = options.get("projection_mid_dim")
    if stored is None:
        return dict.fromkeys(paths, mid)
    if mid is not None:
        raise ValueError(f"projection_mid_dim: got {mid}, but the weights say what it is")
    return dict(stored)


METHOD = Method(
    name=NAME,
    processor=LinFusionProcessor,
    options=Maps,
    layers=lambda model: self_attention(model, processor=LinFusionProcessor),
    setting_key="projection_mid_dim",
    settings=_settings,
    child=lambda attn, mid: FeatureMap(attn.query_dim, mid),
    is_fresh=_is_fresh,
    break_even_tokens=break_even_tokens,
    passes=_passes,
    state_bytes=state_bytes,
    student='weights="Yuanshi/LinFusion-1-5"',
    fused_name=FUSED,
    fused=lambda attn, child, dtype: FusedLayer(attn, cast(FeatureMap | None, child), dtype),
    pag_processors=lambda: (LinFusionPAGCFGProcessor(), LinFusionPAGProcessor()),
)
