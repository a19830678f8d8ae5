"""LiT's attention (Wang et al. 2025, arXiv:2501.12976): few linear heads and a depthwise filter.

For the image self-attention of DiT and PixArt. SANA's linear attention (Xie et al. 2024,
arXiv:2410.10629) is the same without the filter, with another constant in the denominator.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linfusion.attention.base import Processor, finished, projected_out
from linfusion.attention.grids import dit as patches
from linfusion.attention.method import Method, same_settings, unsupported
from linfusion.kernels import linear_attention
from linfusion.kernels.library import without_autocast

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

NAME = "lit"
CONVOLUTIONS = ("value_shared", "value_full", "input_full")

# Feature map and constant in the denominator that go with each normaliser.
_PUBLISHED = {"mean": ("relu_eps", 1e-6), "sum": ("relu", 1e-15)}
_PLAIN = {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"}
_FUSED = "FusedAttnProcessor2_0"


@dataclass(frozen=True)
class Form:
    """What stands in for softmax in one layer.

    Args:
        heads: of the linear attention, whatever number softmax had; it divides the width. The
            authors found fewer to be better, and published 2 (S, L, XL) and 3 (B).
        kernel_size: of the depthwise convolution, odd.
        conv: "value_shared" filters the values of every head alike, as published; "value_full" has
            a filter for each channel of the values; "input_full" for each channel of what comes
            into the layer (LINA); None has no convolution.
        normalizer: "mean" with φ = relu + 1e-6 and ε = 1e-6, as LiT; "sum" with φ = relu and
            ε = 1e-15, as SANA.
        qk_norm: root-mean-square norm of queries and keys over all channels before φ, as SANA 1.5.
        key_center: take the mean over tokens from the keys before φ. Softmax does not see that
            mean, kernels do, so it helps where projections are inherited.

    Raises:
        ValueError: a value that is out of range.
    """

    heads: int = 2
    kernel_size: int = 5
    conv: str | None = "value_shared"
    normalizer: str = "mean"
    qk_norm: bool = False
    key_center: bool = False

    def __post_init__(self) -> None:
        if type(self.heads) is not int or self.heads < 1:
            raise ValueError(f"heads: got {self.heads!r}, expected a positive whole number")
        if type(self.kernel_size) is not int or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {self.kernel_size!r}, expected an odd number")
        if self.conv is not None and self.conv not in CONVOLUTIONS:
            raise ValueError(f"conv: got {self.conv!r}, expected one of {CONVOLUTIONS} or None")
        if self.normalizer not in _PUBLISHED:
            raise ValueError(
                f"normalizer: got {self.normalizer!r}, expected one of {tuple(_PUBLISHED)}"
            )
        for name in ("qk_norm", "key_center"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")


@dataclass(frozen=True)
class Options(Form):
    """What `linearize(model, "lit")` takes.

    Args:
        softmax_every: n leaves every n-th layer as it is.
    """

    softmax_every: int | None = None


class DepthwiseConv(nn.Conv2d):
    """A filter for each channel of one head, the same for all heads; one for every channel if 1.

    Fresh, it is 0. `reset_parameters` gives what training from scratch starts with.

    Args:
        channels: filters, [channels, 1, k, k].
        kernel_size: k.
        heads: how often the filters repeat over the channels of the tokens.
    """

    def __init__(self, channels: int, kernel_size: int, heads: int) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.heads = heads
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """[B, h·w, heads·channels] -> the same shape, in float32 (float64 for float64).

        One grouped convolution for all heads. Tokens are channels-last already: nothing moves.
        """
        assert self.bias is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(dtype).repeat(self.heads, 1, 1, 1)
        bias = self.bias.to(dtype).repeat(self.heads)
        image = x.to(dtype).unflatten(1, grid).permute(0, 3, 1, 2)
        with without_autocast(x.device):
            out = F.conv2d(image, weight, bias, padding=self.padding, groups=len(weight))
        return out.permute(0, 2, 3, 1).flatten(1, 2)


class LinearMixer(nn.Module):
    """What hangs on a layer as `attn.lit`: its `Form`, the convolution, and the norms if any.

    Args:
        width: channels of queries, keys and values together.
        form: fields of a `Form`.

    Raises:
        ValueError: heads do not divide the width, or a field there is not.
    """

    def __init__(self, width: int, form: Mapping[str, Any]) -> None:
        super().__init__()
        names = {field.name for field in fields(Form)}
        if not isinstance(form, Mapping) or not set(form) <= names:
            raise ValueError(f"form: got {form!r}, expected some of {sorted(names)} by name")
        self.form = Form(**form)
        heads = self.form.heads
        if width % heads:
            raise ValueError(f"heads: got {heads}, which does not divide the {width} channels")
        repeated = heads if self.form.conv == "value_shared" else 1
        self.dwc = (
            None
            if self.form.conv is None
            else DepthwiseConv(width // repeated, self.form.kernel_size, repeated)
        )
        self.norm_q = nn.RMSNorm(width, eps=1e-5) if self.form.qk_norm else None
        self.norm_k = nn.RMSNorm(width, eps=1e-5) if self.form.qk_norm else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: Any = None) -> Tensor:
        """Linear attention on projections [B, N, C], without the convolution.

        With a `linfusion.parallel.Shard`, these are one rank's tokens and it is over those of all.
        """
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if self.form.key_center:
            wide = k.to(torch.promote_types(k.dtype, torch.float32))
            mean = wide.mean(1, keepdim=True) if shard is None else shard.mean(wide)
            k = (wide - mean).to(k.dtype)
        feature_map, eps = _PUBLISHED[self.form.normalizer]
        q, k, v = (x.unflatten(-1, (self.form.heads, -1)) for x in (q, k, v))
        attend: Any = linear_attention if shard is None else shard.linear_attention
        out: Tensor = attend(
            q, k, v, feature_map=feature_map, normalizer=self.form.normalizer, eps=eps
        )
        return out.flatten(2)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, grid: tuple[int, int] | None
    ) -> Tensor:
        """Attention and convolution.

        Args:
            q, k, v: projections [B, N, C].
            x: [B, N, C], what came into the layer, for "input_full".
            grid: (h, w), h·w = N, a `LocalGrid` where others have further rows; None only without
                a convolution.

        Returns:
            [B, N, C] in the dtype of v, before the output projection.
        """
        shard = getattr(grid, "shard", None)
        if self.dwc is None:
            return self.mix(q, k, v, shard)
        assert grid is not None
        seen = x if self.form.conv == "input_full" else v
        if shard is None:
            local = self.dwc(seen, grid)
        else:
            local = shard.around(seen, self.form.kernel_size // 2, self.dwc)
        return local.add_(self.mix(q, k, v, shard)).to(v.dtype)


class LiTProcessor(Processor):
    """Attention processor of diffusers for the image self-attention of DiT and PixArt.

    o_i = φ(q_i)·S / (φ(q_i)·m + ε) + conv(v)_i,  S = mean_j φ(k_j)ᵀv_j,  m = mean_j φ(k_j)
    (LiT, eq. 3 f.), with the `Form` of the layer's child `attn.lit`.

    It has no state: one instance serves every layer. The grid comes with the arguments, from a hook
    that `linfusion.linearize` puts on the model.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the layer.
            hidden_states: [B, N, C].
            encoder_hidden_states: must be None.
            attention_mask: must be None.
            temb: not used; diffusers passes it to some layers.
            grid: (h, w) of the tokens.

        Raises:
            ValueError: something that this attention cannot honour; the message names it.
        """
        child = getattr(attn, NAME, None)
        if child is None:
            raise ValueError(
                "attn: LiTProcessor misses its form on this layer; use"
                ' linfusion.linearize(model, "lit", heads=2)'
            )
        if encoder_hidden_states is not None:
            raise ValueError(
                "encoder_hidden_states: got some; LiTProcessor is for self-attention alone"
            )
        self.refuse_mask(
            attention_mask,
            "LiT's convolution cannot leave tokens out, so there can be no mask over the picture"
            " (one over the text is encoder_attention_mask)",
        )
        self.refuse_context_parallelism()
        tokens = hidden_states.shape[1]
        if child.dwc is not None and (grid is None or grid[0] * grid[1] != tokens):
            got = "none" if grid is None else f"{grid[0]} by {grid[1]}"
            raise ValueError(
                f"grid: got {got} for {tokens} tokens; the convolution needs height and width in"
                " tokens, which linfusion.linearize on the whole model hands on"
            )
        residual = x = hidden_states
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        if attn.norm_q is not None:
            q = _host_norm(attn, attn.norm_q, q)
        if attn.norm_k is not None:
            k = _host_norm(attn, attn.norm_k, k)
        out = projected_out(attn, child(q, k, v, x, grid))
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        return finished(attn, out, residual)


def _host_norm(attn: Attention, norm: Any, x: Tensor) -> Tensor:
    """The norm of the layer itself, over all channels or over those of one of its own heads."""
    if norm.weight is not None and norm.weight.numel() == x.shape[-1]:
        return norm(x)
    return norm(x.unflatten(-1, (attn.heads, -1))).flatten(-2)


def image_attention(model: nn.Module) -> dict[str, Any]:
    """The image self-attention (`attn1`) of DiT or PixArt, by path.

    Raises:
        ValueError: it is another model, or a layer runs a processor that would lose something.
    """
    if patches.kind_of(model) is None:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} has no self-attention that LiT knows the grid"
            f" of; expected one of {', '.join(patches.HOSTS)}, or a pipeline with one"
        )
    found: dict[str, Any] = {
        path: module
        for path, module in model.named_modules()
        if re.fullmatch(r"transformer_blocks\.\d+\.attn1", path)
    }
    for path, attn in found.items():
        kind = type(attn.processor).__name__
        if kind == _FUSED:
            raise ValueError(
                f"model_or_pipe: {path} runs {kind}, which fuse_qkv_projections has put there; call"
                " unfuse_qkv_projections() first"
            )
        if kind not in _PLAIN and not isinstance(attn.processor, LiTProcessor):
            raise ValueError(
                f"model_or_pipe: {path} runs {kind}, which LiT would replace; set one of"
                " diffusers' own first"
            )
        reason = unsupported(attn)
        if reason is not None:
            raise ValueError(f"model_or_pipe: {path} has no linear form: {reason}")
    return found


def settings(
    paths: Collection[str], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the `Form` of every layer that becomes linear.

    `softmax_every=n` leaves every n-th layer out, which keeps softmax there (EDiT; SANA-Video 2
    has a quarter of them).

    Raises:
        ValueError: a `softmax_every` out of range, or an option the weights do not allow.
    """
    every = options.get("softmax_every")
    given = {name: value for name, value in options.items() if name != "softmax_every"}
    if stored is None:
        form = asdict(Form(**given))
        if every is not None and (type(every) is not int or not 2 <= every <= len(paths)):
            raise ValueError(
                f"softmax_every: got {every!r}, expected a whole number from 2 to {len(paths)}, the"
                " number of layers"
            )
        return {p: form for i, p in enumerate(paths) if every is None or (i + 1) % every}
    if every is not None:
        raise ValueError(f"softmax_every: got {every}, but the weights say which layers are linear")
    return same_settings(paths, stored, given)


def _is_fresh(child: nn.Module) -> bool:
    conv = getattr(child, "dwc", None)
    parameters = () if conv is None else conv.parameters()
    return all(p.is_meta or not p.any() for p in parameters)


def break_even_tokens(attn: Any, form: Mapping[str, Any]) -> int:
    """Tokens N at which 2·N·C²/h (state and read) equals 2·N²·C (scores and sum): N = C/h."""
    return int(attn.inner_dim) // Form(**form).heads


def state_bytes(attn: Any) -> int:
    """fp32 S [h, C/h, C/h] and m [C]."""
    child = getattr(attn, NAME, None)
    heads = Form().heads if child is None else child.form.heads
    return 4 * attn.inner_dim * (attn.inner_dim // heads + 1)


METHOD = Method(
    name=NAME,
    processor=LiTProcessor,
    options=Options,
    layers=image_attention,
    setting_key="form",
    settings=settings,
    child=lambda attn, form: LinearMixer(attn.inner_dim, form),
    is_fresh=_is_fresh,
    break_even_tokens=break_even_tokens,
    state_bytes=state_bytes,
    student='"lit", weights="a folder of yours"',
    projections=True,
    nullable=("conv",),
    attach=patches.attach,
    detach=patches.detach,
)
