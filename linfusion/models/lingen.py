"""LinGen's text-to-video transformer (Wang et al. 2024, arXiv:2412.09856), in linear time.

The paper's weights are not published, nor are all of its sizes: what it does not say is a field of
the config. Its block-causal form carries a state of constant size from block to block, so that a
video has no length at which memory ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormSingle
from torch import Tensor, nn

from linfusion.attention.grids.local import SHARED
from linfusion.attention.mate.layer import MATE, LayerState
from linfusion.attention.mate.scan_orders import ORDERS
from linfusion.models.lingen_block import LinGenBlock, modulated
from linfusion.models.positions import Positions
from linfusion.models.softmax import SoftmaxAttention
from linfusion.models.stream import StreamState, owned, split_blocks


class LinGenTransformer3DModel(ModelMixin, ConfigMixin):
    """Diffusion transformer for video and pictures whose self-attention is MATE.

    With t of flow matching and ε the noise, x_t = (1 - t) x + t ε, it predicts v = ε - x.

    With `causal_blocks`, no frame sees a later block than its own (see `MATE`). A whole clip is cut
    into blocks by `split_blocks`; or it comes block by block, with a `StreamState` that is read in
    `forward` and written by `commit`. Both give the same.

    Args:
        in_channels: of the latents.
        out_channels: None is the same number.
        patch_size: (t, h, w) latents of a token.
        num_layers: blocks.
        num_attention_heads, attention_head_dim: of windowed and cross-attention; their product is
            the width C.
        text_dims: channels of each text encoder; their tokens come one after the other.
        mlp_ratio: inner channels of the feed-forward layer, of C.
        pos_embed_size: rows of the learned positions along (t, h, w), in tokens. Other heights and
            widths are interpolated, and longer clips, unless `causal_blocks`.
        d_state, d_conv, expand, ngroups, ssm_head_dim, bidirectional, chunk_size: of `BiMamba2`;
            ssm_head_dim None is attention_head_dim.
        scan_orders, review_pool, review_placement, review_memory, branch_mix: of `MATE`.
        tesa_window, tesa_shift_mode: of `TESA`.
        qk_norm: root-mean-square norm of queries and keys of every attention.
        causal_blocks: whether the video comes in blocks.
        block_frames: latent frames of a block; the first takes those left over.
        time_positions: "video" counts frames from the first one, "block" from the first one of a
            block, which needs `causal_blocks`: no frame of a stream then has a position that no
            training clip had. The first block has rows of its own, 2 · block_frames - 1 in front of
            the block_frames of every later one, and the order of blocks is known to the scan alone.
        self_attention: "mate", or "softmax" over the whole video for comparison, whose time grows
            with the square of the length and whose state with the length.

    Raises:
        ValueError: a value that is out of range; the message names it and what is accepted.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LinGenBlock"]  # noqa: RUF012
    _repeated_blocks = ["LinGenBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["A_log", "A_log_b", "dt_bias", "dt_bias_b", "D", "D_b"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = None,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        text_dims: tuple[int, ...] = (4096,),
        mlp_ratio: float = 4.0,
        pos_embed_size: tuple[int, int, int] = (256, 32, 32),
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        ngroups: int = 1,
        ssm_head_dim: int | None = None,
        bidirectional: str = "flip_sum",
        chunk_size: int | None = None,
        scan_orders: tuple[str, ...] = ORDERS,
        review_pool: tuple[int, int, int] = (2, 2, 2),
        review_placement: str = "both",
        review_memory: int = 2,
        branch_mix: str = "sum",
        tesa_window: tuple[int, int, int] = (8, 4, 4),
        tesa_shift_mode: str = "pad",
        qk_norm: bool = True,
        causal_blocks: bool = False,
        block_frames: int = 8,
        time_positions: str = "video",
        self_attention: str = "mate",
    ) -> None:
        super().__init__()
        for name, sizes in (("patch_size", patch_size), ("pos_embed_size", pos_embed_size)):
            if len(sizes) != 3 or any(type(n) is not int or n < 1 for n in sizes):
                raise ValueError(f"{name}: got {sizes!r}, expected three positive whole numbers")
        if not text_dims:
            raise ValueError("text_dims: got none, expected the channels of each text encoder")
        if causal_blocks and (block_frames < 1 or block_frames % patch_size[0]):
            raise ValueError(
                f"block_frames: got {block_frames}, expected a multiple of {patch_size[0]}"
            )
        if causal_blocks and bidirectional == "hydra":
            raise ValueError("bidirectional: got 'hydra' with causal_blocks, expected 'flip_sum'")
        for name, value, accepted in (
            ("time_positions", time_positions, ("video", "block")),
            ("self_attention", self_attention, ("mate", "softmax")),
        ):
            if value not in accepted:
                raise ValueError(f"{name}: got {value!r}, expected one of {accepted}")
        block = block_frames // patch_size[0] if time_positions == "block" else None
        if block is not None and not causal_blocks:
            raise ValueError("time_positions: got 'block' without causal_blocks, expected 'video'")
        out_channels = in_channels if out_channels is None else out_channels
        width = num_attention_heads * attention_head_dim
        volume = math.prod(patch_size)

        self.proj_in = nn.Linear(in_channels * volume, width)
        self.pos_embed = Positions(width, pos_embed_size, block)
        self.time_embed = AdaLayerNormSingle(width)
        self.text_proj = nn.ModuleList(nn.Linear(dim, width) for dim in text_dims)
        self.text_norm = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in text_dims)
        self.transformer_blocks = nn.ModuleList(
            LinGenBlock(
                width,
                num_attention_heads,
                mlp_ratio,
                qk_norm,
                SoftmaxAttention(width, num_attention_heads, qk_norm)
                if self_attention == "softmax"
                else MATE(
                    width,
                    num_attention_heads,
                    layer,
                    scan_orders=scan_orders,
                    review_pool=review_pool,
                    review_placement=review_placement,
                    review_memory=review_memory,
                    window=tesa_window,
                    shift_mode=tesa_shift_mode,
                    qk_norm=qk_norm,
                    d_state=d_state,
                    d_conv=d_conv,
                    expand=expand,
                    headdim=attention_head_dim if ssm_head_dim is None else ssm_head_dim,
                    ngroups=ngroups,
                    bidirectional=bidirectional,
                    chunk_size=chunk_size,
                    branch_mix=branch_mix,
                ),
            )
            for layer in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, out_channels * volume)
        # As DiT: a fresh model predicts nothing rather than noise.
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | Sequence[Tensor],
        encoder_attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        state: StreamState | None = None,
        commit: bool = False,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict v.

        Args:
            hidden_states: noisy latents [B, C, T, H, W]; a picture has T = 1.
            timestep: 1000 t: one number, [B], or [B, T / patch] where frames differ in noise.
            encoder_hidden_states: tokens of the text [B, M, D], one tensor for each encoder.
            encoder_attention_mask: [B, M] for each, 1 or True where there is a token.
            state: of the blocks before; hidden_states are then the next block. Needs
                `causal_blocks`.
            commit: write the state after this block. Without it, the state is only read.
            return_dict: whether to return an output object or a tuple.

        Returns:
            v [B, C, T, H, W] as `.sample` of the output, or alone in a tuple.

        Raises:
            ValueError: an argument does not fit the config or another argument.
            RuntimeError: `commit` while the state is frozen.
        """
        grid = self._grid(hidden_states)
        causal = self.config.causal_blocks
        if (state is not None and not causal) or (commit and state is None):
            raise ValueError(
                "state: got one without causal_blocks in the config"
                if state is not None
                else "commit: got True without a state"
            )
        past = () if state is None else state.read()
        start = 0 if state is None else state.frames
        blocks: tuple[int, ...] | None = None
        if causal:
            whole = split_blocks(grid[0], self.config.block_frames // self.config.patch_size[0])
            blocks = whole if state is None else (grid[0],)
        if past and len(past) != len(self.transformer_blocks):
            raise ValueError(
                f"state: of {len(past)} layers, expected {len(self.transformer_blocks)}"
            )

        x = self.proj_in(_patched(hidden_states, self.config.patch_size)).flatten(1, 3)
        positions = self.pos_embed(grid, start, stretch=not causal, blocks=blocks).to(x.dtype)
        shard = self.__dict__[SHARED].shard(grid) if SHARED in self.__dict__ else None
        if shard is not None:  # of several ranks, whose rows these are; states are whole on all
            x, positions, grid = shard.take(x), shard.take(positions), shard.local
            past = tuple(shard.take_state(layer) for layer in past)
        modulation, embedded = self._timed(timestep, x, grid[0])
        text, mask = self._text(encoder_hidden_states, encoder_attention_mask, x)

        after: list[LayerState] = []
        for i, block in enumerate(self.transformer_blocks):
            before = past[i] if past else None
            args = (x, positions, modulation, text, mask, grid, blocks, before, commit)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x, layer = self._gradient_checkpointing_func(block, *args)
            else:
                x, layer = block(*args)
            if commit:
                after.append(owned(layer))  # now, while what it is a view of is still needed
        if commit:
            assert state is not None
            state.commit(after if shard is None else [shard.join_state(layer) for layer in after])

        shift, scale = (self.scale_shift_table + embedded[:, :, None]).unbind(2)
        x = self.proj_out(modulated(self.norm_out(x), shift, scale))
        if shard is not None:
            x, grid = shard.join(x), shard.grid
        sample = _unpatched(x.unflatten(1, grid), self.config.patch_size)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def commit(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Sequence[Tensor],
        encoder_attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        *,
        state: StreamState,
        timestep: Tensor | float = 0.0,
    ) -> None:
        """Write a clean block into the state: one pass at `timestep`.

        Args:
            hidden_states: the block without noise, [B, C, T, H, W].
            encoder_hidden_states, encoder_attention_mask: as for `forward`.
            state: written to, once and at the end.
            timestep: 0, or the little noise that the history was trained with.

        Raises:
            ValueError, RuntimeError: as `forward`.
        """
        self(hidden_states, timestep, encoder_hidden_states, encoder_attention_mask, state, True)

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        patch, channels = self.config.patch_size, self.config.in_channels
        shape = tuple(latents.shape)
        fits = len(shape) == 5 and shape[1] == channels and min(shape) > 0
        if not fits or any(n % p for n, p in zip(shape[2:], patch, strict=True)):
            raise ValueError(
                f"hidden_states: expected [B, {channels}, T, H, W] in multiples of {tuple(patch)},"
                f" got {shape}"
            )
        frames, height, width = (n // p for n, p in zip(shape[2:], patch, strict=True))
        return frames, height, width

    def _timed(self, timestep: Tensor | float, x: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """[B, F, 6, C] and [B, F, C], F = 1 or the frames."""
        batch = x.shape[0]
        t = torch.as_tensor(timestep, device=x.device)
        if t.dim() == 0:
            t = t.expand(batch)
        if t.dim() == 1:
            t = t[:, None]
        if t.dim() != 2 or t.shape[0] != batch or t.shape[1] not in (1, frames):
            shape = tuple(torch.as_tensor(timestep).shape)
            raise ValueError(
                f"timestep: expected one number, [{batch}] or [{batch}, {frames}], got {shape}"
            )
        modulation, embedded = self.time_embed(t.flatten(), hidden_dtype=x.dtype)
        return modulation.view(*t.shape, 6, -1), embedded.view(*t.shape, -1)

    def _text(self, tokens: Any, masks: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, M, C] of all encoders, and a mask [B, M] or None for all."""
        dims = self.config.text_dims
        tokens = [tokens] if isinstance(tokens, Tensor) else list(tokens)
        masks = [masks] * len(tokens) if masks is None else masks
        masks = [masks] if isinstance(masks, Tensor) else list(masks)
        shapes = [tuple(t.shape) for t in tokens]
        if [s[-1] for s in shapes] != list(dims) or any(
            len(s) != 3 or s[0] != x.shape[0] for s in shapes
        ):
            expected = [f"[{x.shape[0]}, M, {dim}]" for dim in dims]
            raise ValueError(f"encoder_hidden_states: expected {', '.join(expected)}, got {shapes}")
        given = [None if m is None else tuple(m.shape) for m in masks]
        if len(given) != len(shapes) or any(
            m is not None and m != s[:2] for m, s in zip(given, shapes, strict=True)
        ):
            raise ValueError(
                f"encoder_attention_mask: expected {[s[:2] for s in shapes]}, got {given}"
            )
        projected = [
            norm(project(t.to(x.dtype)))
            for norm, project, t in zip(self.text_norm, self.text_proj, tokens, strict=True)
        ]
        if all(m is None for m in masks):
            return torch.cat(projected, 1), None
        whole = [
            torch.ones(t.shape[:2], dtype=torch.bool, device=x.device) if m is None else m.bool()
            for m, t in zip(masks, tokens, strict=True)
        ]
        return torch.cat(projected, 1), torch.cat(whole, 1)


def _patched(x: Tensor, patch: Sequence[int]) -> Tensor:
    """[B, C, T, H, W] -> [B, T', H', W', C·t·h·w]."""
    for axis, size in zip((2, 4, 6), patch, strict=True):
        x = x.unflatten(axis, (-1, size))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unpatched(x: Tensor, patch: Sequence[int]) -> Tensor:
    """What `_patched` undoes."""
    x = x.unflatten(4, (-1, *patch)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
