"""LinGen's transformer: whole, in blocks, saved, trained, and what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import linfusion
from linfusion.attention.mate import layer as mate
from linfusion.models import lingen_block
from linfusion.models.lingen import LinGenBlock, LinGenTransformer3DModel
from linfusion.models.stream import StreamState, split_blocks

BLOCK_TIME = {"causal_blocks": True, "time_positions": "block", "pos_embed_size": (8, 5, 4)}


def tiny(dtype=torch.float32, **options):
    """Four layers, every order of the scan, all weights random."""
    torch.manual_seed(0)
    options = {
        "in_channels": 3,
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "text_dims": (12,),
        "pos_embed_size": (48, 5, 4),
        "d_state": 4,
        "tesa_window": (4, 2, 3),
        "block_frames": 3,
    } | options
    model = LinGenTransformer3DModel(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def clip(frames=10, height=10, width=6, batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, frames, height, width, generator=g).to(dtype)
    return x, torch.randn(batch, 5, 12, generator=g).to(dtype)


def streamed(model, x, timestep, text, blocks):
    """Block by block at one noise level, each also read once with the state frozen."""
    state, parts = StreamState(), []
    for block in x.split(list(blocks), 2):
        with state.frozen():
            parts.append(model(block, timestep, text, state=state).sample)
        model.commit(block, text, state=state, timestep=timestep)
    return torch.cat(parts, 2), state


@pytest.mark.parametrize("placement", ["front", "both", "none"])
@pytest.mark.parametrize("frames, height, width", [(10, 10, 6), (9, 2, 2), (2, 6, 14), (1, 10, 8)])
@torch.no_grad()
def test_a_clip_in_blocks_is_the_clip_at_once(frames, height, width, placement):
    model = tiny(causal_blocks=True, review_placement=placement)
    x, text = clip(frames, height, width)
    once = model(x, 700.0, text).sample
    blocks = split_blocks(frames, 3)
    parts, state = streamed(model, x, 700.0, text, blocks)
    assert state.frames == frames
    if len(blocks) > 1:  # what the past is worth, far above the tolerance
        alone = model(x[:, :, -blocks[-1] :], 700.0, text).sample
        assert (alone - once[:, :, -blocks[-1] :]).abs().max() > 1e-2
    torch.testing.assert_close(parts, once, atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["one time", "a time for each frame"])
@pytest.mark.parametrize("tokens", [1, 70])
@torch.no_grad()
def test_how_many_tokens_go_together_does_not_matter(tokens, each, causal, monkeypatch):
    model = tiny(torch.float64, causal_blocks=causal)
    x, text = clip(dtype=torch.float64)
    time = torch.linspace(100.0, 900.0, 20).view(2, 10) if each else 700.0
    expected = model(x, time, text).sample
    monkeypatch.setattr(mate, "RUN", tokens)
    monkeypatch.setattr(lingen_block, "RUN", tokens)
    torch.testing.assert_close(model(x, time, text).sample, expected, atol=1e-11, rtol=1e-10)


@torch.no_grad()
def test_patches_in_time_stream_too():
    model = tiny(causal_blocks=True, patch_size=(2, 2, 2), block_frames=4)
    x, text = clip(frames=10)
    parts, _ = streamed(model, x, 700.0, text, (6, 4))
    torch.testing.assert_close(parts, model(x, 700.0, text).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_no_frame_sees_a_later_block():
    model = tiny(torch.float64, causal_blocks=True)
    x, text = clip(dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 4:7] += 1  # the second of the blocks 4, 3, 3
    moved = (model(changed, 5.0, text).sample - model(x, 5.0, text).sample).abs()
    moved = moved.amax((0, 1, 3, 4))
    assert not moved[:4].any() and (moved[4:] > 1e-9).all()


@torch.no_grad()
def test_one_block_is_the_model_without_blocks():
    whole, block = (tiny(torch.float64, causal_blocks=c, block_frames=10) for c in (False, True))
    x, text = clip(dtype=torch.float64)
    torch.testing.assert_close(
        block(x, 5.0, text).sample, whole(x, 5.0, text).sample, atol=1e-12, rtol=0
    )


def live_bytes(state):
    """Of the storages behind the state, views counted whole."""
    tensors = [t for layer in state.read() for t in layer if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def test_the_state_after_forty_blocks_is_that_after_four():
    model, state, sizes = tiny(causal_blocks=True, block_frames=1), StreamState(), []
    x, text = clip(frames=1)
    for _ in range(40):
        model.commit(x, text, state=state)
        sizes.append(live_bytes(state))
    assert state.frames == 40
    assert sizes[3] == sizes[39] == state.nbytes > 0


@torch.no_grad()
def test_reading_changes_nothing_and_writing_while_frozen_raises():
    model, state = tiny(causal_blocks=True), StreamState()
    x, text = clip(frames=3)
    model.commit(x, text, state=state)
    before = {name: t.clone() for name, t in state.state_dict().items()}
    with state.frozen():
        model(x, 500.0, text, state=state)
        for write in (
            lambda: model.commit(x, text, state=state),
            lambda: state.commit(state.read()),
            lambda: state.load_state_dict(before),
            lambda: state.to(dtype=torch.float64),
            state.reset,
        ):
            with pytest.raises(RuntimeError, match="the state is frozen"):
                write()
    after = state.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    state.reset()
    assert state.frames == state.nbytes == 0


@torch.no_grad()
def test_a_saved_state_goes_on_to_the_bit(tmp_path):
    model, state, loaded = tiny(causal_blocks=True), StreamState(), StreamState()
    x, text = clip(frames=3)
    model.commit(x, text, state=state)
    save_file(state.state_dict(), tmp_path / "state.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert (loaded.frames, loaded.nbytes) == (state.frames, state.nbytes)
    expected = model(x, 5.0, text, state=state).sample
    assert torch.equal(model(x, 5.0, text, state=loaded).sample, expected)


def test_a_state_that_does_not_fit_is_refused():
    state = StreamState()
    with pytest.raises(ValueError, match="state: misses frames"):
        state.load_state_dict({})
    with pytest.raises(ValueError, match=r"unexpected layers\.1\.ssm; it has 1 layers"):
        state.load_state_dict({"frames": torch.tensor([3, 1]), "layers.1.ssm": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"layers \[1\] miss tensors"):
        state.load_state_dict({"frames": torch.tensor([3, 2]), "layers.0.ssm": torch.zeros(1)})
    model = tiny(causal_blocks=True)
    x, text = clip(frames=3)
    model.commit(x, text, state=state)
    with pytest.raises(ValueError, match="state: of 4 layers, expected 2"):
        tiny(causal_blocks=True, num_layers=2)(x, 5.0, text, state=state)
    with pytest.raises(ValueError, match="layers: got 2, expected 4"):
        state.commit(state.read()[:2])


@torch.no_grad()
def test_a_half_precision_model_keeps_its_sums_in_float32():
    model, state = tiny(torch.bfloat16, causal_blocks=True), StreamState()
    x, text = clip(frames=3, dtype=torch.bfloat16)
    model.commit(x, text, state=state)
    assert model(x, 5.0, text, state=state).sample.dtype == torch.bfloat16
    state.to(dtype=torch.bfloat16)
    kinds = {name.split(".")[-1]: t.dtype for name, t in state.state_dict().items()}
    assert kinds.pop("ssm") == torch.float32 and kinds.pop("frames") == torch.int64
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize("frames, block, expected", [(11, 3, (5, 3, 3)), (9, 3, (3,) * 3)])
def test_the_first_block_takes_the_remainder(frames, block, expected):
    assert split_blocks(frames, block) == expected
    assert split_blocks(2, 3) == (2,)
    with pytest.raises(ValueError, match="block: got 0"):
        split_blocks(3, 0)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_every_parameter_alike_with_checkpointing(causal):
    model = tiny(torch.float64, causal_blocks=causal, branch_mix="gated").train()
    x, text = clip(frames=5, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(x, torch.tensor([3.0, 900.0]), text).sample.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients()
    assert [name for name, g in plain.items() if g is None or not g.any()] == []
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(), plain, atol=1e-12, rtol=1e-9)


def test_a_loss_on_a_block_trains_what_was_committed():
    model, state = tiny(causal_blocks=True), StreamState()
    x, text = clip(frames=6)
    history = x[:, :, :3].clone().requires_grad_()
    model.commit(history, text, state=state)
    model(x[:, :, 3:], 500.0, text, state=state).sample.square().mean().backward()
    assert history.grad.abs().amax((0, 1, 3, 4)).all()


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_a_saved_model_predicts_the_same_bits(tmp_path, causal):
    model = tiny(causal_blocks=causal)
    model.save_pretrained(tmp_path)
    loaded = LinGenTransformer3DModel.from_pretrained(tmp_path)
    x, text = clip(frames=4)
    expected = model(x, 5.0, text, return_dict=False)[0]
    assert torch.equal(loaded(x, 5.0, text).sample, expected)


@torch.no_grad()
def test_decays_and_steps_stay_in_float32_when_loaded_in_half(tmp_path):
    model = tiny(causal_blocks=True)
    model.save_pretrained(tmp_path)
    half = LinGenTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ma = half.transformer_blocks[0].mate.ma
    assert ma.A_log.dtype == ma.dt_bias_b.dtype == torch.float32
    assert ma.in_proj.weight.dtype == torch.bfloat16
    x, text = clip(frames=4)
    expected = model(x, 5.0, text).sample
    error = (half(x.bfloat16(), 5.0, text.bfloat16()).sample - expected).abs().max()
    assert 0 < error / expected.std() < 0.2


@torch.no_grad()
def test_a_fresh_model_predicts_nothing():
    model = LinGenTransformer3DModel(
        in_channels=3, num_layers=1, num_attention_heads=2, attention_head_dim=8, text_dims=(12,)
    )
    x, text = clip(frames=1)
    assert not model(x, 5.0, text).sample.any()


@torch.no_grad()
def test_frames_may_differ_in_noise():
    model = tiny(torch.float64)
    x, text = clip(frames=4, dtype=torch.float64)
    one = model(x, torch.tensor([3.0, 900.0]), text).sample
    each = torch.tensor([3.0, 900.0])[:, None].repeat(1, 4)
    torch.testing.assert_close(model(x, each, text).sample, one, atol=1e-12, rtol=0)
    each[0, 2] = 500
    assert (model(x, each, text).sample[0] - one[0]).abs().max() > 1e-3


@torch.no_grad()
def test_masked_text_is_not_seen():
    model = tiny(torch.float64, text_dims=(12, 7))
    x, text = clip(frames=2, dtype=torch.float64)
    other = torch.randn(2, 3, 7, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[:, 3:] = 0
    masked = model(x, 5.0, [text, other], [mask, None]).sample
    torch.testing.assert_close(
        masked, model(x, 5.0, [text[:, :3], other]).sample, atol=1e-12, rtol=0
    )
    assert (masked - model(x, 5.0, [text, other]).sample).abs().max() > 1e-4
    assert (masked - model(x, 5.0, [text[:, :3], other + 1]).sample).abs().max() > 1e-4


@torch.no_grad()
def test_positions_enter_the_norm_and_not_the_residual_stream():
    model = tiny()
    block: LinGenBlock = model.transformer_blocks[0]
    x, text = torch.randn(1, 12, 16), torch.randn(1, 5, 16)

    def out(positions, gate):
        modulation = torch.zeros(1, 1, 6, 16)
        modulation[:, :, [2, 5]] = gate - block.scale_shift_table[[2, 5]]
        return block(x, positions, modulation, text, None, (3, 2, 2), None, None)[0]

    positions = torch.randn(1, 12, 16)
    assert torch.equal(out(positions, 0.0), out(0 * positions, 0.0))
    assert (out(positions, 1.0) - out(0 * positions, 1.0)).abs().max() > 1e-2


@torch.no_grad()
def test_positions_are_absolute_and_interpolated_where_unseen():
    model = tiny(pos_embed_size=(4, 6, 4))
    table = model.pos_embed
    seen = table((4, 6, 4), 0, stretch=True)
    expected = table.t[:, None, None] + table.h[:, None] + table.w
    assert torch.equal(seen, expected.flatten(0, 2)[None])
    assert torch.equal(table((2, 6, 4), 2, stretch=False), seen[:, 48:])
    halved = table((4, 3, 4), 0, stretch=True).view(4, 3, 4, -1)
    torch.testing.assert_close(halved, expected.unflatten(1, (3, 2)).mean(2))
    assert table((9, 2, 11), 0, stretch=True).shape == (1, 198, 16)


@torch.no_grad()
def test_a_sampler_of_flow_matching_runs_it():
    model, scheduler = tiny(), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    x, text = clip(frames=2)
    start = x
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, text).sample, t, x).prev_sample
    assert x.isfinite().all() and (x - start).abs().max() > 0.1


@torch.no_grad()
def test_weights_may_be_stored_in_half_precision():
    model = tiny(causal_blocks=True)
    x, text = clip(frames=4)
    expected = model(x, 5.0, text).sample
    model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    conv = model.transformer_blocks[0].mate.ma.conv1d
    assert conv.weight.dtype == torch.bfloat16
    error = (model(x, 5.0, text).sample - expected).abs().max() / expected.std()
    assert 0 < error < 0.2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patch_size": (1, 2)}, r"patch_size: got \(1, 2\), expected three"),
        ({"pos_embed_size": (4, 0, 4)}, r"pos_embed_size: got \(4, 0, 4\), expected three"),
        ({"text_dims": ()}, "text_dims: got none"),
        ({"causal_blocks": True, "block_frames": 0}, "block_frames: got 0"),
        (
            {"causal_blocks": True, "bidirectional": "hydra", "d_conv": 7},
            "bidirectional: got 'hydra' with causal_blocks",
        ),
        ({"review_placement": "back"}, "review_placement: got 'back'"),
        ({"time_positions": "frame"}, "time_positions: got 'frame', expected one of"),
        ({"time_positions": "block"}, "time_positions: got 'block' without causal_blocks"),
        (BLOCK_TIME | {"pos_embed_size": (7, 5, 4)}, "pos_embed_size: got 7 rows in time.* 8"),
        ({"self_attention": "linear"}, "self_attention: got 'linear', expected one of"),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_a_bad_input_is_named():
    model = tiny()
    x, text = clip(frames=2)
    calls = [
        ((x[:, :2], 5.0, text), {}, r"hidden_states: expected \[B, 3, T, H, W\]"),
        ((x[..., :5], 5.0, text), {}, r"in multiples of \(1, 2, 2\)"),
        ((x, torch.zeros(3), text), {}, r"timestep: expected one number, \[2\] or \[2, 2\]"),
        ((x, 5.0, text[..., :3]), {}, r"encoder_hidden_states: expected \[2, M, 12\]"),
        ((x, 5.0, [text, text]), {}, "encoder_hidden_states: expected"),
        ((x, 5.0, text, torch.ones(2, 4)), {}, r"encoder_attention_mask: expected \[\(2, 5\)\]"),
        ((x, 5.0, text), {"state": StreamState()}, "state: got one without causal_blocks"),
        ((x, 5.0, text), {"commit": True}, "commit: got True without a state"),
    ]
    for args, options, message in calls:
        with pytest.raises(ValueError, match=message):
            model(*args, **options)


@torch.no_grad()
def test_a_stream_longer_than_the_positions_is_refused_before_it_starts():
    model, state = tiny(causal_blocks=True, pos_embed_size=(4, 5, 4)), StreamState()
    x, text = clip(frames=3)
    model.commit(x, text, state=state)
    with pytest.raises(ValueError, match="pos_embed_size: the model knows 4 frames"):
        model.commit(x, text, state=state)
    assert state.frames == 3


@pytest.mark.parametrize("frames", [9, 11])
@torch.no_grad()
def test_time_within_a_block_streams_past_the_table(frames):
    model = tiny(**BLOCK_TIME)
    x, text = clip(frames)
    parts, state = streamed(model, x, 700.0, text, split_blocks(frames, 3))
    assert state.frames == frames > model.config.pos_embed_size[0]
    torch.testing.assert_close(parts, model(x, 700.0, text).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_time_within_a_block_is_the_same_in_every_later_one():
    table = tiny(**BLOCK_TIME).pos_embed
    t = table.t[[0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7]]
    expected = (t[:, None, None] + table.h[:, None] + table.w).flatten(0, 2)[None]
    assert torch.equal(table((11, 5, 4), 0, False, blocks=(5, 3, 3)), expected)
    # the first block is told from the others, a short one begins as a long one does
    assert (table.t[5:] - table.t[:3]).abs().amax(1).min() > 0.1
    assert torch.equal(table((2, 5, 4), 600, False, (2,)), table((2, 5, 4), 3, False, (2,)))


@torch.no_grad()
def test_a_block_without_positions_is_refused_before_it_is_written():
    model, state = tiny(**BLOCK_TIME), StreamState()
    x, text = clip(frames=6)
    with pytest.raises(ValueError, match=r"got 6 frames of tokens in the first block.* at most 5"):
        model.commit(x, text, state=state)
    model.commit(x[:, :, :3], text, state=state)
    with pytest.raises(ValueError, match=r"got 4 frames of tokens in a later block.* at most 3"):
        model.commit(x[:, :, :4], text, state=state)
    assert state.frames == 3


def test_it_is_a_public_name():
    assert linfusion.LinGenTransformer3DModel is LinGenTransformer3DModel
    assert linfusion.MATE.__module__ == "linfusion.attention.mate.layer"


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_it_compiles_whole(causal):
    model = tiny(num_layers=2, causal_blocks=causal)
    x, text = clip(frames=4, height=4)
    whole = torch.compile(model, fullgraph=True, backend="eager")
    out = whole(x, torch.tensor([3.0, 900.0]), text, return_dict=False)[0]
    torch.testing.assert_close(out, model(x, torch.tensor([3.0, 900.0]), text).sample)


def test_a_noisy_step_keeps_no_state_and_a_clean_one_no_tokens():
    model = tiny(**BLOCK_TIME)
    kept = []
    for block in model.transformer_blocks:
        block.mate.register_forward_hook(lambda module, args, out: kept.append(out))
    state, x, text = StreamState(), torch.randn(1, 3, 3, 10, 6), torch.randn(1, 2, 12)
    with torch.no_grad():
        model(x, 500.0, text, state=state)
        assert all(isinstance(out, torch.Tensor) for out in kept)
        model.commit(x, text, state=state)
    for layer in state.read():
        for tensor in layer[1:]:
            assert tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_state_of_a_layer_is_cut_out_before_the_layers_behind_it_run():
    model = tiny(**BLOCK_TIME)
    first, held = [], []
    model.transformer_blocks[0].register_forward_hook(
        lambda module, args, out: first.append(weakref.ref(out[1].conv))
    )
    model.transformer_blocks[2].register_forward_pre_hook(
        lambda module, args: held.append(first[0]() is not None)
    )
    with torch.no_grad():
        model.commit(torch.randn(1, 3, 3, 10, 6), torch.randn(1, 2, 12), state=StreamState())
    # What the layer returned is a view of its tokens.
    assert held == [False]
