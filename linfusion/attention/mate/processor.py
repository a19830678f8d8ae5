"""MATE in place of the self-attention of video transformers, with the weights of what it replaces.

For Wan, SANA-Video and CogVideoX. That a trained transformer hands on its attention is the idea of
LinGen-Uni (the journal extension of LinGen, Wang et al. 2024, arXiv:2412.09856) and of LinMU (Wang
2026, arXiv:2601.01322).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from linfusion.attention.base import Processor
from linfusion.attention.grids.video import Grid
from linfusion.attention.mamba2.bidirectional import BiMamba2
from linfusion.attention.mamba2.qk_norms import normed
from linfusion.attention.mate.layer import MIXES, PLACEMENTS, pool
from linfusion.attention.mate.scan_orders import ORDERS, RotaryMajorScan, flatten, unflatten
from linfusion.attention.mate.tesa import attend_windows, outside_of

NAME = "mate"

_OF_LAYER = ("layer", "qk_norm", "qk_norm_eps")  # of a setting, beside the fields of a Mixture


@dataclass(frozen=True)
class Mixture:
    """What stands in for softmax over the whole video.

    Args:
        window: (t, h, w) in tokens; a token attends to those of its window, which every second
            layer moves by half of it. Cut to the grid.
        shift_mode: where moved windows begin, "pad" or "roll", as for `linfusion.TESA`.
        scan_orders: in which layers take turns to scan the video, as for `RotaryMajorScan`.
        review_pool: (t, h, w) tokens averaged into a review token; (1, 3, 3) keeps time.
        review_placement: "both" lets each direction of the scan read them first, "front" the
            forward one alone; "none".
        branch_mix: "gated" weighs the branches by learned weights of each token, at first 1 for
            the windows and 0 for the scan, so that a fresh layer is its windowed attention; "sum"
            adds them, as LinGen does.
        d_conv: taps of the scan's convolution.
        share_bc, share_dt, average: of the scan, as for `linfusion.BiMamba2`.
        chunk_size: of the scan; changes time and rounding only. None is what `ssd_scan` takes.

    Raises:
        ValueError: a value that is out of range.
    """

    window: tuple[int, int, int] = (8, 4, 4)
    shift_mode: str = "pad"
    scan_orders: tuple[str, ...] = ORDERS
    review_pool: tuple[int, int, int] = (2, 2, 2)
    review_placement: str = "both"
    branch_mix: str = "gated"
    d_conv: int = 4
    share_bc: bool = True
    share_dt: bool = False
    average: bool = False
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "review_pool"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != 3 or not _positive(*value):
                raise ValueError(f"{name}: got {value!r}, expected three positive whole numbers")
            object.__setattr__(self, name, tuple(value))
        orders = self.scan_orders
        if not isinstance(orders, list | tuple):
            raise ValueError(f"scan_orders: got {orders!r}, expected several permutations of 'thw'")
        object.__setattr__(self, "scan_orders", tuple(orders))
        try:
            RotaryMajorScan(self.scan_orders)
        except (TypeError, ValueError) as error:
            raise ValueError(f"scan_{error}") from None
        outside_of(self.window, False, self.shift_mode)
        for name, accepted in (("review_placement", PLACEMENTS), ("branch_mix", MIXES)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {accepted}")
        if not _positive(self.d_conv):
            raise ValueError(f"d_conv: got {self.d_conv!r}, expected a positive whole number")
        if self.chunk_size is not None and not (
            _positive(self.chunk_size) and self.chunk_size <= 256
        ):
            raise ValueError(
                f"chunk_size: got {self.chunk_size!r}, expected 1 to 256 tokens, or None"
            )
        for name in ("share_bc", "share_dt", "average"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")


class Mixer(nn.Module):
    """What hangs on a layer as `attn.mate`: the scan, and the weights of the two branches.

    The windowed attention has no weights of its own: it is computed with the projections and norms
    of the layer.

    Args:
        width: channels of the tokens.
        heads: of the layer.
        setting: fields of a `Mixture`, and of the layer "layer", its place among all, which gives
            the order of the scan and whether windows are moved, "qk_norm" and "qk_norm_eps".

    Raises:
        ValueError: a field there is not, or is missing.
    """

    def __init__(self, width: int, heads: int, setting: Mapping[str, Any]) -> None:
        super().__init__()
        names = {field.name for field in fields(Mixture)}
        if not isinstance(setting, Mapping) or set(setting) - names != set(_OF_LAYER):
            raise ValueError(
                f"mixture: got {setting!r}, expected {', '.join(_OF_LAYER)} and some of"
                f" {sorted(names)} by name"
            )
        own = {name: value for name, value in setting.items() if name in names}
        self.mixture = mixture = Mixture(**own)
        self.order = RotaryMajorScan(mixture.scan_orders).for_layer(setting["layer"])
        self.outside = outside_of(mixture.window, setting["layer"] % 2 == 1, mixture.shift_mode)
        self.ma = BiMamba2.like_attention(
            width,
            heads,
            qk_norm=setting["qk_norm"],
            qk_norm_eps=setting["qk_norm_eps"],
            d_conv=mixture.d_conv,
            chunk_size=mixture.chunk_size,
            share_bc=mixture.share_bc,
            share_dt=mixture.share_dt,
            average=mixture.average,
        )
        self.mix = None
        if mixture.branch_mix == "gated":
            self.mix = nn.Linear(width, 2)
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor, te: Tensor, grid: Grid) -> Tensor:
        """y = s_te·TE(x) + s_ma·MA(x)  (LinGen, section 3; the weights are LinMU's).

        s_te = 2σ(W x), s_ma = tanh(W' x), or 1 without weights.

        Args:
            x: what came into the layer, [B, T·H·W, C], frame by frame, row by row.
            te: the windowed attention after its output projection, [B, T·H·W, C].
            grid: (T, H, W), a `LocalGrid` where others have further rows.

        Returns:
            [B, T·H·W, C].
        """
        video = unflatten(x, grid, "thw")
        review = None
        if self.mixture.review_placement != "none":
            review = pool(video, self.mixture.review_pool)
        ma = self._scanned(video, review, getattr(grid, "shard", None)).flatten(1, 3)
        if self.mix is None:
            return te + ma
        to_ma, to_te = self.mix(x).split(1, -1)
        return te * (2 * to_te.sigmoid()) + ma * to_ma.tanh()

    def _scanned(self, video: Tensor, review: Tensor | None, shard: Any) -> Tensor:
        """The scan of [B, T, H, W, C] in this layer's order, after the review tokens if any."""
        first = self.mixture.review_placement == "both"
        if shard is not None:
            rows = self.mixture.review_pool[1]
            out: Tensor = shard.scan(self.ma, video, self.order, review, rows, lead_first=first)[0]
            return out
        sequence, lead = flatten(video, self.order), 0
        if review is not None:
            front = flatten(review, self.order)
            sequence, lead = torch.cat([front, sequence], 1), front.shape[1]
        scanned = self.ma(sequence, lead=lead, lead_first=first)
        frames, height, width = video.shape[1:4]
        return unflatten(scanned, (frames, height, width), self.order)


class MATEProcessor(Processor):
    """Attention processor of diffusers for the self-attention of Wan, SANA-Video and CogVideoX.

    Two branches that are mixed: softmax attention inside windows of the video, with the layer's own
    projections, norms and rotary embedding (TESA), and a bidirectional Mamba-2 over all of it, in
    which C, B and x are queries, keys and values before the rotary embedding (`attn.mate`). Cost
    and memory are linear in the tokens.

    In CogVideoX, whose text is in the same sequence, a window also sees all of the text, and a text
    token sees all text and video tokens; the scan is over the video alone.

    It has no state: one instance serves every layer. The grid comes with the arguments, from hooks
    that `linfusion.linearize` puts on the model.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
        video_grid: Grid | None = None,
    ) -> Any:
        """Attend.

        Args:
            attn: the layer.
            hidden_states: tokens of the video [B, T·H·W, C].
            encoder_hidden_states: tokens of the text [B, L, C], for CogVideoX alone.
            attention_mask: must be None.
            rotary_emb: `VideoRotary`, for Wan and SANA-Video.
            image_rotary_emb: (cos, sin) of the video's tokens or None, for CogVideoX.
            video_grid: (T, H, W), for CogVideoX.

        Returns:
            Tokens of the video, and for CogVideoX those of the text.

        Raises:
            ValueError: something that this attention cannot honour; the message names it.
        """
        child = getattr(attn, NAME, None)
        grid = video_grid or getattr(rotary_emb, "grid", None)
        if child is None or grid is None:
            missing = "its scan" if child is None else "the grid of its tokens"
            raise ValueError(
                f"attn: MATEProcessor misses {missing} on this layer; use"
                ' linfusion.linearize(model, "mate"), which gives both'
            )
        self.refuse_mask(
            attention_mask,
            "MATE's scan cannot leave tokens out, so there can be no mask over the video",
        )
        self.refuse_context_parallelism()
        shard = getattr(grid, "shard", None)
        joint = video_grid is not None
        if joint != (encoder_hidden_states is not None):
            got = "none" if encoder_hidden_states is None else "some"
            raise ValueError(
                f"encoder_hidden_states: got {got}; there have to be some where text and video"
                " attend to one another, as in CogVideoX, and nowhere else"
            )
        x = hidden_states
        if x.shape[1] != math.prod(grid):
            raise ValueError(
                f"hidden_states: got {x.shape[1]} tokens, expected {math.prod(grid)} of the grid"
                f" {grid}"
            )
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        tokens = x if encoder_hidden_states is None else torch.cat([encoder_hidden_states, x], 1)
        q, k, v = _projected(attn, child, tokens)
        rotary = image_rotary_emb if joint else rotary_emb
        if rotary is not None:
            cos, sin = (t[:, None] if joint else t for t in rotary)
            q, k = (_rotated(t, cos, sin, text) for t in (q, k))

        own = [t[:, text:].unflatten(1, grid) for t in (q, k, v)]
        seen = attend_windows(
            own[0],
            own[1],
            own[2],
            child.mixture.window,
            child.outside,
            context=(k[:, :text], v[:, :text]) if text else None,
            backend=self._attention_backend,
            shard=shard,
        ).flatten(1, 3)
        out = attn.to_out[1](child(x, _projected_out(attn, seen), grid))
        if not joint:
            return out
        if shard is None:
            text_out = self.softmax(q[:, :text], k, v)
        else:
            context = k[:, :text], v[:, :text]
            text_out = shard.softmax(q[:, :text], context, (k[:, text:], v[:, text:]))
        text_out = _projected_out(attn, text_out)
        return out, attn.to_out[1](text_out)


def _projected(attn: Any, child: Mixer, tokens: Tensor) -> list[Tensor]:
    """q, k, v [B, N, H, D], normed as the layer norms them."""
    across = (child.ma.qk_norm or "").endswith("across_heads")
    found = []
    for linear, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)):
        x = linear(tokens)
        x = normed(norm, x) if across else x
        x = x.unflatten(-1, (attn.heads, -1))
        found.append(x if across else normed(norm, x))
    return found


def _projected_out(attn: Any, x: Tensor) -> Tensor:
    """[B, N, H, D] -> [B, N, C], without the dropout."""
    out: Tensor = attn.to_out[0](x.flatten(2))
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, text: int) -> Tensor:
    """x [B, text + N, H, D] with neighbouring channels of all but the text turned.

    They are turned as complex numbers. cos, sin: [..., N, 1, D], in which neighbours are equal.
    """
    real, imaginary = x[:, text:].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    parts = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    turned = torch.stack(parts, -1).flatten(-2).to(x.dtype)
    return torch.cat([x[:, :text], turned], 1) if text else turned


def _positive(*values: object) -> bool:
    return all(type(value) is int and value >= 1 for value in values)
