"""What a call of a host knows, and what it meets: threads, errors, compilers, copies."""

from __future__ import annotations

import copy
import pickle
import threading

import diffusers
import pytest
import torch

import linfusion
from linfusion.attention.hosts.layout import CALL
from linfusion.layers.record import record_of
from tests.hosts.images import IMAGES, flux_like
from tests.hosts.oracle import windowed
from tests.hosts.tiny import Random, build, ids, outputs
from tests.hosts.videos import VIDEOS, video

ROWS = IMAGES | VIDEOS
FLUX2, WAN, COG = (
    "Flux2Transformer2DModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
)


def linear(name, **options):
    model = build(name, ROWS[name])
    return linfusion.linearize(model, "hybrid", **{"window": 2, "cell": 2, **options})


def arguments(name, seed=0):
    return ROWS[name].inputs(Random(seed))


def test_threads_that_call_at_different_sizes_do_not_meet():
    model = linear(WAN)
    calls = [video(Random(i), grid=(3, 2 * h, 2 * w)) for i, (h, w) in enumerate([(4, 6), (6, 4)])]
    alone = [outputs(model, call) for call in calls]
    wrong = []

    def run(i):
        for _ in range(3):
            if not torch.equal(outputs(model, calls[i]), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_after_an_error_no_layout_is_left():
    model, call = linear(WAN), arguments(WAN)
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outputs(model, call)
    assert CALL.layout is None and CALL.layer is None and CALL.around == []
    handle.remove()
    with pytest.raises(ValueError, match="hidden_states"):
        model(timestep=call["timestep"])
    assert CALL.layout is None and CALL.around == []
    assert outputs(model, call).isfinite().all()


@pytest.mark.parametrize("name", [WAN, COG])  # one that dispatches, one that does not
def test_what_checkpointing_computes_again_has_the_layout_it_had(name):
    model = linear(name).train()
    other = arguments(name, 1)
    other["hidden_states"] = other["hidden_states"].transpose(-1, -2).contiguous()

    def gradients():
        model.zero_grad()
        loss = model(**arguments(name)).sample.square().mean()
        with torch.no_grad():
            model(**other)  # a call of another size between forward and backward
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.enable_gradient_checkpointing()  # after linearize
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    linfusion.restore(model)
    assert "linfusion" not in repr(model._gradient_checkpointing_func)


@pytest.mark.parametrize("name", [WAN, COG])  # one that dispatches, one that does not
def test_a_block_compiles_in_one_graph_and_follows_the_grid(name):
    model = linear(name)
    first = arguments(name)
    second = arguments(name, 1)
    second["hidden_states"] = second["hidden_states"].transpose(-1, -2).contiguous()
    expected = [outputs(model, first), outputs(model, second)]
    torch._dynamo.reset()
    blocks = model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks
    blocks[0].compile(backend="aot_eager", fullgraph=True)
    for call, eager in zip((first, second, first), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(outputs(model, call), eager, atol=1e-5, rtol=0)


def test_a_copy_and_a_pickle_have_windows_of_their_own():
    model, call = linear(FLUX2), arguments(FLUX2)
    expected = outputs(model, call)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    linfusion.restore(model)
    assert not torch.equal(outputs(model, call), expected)
    for other in (copied, loaded):
        assert torch.equal(outputs(other, call), expected)
        assert torch.equal(outputs(linfusion.restore(other), call), outputs(model, call))


def test_pictures_to_look_at_are_seen_whole():
    row = IMAGES[FLUX2]
    model = build(FLUX2, row)

    def call():
        r = Random(0)
        more = {"guidance": torch.tensor([1.0])}
        found = flux_like(r, axes=4, **more)
        found["hidden_states"] = r(1, 24 + 6, 4)
        found["img_ids"] = torch.cat([ids(4, 6, 4), ids(2, 3, 4, picture=10)])
        return found

    linfusion.linearize(model, "clear", radius=2.3)
    got, paths = outputs(model, call()), list(record_of(model).layers)
    linfusion.restore(model)
    two = type(row)(row.config, row.inputs, grids=((4, 6), (2, 3)))
    with windowed(model, paths, two, 2.3):
        torch.testing.assert_close(outputs(model, call()), got, atol=1e-5, rtol=0)


def test_samples_of_different_size_in_one_batch():
    name = "ZImageTransformer2DModel"
    model = linfusion.linearize(build(name, IMAGES[name]), "clear", radius=2.3)
    r = Random(0)
    x, text = [r(16, 1, 8, 12), r(16, 1, 6, 4)], [r(5, 16), r(3, 16)]
    with torch.no_grad():
        both = model(x, torch.tensor([0.3, 0.3]), text).sample
        alone = [
            model([a], torch.tensor([0.3]), [b]).sample[0] for a, b in zip(x, text, strict=True)
        ]
    for got, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_a_chosen_backend_is_that_of_queries_that_are_no_pixels():
    model, call = linear(FLUX2), arguments(FLUX2)
    expected = outputs(model, call)
    for attn in (model.transformer_blocks[0].attn, model.single_transformer_blocks[0].attn):
        attn.set_attention_backend("_native_math")
    torch.testing.assert_close(outputs(model, call), expected, atol=1e-5, rtol=0)
    assert type(model.transformer_blocks[0].attn.processor._chosen_backend).__name__ in (
        "AttentionBackendName",
        "str",
    )


def test_a_fused_projection_computes_the_same():
    model, call = linear(FLUX2), arguments(FLUX2)
    expected = outputs(model, call)
    model.fuse_qkv_projections()
    torch.testing.assert_close(outputs(model, call), expected, atol=1e-5, rtol=0)


def test_moving_one_latent_moves_keys_of_the_taken_layers_alone():
    seen = {}

    def watch(model, name, call):
        """Which keys every layer attends to; by the attention that diffusers ends in."""
        found, inside, softmax = {}, [], torch.nn.functional.scaled_dot_product_attention

        def attention(query, key, *args, **kwargs):
            found.setdefault(inside[-1], key.clone())
            return softmax(query, key, *args, **kwargs)

        handles = []
        for path, module in model.named_modules():
            if getattr(module, "processor", None) is not None:
                handles += [
                    module.register_forward_pre_hook(lambda *_, p=path: inside.append(p)),
                    module.register_forward_hook(lambda *_: inside.pop() and None),
                ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
            outputs(model, call)
        for handle in handles:
            handle.remove()
        return found

    for name in (
        "HunyuanVideoTransformer3DModel",
        "HunyuanImageTransformer2DModel",
        "Flux3Transformer2DModel",
        "Krea2Transformer2DModel",
        "LTX2VideoTransformer3DModel",
        "ZImageTransformer2DModel",
    ):
        row = ROWS[name]
        model, call = build(name, row), row.inputs(Random(0))
        taken = set(record_of(linfusion.linearize(model, "clear", radius=2)).layers)
        linfusion.restore(model)
        before = watch(model, name, call)
        moved = call[row.moved][0] if isinstance(call[row.moved], list) else call[row.moved]
        moved.flatten()[:1].add_(1.0)
        after = watch(model, name, call)
        still = {p for p in before if torch.equal(before[p], after[p])}
        assert taken and not taken & still, name
        seen[name] = still
    assert all(seen[name] for name in seen if name != "LTX2VideoTransformer3DModel")


@pytest.mark.parametrize("name", [FLUX2, COG])
def test_an_offloaded_model_computes_the_same(name):
    from accelerate import cpu_offload

    model, call = linear(name, features="hedgehog", maps=True), arguments(name)
    expected = outputs(model, call)
    cpu_offload(model, "cpu")
    assert torch.equal(outputs(model, call), expected)
    linfusion.restore(model)
    linfusion.linearize(model, "hybrid", window=2, cell=2)
    assert outputs(model, call).isfinite().all()


def test_a_processor_that_does_not_reach_the_attention_is_an_error():
    model, call = linear(WAN), arguments(WAN)

    def elsewhere(q, k, v, **_):  # as a kernel that is called past diffusers' dispatch
        return v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            diffusers.models.transformers.transformer_wan, "dispatch_attention_fn", elsewhere
        )
        with pytest.raises(ValueError, match="attention backend: WanAttnProcessor did not reach"):
            outputs(model, call)
    assert CALL.layer is None


@pytest.mark.parametrize("more", [{"is_causal": True}, {"dropout_p": 0.1}], ids=str)
def test_a_causal_call_and_a_dropout_are_refused(more):
    model, call = linear(WAN), arguments(WAN)
    home = diffusers.models.transformers.transformer_wan
    dispatch = home.dispatch_attention_fn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "dispatch_attention_fn", lambda *a, **k: dispatch(*a, **{**k, **more}))
        with pytest.raises(ValueError, match=r"(is_causal|dropout_p): got"):
            outputs(model, call)
