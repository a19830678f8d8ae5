"""MATE (Wang et al. 2024, LinGen, arXiv:2412.09856, section 3): self-attention in linear time.

A bidirectional Mamba-2 over the whole video, which reads pooled review tokens first, plus attention
inside small windows (TESA). It takes the place of self-attention in a diffusion transformer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linfusion.attention.mamba2.bidirectional import BiMamba2
from linfusion.attention.mamba2.causal import Mamba2State
from linfusion.attention.mate.scan_orders import ORDERS, RotaryMajorScan, flatten, unflatten
from linfusion.attention.mate.tesa import TESA

PLACEMENTS = ("front", "both", "none")
MIXES = ("sum", "gated")
RUN = 4096  # tokens at a time of what needs no state: 4 MB of 256 channels, for the caches


class LayerState(NamedTuple):
    """What a layer carries from block to block; its size does not grow with their number.

    Attributes:
        frames: how many came before.
        conv: tail of the convolution, [B, conv_dim, d_conv - 1].
        ssm: state of the forward scan, [B, H, P, N], float32.
        halo: input of the frames that the next block's windows began with, [B, F, H, W, C], fewer
            than t for a window of t.
        review: the last pooled frames, at most `review_memory`, [B, F, H', W', C].
    """

    frames: int
    conv: Tensor | None
    ssm: Tensor | None
    halo: Tensor | None
    review: Tensor | None


class MATE(nn.Module):
    """y = MA(x) + TE(x): bidirectional Mamba-2 with review tokens, and TESA.

    With `blocks`, the video comes in blocks of frames, and no token sees a later block than its
    own: the forward scan goes on from block to block, the backward one starts afresh in each, every
    block is scanned in the layer's order, its review tokens are pooled from itself and the last
    pooled frames before it, and TESA's windows reach back.

    Args:
        d_model: channels C.
        num_heads: of TESA; they divide C.
        layer_idx: place of the layer; it gives the order of the scan, and odd layers move windows.
        scan_orders: that layers take turns with, as for `RotaryMajorScan`.
        review_pool: (t, h, w) tokens averaged into a review token; (1, 3, 3) keeps time.
        review_placement: "both" lets each direction read them first, "front" puts them in front as
            in the paper's figure, so that the backward direction reads them last; "none".
        review_memory: pooled frames of earlier blocks that a block reads again.
        window, shift_mode, qk_norm: of `TESA`.
        d_state, d_conv, expand, headdim, ngroups, bidirectional, chunk_size: of `BiMamba2`; headdim
            None is that of TESA.
        branch_mix: "sum" as in the paper, or "gated" by learned weights of each token (LinMU, Wang
            2026, arXiv:2601.01322), 1 at first.
        use_ma, use_te: whether there is the branch.

    Raises:
        ValueError: a value that is out of range; the message names it and what is accepted.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        layer_idx: int = 0,
        *,
        scan_orders: Sequence[str] = ORDERS,
        review_pool: tuple[int, int, int] = (2, 2, 2),
        review_placement: str = "both",
        review_memory: int = 2,
        window: tuple[int, int, int] = (8, 4, 4),
        shift_mode: str = "pad",
        qk_norm: bool = True,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        bidirectional: str = "flip_sum",
        chunk_size: int | None = None,
        branch_mix: str = "sum",
        use_ma: bool = True,
        use_te: bool = True,
    ) -> None:
        super().__init__()
        if len(review_pool) != 3 or any(type(p) is not int or p < 1 for p in review_pool):
            raise ValueError(
                f"review_pool: got {review_pool!r}, expected three positive whole numbers"
            )
        if review_placement not in PLACEMENTS:
            raise ValueError(
                f"review_placement: got {review_placement!r}, expected one of {PLACEMENTS}"
            )
        if type(review_memory) is not int or review_memory < 0:
            raise ValueError(f"review_memory: got {review_memory!r}, expected 0 or more frames")
        if branch_mix not in MIXES:
            raise ValueError(f"branch_mix: got {branch_mix!r}, expected one of {MIXES}")
        if not (use_ma or use_te):
            raise ValueError("use_ma: got False with use_te False, expected one of them")
        self.order = RotaryMajorScan(tuple(scan_orders)).for_layer(layer_idx)
        self.review_pool, self.review_memory = review_pool, review_memory
        self.review_placement = review_placement
        self.te = (
            TESA(
                d_model,
                num_heads,
                window,
                shift=layer_idx % 2 == 1,
                shift_mode=shift_mode,
                qk_norm=qk_norm,
            )
            if use_te
            else None
        )
        self.ma = (
            BiMamba2(
                d_model,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                headdim=d_model // num_heads if headdim is None else headdim,
                ngroups=ngroups,
                bidirectional=bidirectional,
                chunk_size=chunk_size,
            )
            if use_ma
            else None
        )
        self.mix = None
        if branch_mix == "gated":
            self.mix = nn.Linear(d_model, 2)
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.mix.bias)

    def forward(
        self,
        x: Tensor,
        grid: tuple[int, int, int],
        *,
        blocks: Sequence[int] | None = None,
        past: LayerState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """Mix the tokens of a video.

        Args:
            x: [B, T·H·W, C], frame by frame, row by row.
            grid: (T, H, W), a `LocalGrid` where others have further rows.
            blocks: frames of each block, T in all. None: every token sees every other.
            past: of the blocks before; not written to.
            return_state: also return the state after the last block.

        Returns:
            [B, T·H·W, C], or that and the state.

        Raises:
            ValueError: grid or blocks do not fit x, there is a state without blocks, or blocks for
                "hydra", whose convolution sees what is to come.
        """
        if x.dim() != 3:
            raise ValueError(f"x: expected [B, T·H·W, C], got {tuple(x.shape)}")
        video = unflatten(x, grid, "thw")
        shard = getattr(grid, "shard", None)
        if blocks is None:
            if past is not None or return_state:
                raise ValueError("blocks: got None with a state, expected the frames of each block")
            ma = None
            if self.ma is not None:
                ma, _ = self._scanned(self.ma, video, self._pooled(video), None, shard)
            te = None if self.te is None else self.te(video, shard=shard)
            return self._mixed(video, ma, te)
        if self.ma is not None and self.ma.bidirectional == "hydra":
            raise ValueError("blocks: 'hydra' sees what is to come; expected None, or 'flip_sum'")
        if not blocks or min(blocks) < 1 or sum(blocks) != grid[0]:
            raise ValueError(f"blocks: got {tuple(blocks)}, expected {grid[0]} frames in all")
        state = past or LayerState(0, None, None, None, None)
        mixed = []
        for run, part in _runs(video, blocks):
            te, halo = None, None
            if self.te is not None:  # of several blocks at once: it needs no state but frames
                te = self.te(part, state.halo, state.frames, run, shard)
                seen = self.te.reach(state.frames + part.shape[1])
                halo = _last(state.halo, part, seen) if seen else part[:, :0]
            for i, block in enumerate(part.split(run, 1)):
                ma, state = self._scan_block(block, state, shard)
                mixed.append(self._mixed(block, ma, None if te is None else te.split(run, 1)[i]))
            state = state._replace(halo=halo)
        out = torch.cat(mixed, 1)
        return (out, state) if return_state else out

    def _scan_block(
        self, video: Tensor, past: LayerState, shard: Any
    ) -> tuple[Tensor | None, LayerState]:
        """MA of one block [B, T, H, W, C], and the state after it, with the halo from before."""
        frames, conv, ssm, _, review = past
        ma = None
        if self.ma is not None:
            pooled = self._pooled(video)
            seen = pooled
            if pooled is not None:
                seen = pooled if review is None else torch.cat([review.to(pooled), pooled], 1)
                review = _last(review, pooled, self.review_memory)
            before = None if conv is None or ssm is None else Mamba2State(conv, ssm)
            ma, after = self._scanned(self.ma, video, seen, before, shard, return_state=True)
            conv, ssm = after
        return ma, LayerState(frames + video.shape[1], conv, ssm, past.halo, review)

    def _pooled(self, video: Tensor) -> Tensor | None:
        return None if self.review_placement == "none" else pool(video, self.review_pool)

    def _scanned(
        self,
        layer: BiMamba2,
        video: Tensor,
        review: Tensor | None,
        past: Mamba2State | None,
        shard: Any,
        return_state: bool = False,
    ) -> tuple[Tensor, Any]:
        """The scan of review tokens and tokens in this layer's order: [B, T, H, W, C], a state."""
        first = self.review_placement == "both"
        if shard is not None:
            rows = self.review_pool[1]
            found: tuple[Tensor, Any] = shard.scan(
                layer, video, self.order, review, rows, lead_first=first, past=past
            )
            return found
        sequence, lead = flatten(video, self.order), 0
        if review is not None:
            front = flatten(review, self.order)
            sequence, lead = torch.cat([front, sequence], 1), front.shape[1]
        options: Any = {"lead": lead, "lead_first": first}
        state = None
        if return_state:
            ma, state = layer(sequence, past, True, **options)
        else:
            ma = layer(sequence, **options)
        frames, height, width = video.shape[1:4]
        return unflatten(ma, (frames, height, width), self.order), state

    def _mixed(self, video: Tensor, ma: Tensor | None, te: Tensor | None) -> Tensor:
        """[B, T·H·W, C]: ma and te [B, T, H, W, C]."""
        branches = [y for y in (ma, te) if y is not None]
        if self.mix is not None:
            weights = 2 * self.mix(video).sigmoid()
            shares = weights.split(1, -1)[0 if ma is not None else 1 :]
            branches = [y * share for y, share in zip(branches, shares, strict=False)]
        return sum(branches[1:], branches[0]).flatten(1, 3)


def _runs(video: Tensor, blocks: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    """Blocks in a row, RUN tokens or one block, as their sizes and their frames of the video."""
    run: list[int] = []
    start = 0
    for i, size in enumerate(blocks):
        run.append(size)
        frames = sum(run)
        if i + 1 == len(blocks) or frames * math.prod(video.shape[2:4]) * len(video) >= RUN:
            yield run, video[:, start : start + frames]
            run, start = [], start + frames


def pool(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Review tokens: [B, T, H, W, C] averaged over size (t, h, w), rounded up at the edges.

    What reaches over an edge is averaged over the tokens there are.
    """
    mean, dtype = x, torch.promote_types(x.dtype, torch.float32)
    for axis, k in enumerate(size, 1):  # of the means along one axis, the mean along the next
        whole, left = divmod(mean.shape[axis], k)
        parts = []
        if whole:
            parts.append(
                mean.narrow(axis, 0, whole * k)
                .unflatten(axis, (whole, k))
                .mean(axis + 1, dtype=dtype)
            )
        if left:
            parts.append(mean.narrow(axis, whole * k, left).mean(axis, keepdim=True, dtype=dtype))
        mean = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    return mean.to(x.dtype)


def _last(old: Tensor | None, new: Tensor, frames: int) -> Tensor | None:
    """The last frames of both in a row, or None for none."""
    if not frames:
        return None
    if old is None or new.shape[1] >= frames:
        return new[:, -frames:]
    return torch.cat([old.to(new.dtype), new], 1)[:, -frames:]
