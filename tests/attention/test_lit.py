"""LiT's attention on DiT and PixArt: what it computes, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

import linfusion
from linfusion.attention.lit import CONVOLUTIONS, DepthwiseConv, LinearMixer, LiTProcessor
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from linfusion.students.saving import save
from linfusion.students.student import LinFusion
from tests.tiny import tiny_unet
from tests.tiny_dit import dit_inputs, forward, pixart_inputs, tiny_dit, tiny_pixart

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")


def layer(width=24, dtype=torch.float64, **form):
    """An attention layer of 4 softmax heads with a LiT form, all weights random."""
    torch.manual_seed(0)
    attn = Attention(width, heads=4, dim_head=width // 4, bias=True, processor=LiTProcessor())
    attn.lit = LinearMixer(width, form)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attn.to(dtype).eval()


def tokens(grid, width=24, batch=2, dtype=torch.float64):
    n = grid[0] * grid[1]
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def by_the_matrix(attn, x, grid, heads, eps_norm):
    """LiT with its N by N kernel matrix written out, and a convolution a head."""
    q, k, v = (p(x).unflatten(-1, (heads, -1)) for p in (attn.to_q, attn.to_k, attn.to_v))
    q, k = q.relu() + 1e-6, k.relu() + 1e-6
    a = torch.einsum("bnhd,bmhd->bhnm", q, k)
    out = torch.einsum("bhnm,bmhd->bnhd", a / (a.sum(-1, keepdim=True) + eps_norm), v)
    conv = attn.lit.dwc
    for head in range(heads):
        image = v[:, :, head].unflatten(1, grid).permute(0, 3, 1, 2)
        local = F.conv2d(image, conv.weight, conv.bias, padding=2, groups=conv.groups)
        out[:, :, head] += local.permute(0, 2, 3, 1).flatten(1, 2)
    return attn.to_out[0](out.flatten(2))


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_it_is_the_explicit_kernel_matrix(heads):
    grid = (5, 7)
    attn, x = layer(heads=heads), tokens(grid)
    out = attn(x, grid=grid)
    torch.testing.assert_close(
        out, by_the_matrix(attn, x, grid, heads, 35e-6), atol=1e-12, rtol=1e-12
    )


def test_a_head_of_576_channels_is_the_explicit_matrix_too():
    attn, x = layer(width=1152, heads=2), tokens((3, 5), width=1152, batch=1)
    out = attn(x, grid=(3, 5))
    torch.testing.assert_close(
        out, by_the_matrix(attn, x, (3, 5), 2, 15e-6), atol=1e-10, rtol=1e-12
    )


def test_a_shared_filter_is_the_full_one_with_its_weights_repeated():
    x = tokens((6, 4), dtype=torch.float32)
    shared, full = DepthwiseConv(8, 5, heads=3), DepthwiseConv(24, 5, heads=1)
    shared.reset_parameters()
    full.weight.data, full.bias.data = shared.weight.repeat(3, 1, 1, 1), shared.bias.repeat(3)
    assert torch.equal(shared(x, (6, 4)), full(x, (6, 4)))


def test_without_its_convolution_the_order_of_tokens_does_not_matter():
    attn, x = layer(conv=None), tokens((4, 6))
    order = torch.randperm(24)
    torch.testing.assert_close(attn(x[:, order]), attn(x)[:, order], atol=1e-13, rtol=1e-10)


def test_with_its_convolution_a_shift_inside_the_picture_is_a_shift_of_the_output():
    attn, grid = layer(), (12, 12)
    x = torch.zeros(1, *grid, 24, dtype=torch.float64)
    x[:, 5:7, 5:7] = tokens((2, 2), batch=1).unflatten(1, (2, 2))
    out, moved = (attn(t.flatten(1, 2), grid=grid).unflatten(1, grid) for t in (x, x.roll(1, 2)))
    inside = slice(2, 10)
    torch.testing.assert_close(moved[:, inside, 3:10], out[:, inside, 2:9], atol=1e-12, rtol=0)


def test_the_filter_reads_rows_and_columns_of_the_grid():
    attn, x = layer(), tokens((3, 8))
    assert not torch.allclose(attn(x, grid=(3, 8)), attn(x, grid=(8, 3)), atol=1e-2)


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_a_convolution_reads_what_its_name_says(conv):
    attn, x, grid = layer(conv=conv), tokens((4, 5)), (4, 5)
    read = x if conv == "input_full" else attn.to_v(x)
    filters = 12 if conv == "value_shared" else 24
    assert attn.lit.dwc.weight.shape == (filters, 1, 5, 5)
    local = attn.lit.dwc(read, grid)
    attn.lit.dwc = None
    plain = attn.lit(attn.to_q(x), attn.to_k(x), attn.to_v(x), x, None) + local
    torch.testing.assert_close(
        layer(conv=conv)(x, grid=grid), attn.to_out[0](plain), atol=1e-12, rtol=0
    )


def test_heads_change_the_output_but_no_projection():
    x, grid = tokens((4, 4)), (4, 4)
    two, four = layer(heads=2, conv=None), layer(heads=4, conv=None)
    shapes = [{n: p.shape for n, p in a.named_parameters() if ".lit" not in n} for a in (two, four)]
    assert shapes[0] == shapes[1]
    assert not torch.allclose(two(x, grid=grid), four(x, grid=grid), atol=1e-3)


def test_a_query_without_features_reads_nearly_the_weighted_mean():
    form = LinearMixer(8, {"heads": 1, "conv": None})
    k, v = torch.rand(2, 1, 9, 8, dtype=torch.float64)
    q = -torch.ones(1, 1, 8, dtype=torch.float64)
    features = (k + 1e-6).sum(-1, keepdim=True)
    s = features.mean()
    mean = (features * v).sum(1) / features.sum() * s / (s + 1)
    torch.testing.assert_close(form.mix(q, k, v)[:, 0], mean, atol=1e-12, rtol=0)


def test_centred_keys_do_not_see_a_common_offset():
    attn, x = layer(key_center=True), tokens((4, 4))
    before = attn(x, grid=(4, 4))
    attn.to_k.bias.data += 3
    torch.testing.assert_close(attn(x, grid=(4, 4)), before, atol=1e-12, rtol=0)


def test_normed_queries_and_keys_do_not_see_their_scale():
    attn, x = layer(qk_norm=True), tokens((4, 4))
    before = attn(x, grid=(4, 4))
    for parameter in (attn.to_q.weight, attn.to_q.bias):
        parameter.data *= 7
    torch.testing.assert_close(attn(x, grid=(4, 4)), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_finite_and_near(dtype):
    attn, grid = layer(dtype=torch.float32), (64, 128)
    x = tokens(grid, batch=1, dtype=torch.float32) * 200
    truth = attn(x, grid=grid)
    out = attn.to(dtype)(x.to(dtype), grid=grid).float()
    assert out.isfinite().all()
    assert (out - truth).norm() / truth.norm() < 3e-2


@pytest.mark.parametrize("normed", [False, True])
def test_sana_is_one_of_its_forms(normed):
    torch.manual_seed(0)
    attn = Attention(64, heads=8, dim_head=8, bias=False, out_bias=True, processor=LiTProcessor())
    if normed:
        from diffusers.models.normalization import RMSNorm

        attn.norm_q, attn.norm_k = RMSNorm(64, 1e-5, True), RMSNorm(64, 1e-5, True)
    attn.lit = LinearMixer(64, {"heads": 8, "conv": None, "normalizer": "sum"})
    x = torch.randn(2, 300, 64)
    ours = attn(x)
    attn.set_processor(SanaLinearAttnProcessor2_0())
    # The form of LiT differs by 0.05.
    torch.testing.assert_close(ours, attn(x), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "make, inputs", [(tiny_dit, dit_inputs), (tiny_pixart, pixart_inputs)], ids=["dit", "pixart"]
)
def test_restore_gives_back_the_same_bits(make, inputs):
    model = make()
    before, names = forward(model, inputs()), list(model.state_dict())
    linfusion.linearize(model, "lit", heads=2)
    linear = forward(model, inputs())
    assert not torch.allclose(linear, before, atol=1e-3)
    linfusion.restore(model)
    assert torch.equal(forward(model, inputs()), before)
    assert list(model.state_dict()) == names
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_only_self_attention_of_pixart_is_taken():
    model = linfusion.linearize(tiny_pixart(), "lit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*linearized without weights")
        forward(model, pixart_inputs())
    for name, processor in model.attn_processors.items():
        assert isinstance(processor, LiTProcessor) == (".attn1." in name)


def test_a_picture_that_is_not_square_has_its_own_grid():
    model = linfusion.linearize(tiny_pixart(), "lit")
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.lit.dwc.weight.normal_()
    seen = []
    hook = model.transformer_blocks[0].attn1.lit.register_forward_pre_hook(
        lambda module, args: seen.append(args[4])
    )
    forward(model, pixart_inputs(height=4, width=12))
    forward(model, pixart_inputs(height=12, width=4))
    hook.remove()
    assert seen == [(2, 6), (6, 2)]


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = linfusion.linearize(tiny_dit(), "lit")
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**dit_inputs()).sample.square().mean().backward()
        grads.append(model.transformer_blocks[0].attn1.lit.dwc.weight.grad)
    assert grads[0].any() and torch.equal(*grads)


def test_every_nth_layer_keeps_softmax():
    model = linfusion.linearize(tiny_dit(num_layers=6), "lit", softmax_every=3)
    linear = [isinstance(b.attn1.processor, LiTProcessor) for b in model.transformer_blocks]
    assert linear == [True, True, False] * 2
    forward(model, dit_inputs())


def test_auto_keeps_softmax_below_the_width_of_a_head():
    model = tiny_dit()  # width 24, 2 heads: break even at 12 tokens
    with pytest.raises(ValueError, match='layers: "auto" found no layer'):
        linfusion.linearize(model, "lit", layers="auto", size=48)  # 3 by 3 tokens
    linfusion.linearize(model, "lit", layers="auto", size=64)
    assert len(record_of(model).layers) == 3


def test_the_teacher_is_there_for_a_while():
    model = tiny_dit()
    before = forward(model, dit_inputs())
    linfusion.linearize(model, "lit")
    linear = forward(model, dit_inputs())
    with as_softmax(model):
        assert torch.equal(forward(model, dit_inputs()), before)
    assert torch.equal(forward(model, dit_inputs()), linear)


def trained(**options):
    """A linearized tiny DiT whose convolutions and projections are no longer the fresh ones."""
    model = linfusion.linearize(tiny_dit(), "lit", **options)
    torch.manual_seed(3)
    with torch.no_grad():
        for block in model.transformer_blocks:
            for parameter in block.attn1.parameters():
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("options", [{}, {"conv": "value_full", "qk_norm": True}, {"conv": None}])
def test_a_saved_student_computes_the_same_again(tmp_path, options):
    model = trained(heads=3, **options)
    save(model, tmp_path)
    again = linfusion.linearize(tiny_dit(), "lit", weights=tmp_path)
    assert torch.equal(forward(again, dit_inputs()), forward(model, dit_inputs()))
    assert LinFusion.from_pretrained(tmp_path).config["method"] == "lit"
    linfusion.restore(again)
    assert torch.equal(forward(again, dit_inputs()), forward(tiny_dit(), dit_inputs()))


@pytest.mark.filterwarnings("ignore:.*was saved with the projections")
def test_a_whole_saved_model_computes_the_same_again(tmp_path):
    model = trained(softmax_every=3)
    model.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    linfusion.linearize(again, "lit")
    assert torch.equal(forward(again, dit_inputs()), forward(model, dit_inputs()))


def test_fused_projections_are_said_and_undone():
    model = linfusion.linearize(tiny_pixart(), "lit")
    linear = forward(model, pixart_inputs())
    model.fuse_qkv_projections()
    with pytest.warns(UserWarning, match=r"run FusedAttnProcessor2_0.*linearize\(model, 'lit'\)"):
        forward(model, pixart_inputs())
    linfusion.linearize(model, "lit")
    assert torch.equal(forward(model, pixart_inputs()), linear)
    fused = tiny_pixart()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"model_or_pipe: .*fuse_qkv_projections"):
        linfusion.linearize(fused, "lit")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 5}, "heads: got 5, which does not divide the 24 channels"),
        ({"heads": 0}, "heads: got 0"),
        ({"heads": 2.0}, "heads: got 2.0"),
        ({"kernel_size": 4}, "kernel_size: got 4, expected an odd number"),
        ({"conv": "both"}, "conv: got 'both', expected one of"),
        ({"normalizer": "max"}, "normalizer: got 'max'"),
        ({"qk_norm": 1}, "qk_norm: got 1, expected True or False"),
        ({"radius": 8}, "radius: method 'lit' has no such option"),
        ({"softmax_every": 1}, "softmax_every: got 1, expected a whole number from 2 to 3"),
        ({"softmax_every": 4}, "softmax_every: got 4"),
    ],
)
def test_a_wrong_option_changes_nothing(options, message):
    model = tiny_dit()
    before = forward(model, dit_inputs())
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(model, "lit", **options)
    assert record_of(model) is None and torch.equal(forward(model, dit_inputs()), before)


def test_weights_do_not_bend_to_options(tmp_path):
    save(trained(heads=3), tmp_path)
    for options, message in (
        ({"heads": 2}, "heads: got 2, but transformer_blocks.0.attn1 of the weights has 3"),
        ({"softmax_every": 2}, "softmax_every: got 2, but the weights say"),
    ):
        with pytest.raises(ValueError, match=message):
            linfusion.linearize(tiny_dit(), "lit", weights=tmp_path, **options)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="model_or_pipe: UNet2DConditionModel has no self-att"):
        linfusion.linearize(tiny_unet(), "lit")


def test_a_mask_over_the_picture_is_refused():
    model = linfusion.linearize(tiny_pixart(), "lit")
    with pytest.raises(ValueError, match=r"attention_mask: got one of shape \(2, 1, 16\)"):
        forward(model, {**pixart_inputs(), "attention_mask": torch.ones(2, 16)})


def test_dit_is_refused_what_is_not_square():
    model = linfusion.linearize(tiny_dit(), "lit")
    inputs = {**dit_inputs(), "hidden_states": torch.randn(2, 4, 8, 32)}
    with pytest.raises(ValueError, match="hidden_states: got latents of 8 by 32"):
        forward(model, inputs)


def test_tokens_without_a_grid_are_an_error():
    attn, x = layer(), tokens((4, 4))
    for grid in (None, (4, 5)):
        with pytest.raises(ValueError, match=r"grid: got .* for 16 tokens"):
            attn(x, **({} if grid is None else {"grid": grid}))


def test_a_layer_without_its_form_is_an_error():
    attn = layer()
    del attn.lit
    with pytest.raises(ValueError, match="attn: LiTProcessor misses its form"):
        attn(tokens((4, 4)), grid=(4, 4))


def test_the_summary_knows_break_even_and_state():
    found = linfusion.summary(linfusion.linearize(tiny_dit(), "lit", heads=3))
    assert {x.break_even_tokens for x in found.layers} == {8}
    assert {x.state_bytes for x in found.layers} == {4 * 24 * 9}
