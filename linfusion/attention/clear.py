"""CLEAR's attention (Liu et al. 2024, arXiv:2412.16112): a window around each token, and the text.

For the joint attention of FLUX and Stable Diffusion 3, where text and image attend to one another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.attention.grids import joint as hosts
from linfusion.attention.grids.joint import Grids
from linfusion.attention.method import Method, StudentFile
from linfusion.kernels import window_attention

NAME = "clear"

# Processors that compute softmax attention over text and image and nothing besides.
_PLAIN = {
    "FluxAttnProcessor",
    "FusedJointAttnProcessor2_0",
    "JointAttnProcessor2_0",
    "XFormersJointAttnProcessor",
}


@dataclass(frozen=True)
class Window:
    """What an image token of one layer sees, besides the text.

    Args:
        radius: tokens nearer than this, dy² + dx² < radius²; the authors trained 8, 16 and 32.
        down_factor: f > 1 adds the whole picture, with keys and values averaged over f by f tokens
            under learned weights; the authors trained 4. It has to divide height and width.
        proportional: scale scores by √(ln(length_factor·L) / ln(reference_tokens) / D) instead of
            √(1/D), L being the tokens of text and image: for pictures larger than in training.
        reference_tokens: tokens in training, for `proportional`: 64² + 512.
        length_factor: for `proportional`; None is the authors' 10 with pooling and 1 without.
        ntk: factor of the base of FLUX's rotary frequencies; the authors take 10 above 1024 px.

    Raises:
        ValueError: a value that is out of range.
    """

    radius: float = 8
    down_factor: int = 1
    proportional: bool = False
    reference_tokens: int = 4608
    length_factor: float | None = None
    ntk: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("radius", 0), ("reference_tokens", 1), ("ntk", 0), ("length_factor", 0)):
            value = getattr(self, name)
            if name == "length_factor" and value is None:
                continue
            if not _is_number(value) or not low < value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected a number above {low}")
        if type(self.down_factor) is not int or self.down_factor < 1:
            raise ValueError(
                f"down_factor: got {self.down_factor!r}, expected 1 (no pooling) or a whole number"
                " above it"
            )
        if type(self.proportional) is not bool:
            raise ValueError(f"proportional: got {self.proportional!r}, expected True or False")

    def scale(self, tokens: int, head_dim: int) -> float:
        """Of the scores, where queries see text and image of `tokens` in all."""
        if not self.proportional:
            return head_dim**-0.5
        factor = self.length_factor or (10 if self.down_factor > 1 else 1)
        # One token has ln 1 = 0, and then no score matters.
        logarithm = max(math.log(factor * tokens), 0.0)
        return math.sqrt(logarithm / math.log(self.reference_tokens) / head_dim)


class Pool(nn.Linear):
    """Average of f by f tokens under learned weights, the same for all channels and heads.

    A Linear, so that offloading and casting treat it as one; fresh, it is the plain average.

    Args:
        factor: f.
    """

    def __init__(self, factor: int) -> None:
        super().__init__(factor * factor, 1, bias=False)
        self.factor = factor
        nn.init.constant_(self.weight, factor**-2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """[B, h·w, H, D], size (h, w) -> [B, h·w/f², H, D], summed in float32."""
        f = self.factor
        x = x.unflatten(1, (size[0] // f, f, size[1] // f, f))
        weight = self.weight.float().view(f, f)
        total: Tensor | None = None
        for row in range(f):  # one f²-th of the tokens at a time: no float32 copy of them all
            for column in range(f):
                part = x[:, :, row, :, column].float() * weight[row, column]
                total = part if total is None else total + part
        assert total is not None
        return total.flatten(1, 2).to(x.dtype)


class LocalWindow(nn.Module):
    """What hangs on a layer as `attn.clear`: its window, and with pooling the learned weights.

    Args:
        setting: fields of a `Window`.
    """

    def __init__(self, setting: Mapping[str, Any]) -> None:
        super().__init__()
        names = {field.name for field in fields(Window)}
        if not isinstance(setting, Mapping) or not set(setting) <= names:
            raise ValueError(f"window: got {setting!r}, expected some of {sorted(names)} by name")
        self.window = Window(**setting)
        self.pool = Pool(self.window.down_factor) if self.window.down_factor > 1 else None


class CLEARProcessor:
    """Attention processor of diffusers for the joint layers of FLUX and Stable Diffusion 3.

    An image token attends to the text and to the image tokens within a radius of its own, with
    pooling also to the whole picture at low resolution; a text token attends to all text and image
    tokens (CLEAR, eq. 4). Cost and memory are linear in the image tokens, but for the pooled part,
    which is 1/f² of full attention.

    Pictures that FLUX Kontext appends to look at are grids of their own: a token sees the text, its
    window in its own picture, and all of the other pictures. What is being copied may come from
    anywhere, so this part stays as large as in full attention.

    It has no state: one instance serves every layer. Windows hang on the layers as `attn.clear`;
    grids come with the arguments, from hooks that `linfusion.linearize` puts on the model.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        image_grids: Grids | None = None,
    ) -> Any:
        """Attend.

        Args:
            attn: the layer.
            hidden_states: image tokens [B, N, C]; in a single block of FLUX [B, T + N, C], text
                first.
            encoder_hidden_states: text tokens [B, T, C], or None.
            attention_mask: must be None.
            image_rotary_emb: `RotaryTable`, for FLUX.
            image_grids: for Stable Diffusion 3, which has no rotary table.

        Returns:
            Image and text tokens where there are `encoder_hidden_states`, else tokens as they came.

        Raises:
            ValueError: something that this attention cannot honour; the message names it.
        """
        child = getattr(attn, NAME, None)
        grids = image_grids or getattr(image_rotary_emb, "grids", None)
        if child is None or grids is None:
            missing = "a window" if child is None else "the grid of its tokens"
            raise ValueError(
                f"attn: CLEARProcessor misses {missing} on this layer; use"
                ' linfusion.linearize(model, "clear", radius=8), which gives both'
            )
        if attention_mask is not None:
            raise ValueError(
                f"attention_mask: got one of shape {tuple(attention_mask.shape)}; CLEAR's attention"
                " has a window and takes no further mask"
            )
        if self._parallel_config is not None:
            raise ValueError(
                "_parallel_config: CLEARProcessor does not run under diffusers'"
                " enable_parallelism, which cuts rows and text apart; call"
                " linfusion.parallelize(pipe) instead"
            )
        q, k, v, text_q, text_k, text_v = _projected(attn, hidden_states, encoder_hidden_states)
        joint = encoder_hidden_states is not None
        text = text_q.shape[1] if joint else q.shape[1] - grids.tokens
        if q.shape[1] != grids.tokens if joint else text < 0:
            raise ValueError(
                f"hidden_states: got {hidden_states.shape[1]} tokens, expected {grids.tokens} of"
                f" the grids {grids.sizes}" + ("" if joint else " and those of the text")
            )
        if joint:
            k, v = torch.cat([text_k, k], 1), torch.cat([text_v, v], 1)
        else:
            text_q, q = q[:, :text], q[:, text:]
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            q = _rotated(q, cos[text:], sin[text:])
            text_q = _rotated(text_q, cos[:text], sin[:text])
            k = _rotated(k, cos, sin)

        shard = grids.shard
        tokens = k.shape[1] if shard is None else text + shard.tokens
        scale = child.window.scale(tokens, k.shape[3])
        image_out = _image(child, grids, q, k, v, scale)
        # The text that the last block of Stable Diffusion 3 returns is not read.
        unread = joint and attn.context_pre_only
        text_out = text_q
        if text and not unread:
            if shard is None:
                text_out = self._softmax(text_q, k, v, scale)
            else:
                seen = (k[:, :text], v[:, :text]), (k[:, text:], v[:, text:])
                text_out = shard.softmax(text_q, *seen, scale)
        if not joint:
            out = image_out if text == 0 else torch.cat([text_out, image_out], 1)
            return _projected_out(attn, out.flatten(2))
        text_out = text_out.flatten(2)
        return (
            _projected_out(attn, image_out.flatten(2)),
            text_out if unread else attn.to_add_out(text_out),
        )

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: Tensor = dispatch_attention_fn(q, k, v, scale=scale, backend=self._attention_backend)
        return out.to(q.dtype)


