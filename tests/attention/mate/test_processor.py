"""MATE in place of the self-attention of Wan, SANA-Video and CogVideoX."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig

import linfusion
from linfusion.attention.mamba2.inherit import inherit
from linfusion.attention.mate.processor import MATEProcessor, Mixture
from linfusion.layers.find import tokens_at
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from linfusion.students.saving import save
from tests.tiny import tiny_unet
from tests.tiny_video_hosts import TEXT, forward, inputs, tiny_cogvideox, tiny_sana, tiny_wan

HOSTS = {"wan": tiny_wan, "sana": tiny_sana, "cogvideox": tiny_cogvideox}
COVERING = {"window": (8, 8, 8)}
SMALL = {"window": (2, 2, 2)}
each_host = pytest.mark.parametrize("host", list(HOSTS))

pytestmark = pytest.mark.filterwarnings("ignore:.*is linearized without weights")


def made(host, **options):
    model = HOSTS[host]()
    return linfusion.linearize(model, "mate", **{**SMALL, **options})


def trained(model, seed=0):
    """The student with nothing left as conversion made it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in record_of(model).layers:
            for parameter in model.get_submodule(f"{path}.mate").parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return model


def self_attention(model):
    return {n: m for n, m in model.named_modules() if n.endswith("attn1")}


@each_host
@pytest.mark.parametrize("grid", [(5, 4, 3), (1, 7, 2)])
def test_a_window_as_large_as_the_video_is_softmax_over_all_of_it(host, grid):
    model = HOSTS[host]()
    if host == "sana":
        for attn in self_attention(model).values():
            attn.set_processor(WanAttnProcessor())  # its own has no softmax
    given = inputs(model, grid)
    expected = forward(model, given)
    if host == "sana":
        model = tiny_sana()
    linfusion.linearize(model, "mate", **COVERING)
    # Windows of 2 instead are farther away than 0.1.
    torch.testing.assert_close(forward(model, given), expected, atol=1e-5, rtol=0)
    linfusion.restore(model)
    linfusion.linearize(model, "mate", window=(1, 2, 1))
    assert (forward(model, given) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rotary_positional_embeddings": False},
        {"patch_size_t": 2, "patch_bias": False},
    ],
)
def test_every_cogvideox_has_its_grid(changes):
    model = tiny_cogvideox(**changes)
    given = inputs(model, (3, 4, 4))
    expected = forward(model, given)
    linfusion.linearize(model, "mate", **COVERING)
    torch.testing.assert_close(forward(model, given), expected, atol=1e-5, rtol=0)


def test_text_and_video_of_cogvideox_are_softmax_under_a_dense_mask():
    model, grid = tiny_cogvideox(), (4, 2, 6)
    window = torch.stack(
        torch.meshgrid(
            *(torch.arange(n) // w for n, w in zip(grid, (2, 1, 3), strict=True)), indexing="ij"
        ),
        -1,
    ).reshape(-1, 3)
    inside = (window[:, None] == window).all(-1)
    mask = torch.ones(TEXT + len(inside), TEXT + len(inside), dtype=torch.bool)
    mask[TEXT:, TEXT:] = inside
    attn = model.transformer_blocks[0].attn1  # whose windows are not moved
    given = inputs(model, grid)
    g = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, 48, 32, generator=g), torch.randn(2, TEXT, 32, generator=g)
    rotary = given["image_rotary_emb"]
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        # The host repeats a mask for its heads and takes it as a bias.
        expected = attn(x, text, image_rotary_emb=rotary, attention_mask=bias.expand(2, -1, -1))
        linfusion.linearize(model, "mate", window=(2, 1, 3))
        got = attn(x, text, image_rotary_emb=rotary, video_grid=grid)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@each_host
