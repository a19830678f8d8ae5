"""Softmax attention in MATE's place: against a dense mask, and block by block."""

from __future__ import annotations

import pytest
import torch

from linfusion.models.softmax import SoftmaxAttention
from linfusion.models.stream import StreamState
from tests.models.test_lingen import clip, streamed, tiny


def attention(**options):
    torch.manual_seed(0)
    return SoftmaxAttention(16, 2, **{"qk_norm": True} | options).double()


def dense(layer, x, mask):
    """softmax(q kᵀ / √D) v over tokens that `mask` [N, N] lets through."""
    q, k, v = (
        project(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for project in (layer.to_q, layer.to_k, layer.to_v)
    )
    if layer.norm_q is not None:
        q, k = layer.norm_q(q), layer.norm_k(k)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return layer.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("blocks", [None, (5,), (3, 2), (1, 1, 3)])
@torch.no_grad()
def test_blocks_are_a_block_causal_mask(blocks, qk_norm):
    layer, x = attention(qk_norm=qk_norm), torch.randn(2, 5 * 6, 16).double()
    of_frame = torch.cat([torch.full((n,), i) for i, n in enumerate(blocks or (5,))])
    block = of_frame.repeat_interleave(6)
    expected = dense(layer, x, block[:, None] >= block)
    torch.testing.assert_close(layer(x, (5, 2, 3), blocks=blocks), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_softmax_twin_streams_with_keys_and_values_of_the_past():
    model = tiny(causal_blocks=True, self_attention="softmax")
    x, text = clip(9)
    once = model(x, 700.0, text).sample
    parts, state = streamed(model, x, 700.0, text, (3, 3, 3))
    assert (model(x[:, :, 6:], 700.0, text).sample - once[:, :, 6:]).abs().max() > 1e-2
    torch.testing.assert_close(parts, once, atol=1e-5, rtol=0)
    layer = state.read()[0]
    assert layer.halo.shape == (2, 9, 5, 3, 32) and layer.frames == 9
    loaded = StreamState()
    loaded.load_state_dict(state.state_dict())
    expected = model(x[:, :, :3], 5.0, text, state=state).sample
    assert torch.equal(model(x[:, :, :3], 5.0, text, state=loaded).sample, expected)


def test_a_softmax_twin_has_no_scan_and_trains():
    model = tiny(self_attention="softmax").train()
    assert not any(".ma." in name for name, _ in model.named_parameters())
    x, text = clip(frames=2)
    model(x, 5.0, text).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_state_without_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks: got None with a state"):
        attention()(torch.zeros(1, 6, 16).double(), (1, 2, 3), return_state=True)