def _image(
    child: LocalWindow, grids: Grids, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> Tensor:
    """Image queries [B, N, H, D] over keys and values of text and image [B, T + N, H, D]."""
    text = k.shape[1] - grids.tokens
    start = text
    out: list[Tensor] = []
    for size, order in zip(grids.sizes, grids.orders, strict=True):
        end = start + size[0] * size[1]
        own_k, own_v = k[:, start:end], v[:, start:end]
        others = [(k[:, :start], v[:, :start]), (k[:, end:], v[:, end:])]
        others = [pair for pair in others if pair[0].shape[1]]
        context = others[0] if len(others) == 1 else None
        if len(others) == 2:
            context = torch.cat([p[0] for p in others], 1), torch.cat([p[1] for p in others], 1)
        pooled = None
        if child.pool is not None:
            cells = (own_k, own_v) if order is None else (order.undo(own_k), order.undo(own_v))
            pooled = child.pool(cells[0], size), child.pool(cells[1], size)
        seen: Any = {"radius": child.window.radius, "context": context, "scale": scale}
        own_q = q[:, start - text : end - text]
        if grids.shard is not None:
            if pooled is not None:
                factor = child.window.down_factor
                seen["pooled"] = grids.shard.coarser(factor).gathered(*pooled)
            out.append(grids.shard.window_attention(own_q, own_k, own_v, **seen))
        else:
            seen |= {"pooled": pooled, "grid": size, "order": order}
            out.append(window_attention(own_q, own_k, own_v, **seen))
        start = end
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _projected(attn: Any, x: Tensor, text: Tensor | None) -> tuple[Any, ...]:
    """q, k, v of the image and of the text (or None), normed, [B, N, H, D]."""
    # FLUX may have one GEMM instead of three; Stable Diffusion 3 keeps stale copies of that.
    fused = hasattr(attn, "unfuse_projections") and attn.fused_projections
    image_parts = (
        attn.to_qkv(x).chunk(3, -1) if fused else [attn.to_q(x), attn.to_k(x), attn.to_v(x)]
    )
    text_parts: Any = [None] * 3
    if text is not None:
        text_parts = (
            attn.to_added_qkv(text).chunk(3, -1)
            if fused
            else [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]
        )
    norms = ("norm_q", "norm_k", None, "norm_added_q", "norm_added_k", None)
    found = []
    for part, name in zip([*image_parts, *text_parts], norms, strict=True):
        if part is not None:
            part = part.unflatten(-1, (attn.heads, -1))
            norm = getattr(attn, name, None) if name else None
            part = part if norm is None else norm(part)
        found.append(part)
    return tuple(found)


def _projected_out(attn: Any, x: Tensor) -> Tensor:
    if getattr(attn, "to_out", None) is None:  # a single block of FLUX has its own
        return x
    out: Tensor = attn.to_out[1](attn.to_out[0](x))
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from diffusers.models.embeddings import apply_rotary_emb

    rotated: Tensor = apply_rotary_emb(x, (cos, sin), sequence_dim=1)
    return rotated


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def joint_attention(model: nn.Module) -> dict[str, Any]:
    """The layers of FLUX or Stable Diffusion 3 that attend from image to image, by path.

    Raises:
        ValueError: it is another model, or a layer runs a processor that would lose something.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if not kinds & set(hosts.HOSTS):
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} has no joint attention that CLEAR knows the"
            f" grid of; expected one of {', '.join(hosts.HOSTS)}, or a pipeline with one"
        )
    found = {
        path: module
        for path, module in model.named_modules()
        if re.search(r"transformer_blocks\.\d+\.attn2?$", path)
    }
    for path, attn in found.items():
        processor = attn.processor
        if type(processor).__name__ not in _PLAIN and not isinstance(processor, CLEARProcessor):
            raise ValueError(
                f"model_or_pipe: {path} runs {type(processor).__name__}, which CLEAR would replace;"
                " call pipe.unload_ip_adapter() or model.set_attn_processor with diffusers' own"
                " processor first"
            )
    return found


def settings(
    paths: Iterable[str], stored: Mapping[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the `Window` of every layer: the options, else what the weights say.

    Raises:
        ValueError: an option there is not, a value out of range, or another `down_factor` than that
            of the weights.
    """
    names = [field.name for field in fields(Window)]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"{unknown[0]}: method 'clear' has no such option; it has {names}")
    if stored is None:
        return {path: asdict(Window(**options)) for path in paths}
    found = {}
    for path, window in stored.items():
        factor = options.get("down_factor", window["down_factor"])
        if factor != window["down_factor"]:
            raise ValueError(
                f"down_factor: got {factor}, but {path} of the weights pools by"
                f" {window['down_factor']}; leave it out"
            )
        if "radius" not in {**window, **options}:
            raise ValueError(
                "radius: the weights do not say it and neither does the name of their file; give"
                " the one they were trained with, as radius=8"
            )
        found[path] = asdict(Window(**{**window, **options}))
    return found