def test_restore_gives_back_the_same_bits(host):
    model = HOSTS[host]()
    given, weights = inputs(model), copy.deepcopy(model.state_dict())
    before, config = forward(model, given), dict(model.config)
    trained(linfusion.linearize(model, "mate", **SMALL))
    assert not torch.equal(forward(model, given), before)
    linfusion.restore(model)
    assert torch.equal(forward(model, given), before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert dict(model.config) == config
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


@each_host
@pytest.mark.parametrize("share_bc", [True, False])
def test_the_scan_starts_with_the_weights_of_its_attention(host, share_bc):
    model = made(host, share_bc=share_bc)
    for attn in self_attention(model).values():
        ma, width = attn.mate.ma, attn.to_q.in_features
        rows = ma.in_proj.weight.split([width] * 4 + [len(ma.in_proj.weight) - 4 * width])
        biases = ma.in_proj.bias.split([width] * 4 + [len(ma.in_proj.bias) - 4 * width])
        own = [attn.to_v, attn.to_k, attn.to_q]
        for linear, weight, bias in zip(own, rows[1:], biases[1:], strict=False):
            assert torch.equal(weight, linear.weight)
            assert torch.equal(bias, torch.zeros(width) if linear.bias is None else linear.bias)
        assert torch.equal(ma.out_proj.weight, attn.to_out[0].weight)
        assert torch.equal(ma.out_proj.bias, attn.to_out[0].bias)
        for ours, theirs in ((ma.norm_q, attn.norm_q), (ma.norm_k, attn.norm_k)):
            assert torch.equal(ours.weight, theirs.weight)
            assert ours.eps == theirs.eps
        assert not rows[0].any()
        if not share_bc:
            assert torch.equal(rows[4][ma.heads : ma.heads + width], attn.to_k.weight)
            assert torch.equal(rows[4][ma.heads + width :][:width], attn.to_q.weight)


def test_the_sum_of_both_branches_is_the_window_and_the_scan():
    model = tiny_wan()
    given, grid = inputs(model), (5, 4, 3)
    one = forward(linfusion.linearize(model, "mate", branch_mix="gated", **COVERING), given)
    linfusion.restore(model)
    two = forward(linfusion.linearize(model, "mate", branch_mix="sum", **COVERING), given)
    assert (one - two).abs().max() > 1e-4
    attn = model.blocks[0].attn1
    x = torch.randn(2, 60, 24, generator=torch.Generator().manual_seed(1))
    rotary = model.rope(given["hidden_states"])
    assert rotary.grid == grid
    with torch.no_grad():
        both = attn(x, None, None, rotary)
        attn.mate.ma.out_proj.weight.zero_()
        attn.mate.ma.out_proj.bias.zero_()
        window = attn(x, None, None, rotary)
        inherit(attn.mate.ma, attn)
        review = linfusion.attention.mate.layer.pool(x.view(2, 5, 4, 3, 24), (2, 2, 2)).flatten(
            1, 3
        )
        scan = attn.mate.ma(torch.cat([review, x], 1), lead=review.shape[1])
    torch.testing.assert_close(both, window + scan, atol=1e-5, rtol=0)


def test_layers_take_turns_with_their_order_and_their_windows():
    model = made("wan", scan_orders=("thw", "wht"), layers="blocks.1", window=(4, 2, 2))
    (path,) = record_of(model).layers
    mixer = model.get_submodule(path).mate
    assert (path, mixer.order, mixer.outside) == ("blocks.1.attn1", "wht", (2, 1, 1))


@each_host
def test_every_learned_parameter_gets_a_gradient_once_the_scan_counts(host):
    model = trained(made(host))
    model(**inputs(model))[0].square().sum().backward()
    for path in record_of(model).layers:
        for name, parameter in model.get_submodule(f"{path}.mate").named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), (path, name)


@each_host
def test_a_fresh_student_learns_how_much_the_scan_counts(host):
    model = made(host)
    model(**inputs(model))[0].square().sum().backward()
    for path in record_of(model).layers:
        assert model.get_submodule(f"{path}.mate.mix").weight.grad[0].any()


@each_host
def test_gradient_checkpointing_gives_the_same_gradients(host):
    model = trained(made(host)).train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        given = inputs(model)
        loss = model(**given)[0].square().mean()
        # Another size is seen before the backward computes the first again.
        if checkpointing:
            forward(model, inputs(model, (3, 2, 2)))
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4)


@each_host
def test_sizes_may_alternate(host):
    model = trained(made(host))
    small, large = inputs(model, (3, 2, 5)), inputs(model, (9, 3, 2))
    first = forward(model, small), forward(model, large)
    assert torch.equal(forward(model, small), first[0])
    assert torch.equal(forward(model, large), first[1])


@each_host
def test_a_saved_student_computes_the_same_again(host, tmp_path):
    model = trained(made(host, branch_mix="sum", review_placement="front", share_dt=True))
    given = inputs(model)
    expected = forward(model, given)
    save(model, tmp_path)
    again = linfusion.linearize(HOSTS[host](), weights=tmp_path)
    assert torch.equal(forward(again, given), expected)
    linfusion.restore(again)
    assert torch.equal(forward(again, given), forward(HOSTS[host](), given))


def test_the_projections_of_a_student_are_saved_with_it(tmp_path):
    model = made("wan")
    with torch.no_grad():
        model.blocks[1].attn1.to_q.weight += 0.1
    given = inputs(model)
    expected = forward(model, given)
    save(model, tmp_path)
    assert torch.equal(forward(linfusion.linearize(tiny_wan(), weights=tmp_path), given), expected)