def read_file(name: str, tensors: Mapping[str, Tensor]) -> StudentFile:
    """The authors' files: part of the state dict of a FLUX transformer, in diffusers' names.

    Args:
        name: of the file; `clear_local_8_down_4` says the radius, which the tensors do not.
        tensors: `...attn.to_q.weight` and so on, and `...attn.processor.spatial_weight` of shape
            (1, 1, 1, f, 1, f, 1) with pooling.
    """
    radius = re.search(r"local_(\d+)", name)
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.+\.attn2?)\.((?:to_[qkv]|to_out\.0)\.\w+|processor\.\w+)", key)
        if found is None or (
            found[2].startswith("processor.")
            and (found[2] != "processor.spatial_weight" or not _is_square(tensor))
        ):
            unknown.append(key)
            continue
        layer = layers.setdefault(found[1], {})
        if found[2] == "processor.spatial_weight":
            layer[f"{NAME}.pool.weight"] = tensor.reshape(1, -1)
        else:
            layer[found[2]] = tensor
    windows = {}
    for path, layer in layers.items():
        pool = layer.get(f"{NAME}.pool.weight")
        factor = 1 if pool is None else math.isqrt(pool.numel())
        windows[path] = {"down_factor": factor} | ({"radius": int(radius[1])} if radius else {})
    return StudentFile(layers, windows, unknown)