@each_host
def test_a_whole_saved_model_computes_the_same_again(host, tmp_path):
    model = trained(made(host))
    given = inputs(model)
    expected = forward(model, given)
    model.save_pretrained(tmp_path)
    again = linfusion.linearize(type(model).from_pretrained(tmp_path))
    assert torch.equal(forward(again, given), expected)


def test_part_of_the_layers_keep_softmax_and_stay_silent(caplog):
    model = tiny_cogvideox()
    linfusion.linearize(model, "mate", layers=r"blocks\.[02]\.", **SMALL)
    with caplog.at_level(logging.WARNING):
        forward(model, inputs(model))
    kinds = [type(a.processor).__name__ for a in self_attention(model).values()]
    assert kinds == ["MATEProcessor", "CogVideoXAttnProcessor2_0", "MATEProcessor"]
    assert not caplog.records


def test_auto_counts_the_tokens_of_a_video():
    model = tiny_wan()
    assert tokens_at(model, "blocks.0.attn1", (5, 8, 6)) == 5 * 4 * 3
    assert tokens_at(tiny_cogvideox(patch_size_t=2), "", (6, 8, 6)) == 3 * 4 * 3
    with pytest.raises(ValueError, match=r"layers: .auto. found no layer"):
        linfusion.linearize(model, "mate", layers="auto", size=(1, 64, 64))
    linfusion.linearize(model, "mate", layers="auto", size=(81, 128, 128))
    assert len(record_of(model).layers) == 3


@pytest.mark.parametrize("size", [None, 64, (64, 64), (0, 64, 64)])
def test_auto_needs_frames_as_well(size):
    with pytest.raises(ValueError, match=r"size: got .* needs frames, and height and width"):
        linfusion.linearize(tiny_wan(), "mate", layers="auto", size=size)


def test_summary_knows_parameters_state_and_break_even():
    model = tiny_wan()
    before = linfusion.summary(model)
    assert [x.linear for x in before.layers] == [False] * 3
    found = linfusion.summary(linfusion.linearize(model, "mate"))
    layer = found.layers[0]
    own = sum(p.numel() for p in model.blocks[0].attn1.mate.parameters())
    assert (layer.linear, layer.channels, layer.heads, layer.parameters) == (True, 24, 2, own)
    assert layer.state_bytes == 2 * 4 * 2 * 12 * 12
    # 128 tokens of a window; 2.5·24 + 2·12 + 2·64 and an eighth of it for the review tokens.
    assert layer.break_even_tokens == 128 + 239
    assert found.method == "mate"


@each_host
def test_the_teacher_is_there_for_a_while(host):
    model = HOSTS[host]()
    given = inputs(model)
    expected = forward(model, given)
    trained(linfusion.linearize(model, "mate", **SMALL))
    student = forward(model, given)
    with as_softmax(model):
        assert torch.equal(forward(model, given), expected)
    assert torch.equal(forward(model, given), student)


def test_one_processor_serves_every_layer_and_a_copy_of_the_model():
    model = trained(made("wan"))
    assert len({id(a.processor) for a in self_attention(model).values()}) == 1
    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, inputs(twin)), forward(model, inputs(model)))
    linfusion.restore(twin)
    assert isinstance(model.blocks[0].attn1.processor, MATEProcessor)


@each_host
def test_half_precision_stays_finite_and_near(host):
    model = trained(made(host))
    expected = forward(model, inputs(model))
    model.to(torch.bfloat16)
    given = {
        name: x.to(torch.bfloat16) if name.endswith("states") else x
        for name, x in inputs(model).items()
    }
    out = forward(model, given).float()
    assert out.isfinite().all()
    assert (out - expected).norm() < 0.1 * expected.norm()


def test_a_lora_reaches_the_windows():
    model = made("wan")
    given = inputs(model)
    before = forward(model, given)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not [n for n, _ in model.named_parameters() if ".mate." in n and "lora" in n]
    assert (forward(model, given) - before).abs().max() > 1e-3


def test_a_lora_is_not_inherited_by_the_scan():
    model = tiny_wan()
    weight = model.blocks[0].attn1.to_v.weight.clone()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    linfusion.linearize(model, "mate", **SMALL)
    assert torch.equal(model.blocks[0].attn1.mate.ma.in_proj.weight[24:48], weight)


def test_a_fresh_student_says_so_once():
    model = made("wan")
    with pytest.warns(UserWarning, match=r"without weights.*linearize\(pipe, \"mate\", weights="):
        forward(model, inputs(model))
    model = trained(made("wan"))
    with pytest.warns() as found:
        forward(model, inputs(model))
        warnings.warn("the only one", UserWarning, stacklevel=1)
    assert [str(w.message) for w in found] == ["the only one"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"windows": 3}, "windows: method 'mate' has no such option; it has"),
        ({"window": 4}, "window: got 4, expected three positive whole numbers"),
        ({"window": (4, 0, 4)}, r"window: got \(4, 0, 4\), expected three positive whole numbers"),
        ({"review_pool": (2, 2)}, r"review_pool: got \(2, 2\), expected three positive"),
        ({"review_placement": "back"}, "review_placement: got 'back', expected one of"),
        ({"branch_mix": "max"}, "branch_mix: got 'max', expected one of"),
        ({"shift_mode": "wrap"}, "shift_mode: got 'wrap', expected one of"),
        ({"scan_orders": "thw"}, "scan_orders: got 'thw', expected several permutations"),
        ({"scan_orders": ("thh",)}, r"scan_orders: got \('thh',\), expected at least one"),
        ({"scan_orders": ()}, r"scan_orders: got \(\), expected at least one"),
        ({"d_conv": 0}, "d_conv: got 0, expected a positive whole number"),
        ({"chunk_size": 257}, "chunk_size: got 257, expected 1 to 256"),
        ({"average": 1}, "average: got 1, expected True or False"),
    ],
)
def test_a_wrong_option_changes_nothing(options, message):
    model = tiny_wan()
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(model, "mate", **options)
    assert record_of(model) is None
    assert not hasattr(model.blocks[0].attn1, "mate")


def test_weights_do_not_bend_to_options(tmp_path):
    save(made("wan"), tmp_path)
    with pytest.raises(ValueError, match=r"window: got \(4, 4, 4\), but blocks.0.attn1 of the wei"):
        linfusion.linearize(tiny_wan(), weights=tmp_path, window=(4, 4, 4))
    model = linfusion.linearize(tiny_wan(), weights=tmp_path, window=(2, 2, 2), chunk_size=16)
    assert model.blocks[0].attn1.mate.ma.chunk_size == 16


def test_a_student_of_another_host_is_refused(tmp_path):
    save(made("wan"), tmp_path)
    with pytest.raises(ValueError, match=r"weights: .*Missing: transformer_blocks.0.attn1"):
        linfusion.linearize(tiny_sana(), weights=tmp_path)
    with pytest.raises(ValueError, match=r"blocks.0.attn1 has 2 heads, the model 4"):
        linfusion.linearize(tiny_wan(num_attention_heads=4, attention_head_dim=6), weights=tmp_path)


def test_another_model_is_refused():
    with pytest.raises(
        ValueError, match="UNet2DConditionModel has no self-attention that MATE kno"
    ):
        linfusion.linearize(tiny_unet(), "mate")


def test_another_processor_is_refused():
    model = tiny_cogvideox()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="attn1 runs FusedCogVideoXAttnProcessor2_0, which MATE"):
        linfusion.linearize(model, "mate")


def test_a_norm_that_cannot_be_taken_over_is_refused():
    model = tiny_wan()
    model.blocks[1].attn1.norm_q = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"blocks.1.attn1 of attn: norms queries and keys with Ident"
    ):
        linfusion.linearize(model, "mate")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": torch.ones(1, 60)}, "attention_mask: got one of shape"),
        ({"encoder_hidden_states": torch.ones(1, 3, 24)}, "encoder_hidden_states: got some"),
        ({"hidden_states": torch.ones(1, 59, 24)}, r"hidden_states: got 59 tokens, expected 60"),
        ({"rotary_emb": None}, "attn: MATEProcessor misses the grid of its tokens"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(arguments, message):
    model = made("wan")
    usual = {
        "hidden_states": torch.ones(1, 60, 24),
        "rotary_emb": model.rope(inputs(model)["hidden_states"]),
    }
    with pytest.raises(ValueError, match=message):
        model.blocks[0].attn1(**{**usual, **arguments})


def test_arguments_of_attention_that_it_does_not_know_are_refused():
    model = made("cogvideox")
    with pytest.raises(ValueError, match="attention_kwargs: got temperature; MATE's attention"):
        forward(model, inputs(model, attention_kwargs={"temperature": 2}))


def test_a_layer_without_its_scan_is_an_error():
    model = tiny_wan()
    model.blocks[0].attn1.set_processor(MATEProcessor())
    with pytest.raises(ValueError, match="attn: MATEProcessor misses its scan on this layer"):
        forward(model, inputs(model))


def test_context_parallelism_is_refused(monkeypatch):
    monkeypatch.setattr(MATEProcessor, "_parallel_config", object())
    model = made("wan")
    with pytest.raises(ValueError, match="_parallel_config: MATEProcessor does not run under"):
        forward(model, inputs(model))


def test_a_mixture_is_the_same_from_json():
    assert Mixture(window=[8, 4, 4], scan_orders=["thw"]) == Mixture(scan_orders=("thw",))