def _is_square(weight: Tensor) -> bool:
    return (
        weight.ndim == 7
        and weight.shape[3] == weight.shape[5]
        and weight.numel() == (weight.shape[3] ** 2)
    )


def _is_fresh(child: nn.Module) -> bool:
    return all(p.is_meta or bool((p == p.flatten()[0]).all()) for p in child.parameters())


def break_even_tokens(attn: Any, setting: Mapping[str, Any]) -> int:
    """Image tokens N at which window and pooled tokens together are N: disc + N/f² = N."""
    window = Window(**setting)
    last = math.ceil(window.radius) - 1
    rows = (window.radius**2 - dy * dy for dy in range(-last, last + 1))
    disc = sum(2 * math.ceil(math.sqrt(left)) - 1 for left in rows)
    if window.down_factor == 1:
        return disc
    return math.ceil(disc / (1 - window.down_factor**-2))


METHOD = Method(
    name=NAME,
    processor=CLEARProcessor,
    layers=joint_attention,
    setting_key="window",
    settings=settings,
    child=lambda attn, setting: LocalWindow(setting),
    is_fresh=_is_fresh,
    break_even_tokens=break_even_tokens,
    state_bytes=lambda attn: 0,
    student='"clear", weights="Huage001/CLEAR/clear_local_8.safetensors"',
    projections=True,
    read_file=read_file,
    attach=hosts.attach,
    detach=hosts.detach,
)
