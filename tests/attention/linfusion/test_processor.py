"""The LinFusion layer: against the authors' numbers, and what it must refuse."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors import safe_open
from safetensors.torch import load_file

import linfusion.attention.linfusion.processor as module
from linfusion import LinFusionProcessor
from linfusion.attention import get_method
from linfusion.attention.linfusion.authors_names import from_numbered
from linfusion.attention.linfusion.feature_map import FeatureMap
from linfusion.attention.linfusion.fused import FusedLayer
from linfusion.attention.linfusion.processor import key_weight
from tests.student_files import GOLDEN

LAYERS = sorted(GOLDEN.glob("linfusion_layer_*.safetensors"))


def attention(dim=32, heads=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Attention(dim, heads=heads, dim_head=dim // heads, **kwargs).eval()


def linear(attn, child=None):
    attn.set_processor(LinFusionProcessor())
    if child is not None:
        attn.add_module("linfusion", child)
    return attn


def trained_map(dim, mid=None, seed=1):
    torch.manual_seed(seed)
    child = FeatureMap(dim, mid)
    for parameter in child.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return child


def golden_layer(path):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    dim, heads = int(meta["dim"]), int(meta["heads"])
    mid = json.loads(meta["projection_mid_dim"].replace("None", "null"))
    attn = linear(attention(dim, heads), FeatureMap(dim, mid))
    attn.load_state_dict(
        {
            from_numbered(name.removeprefix("weights.")): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith("weights.")
        }
    )
    return attn, tensors["input"].float(), tensors["output"].float()


@pytest.mark.parametrize("path", LAYERS, ids=lambda p: p.stem)
def test_a_layer_equals_the_authors_layer(path):
    attn, x, expected = golden_layer(path)
    with torch.no_grad():
        # Softmax with the same weights is off by 1e-2 and more.
        torch.testing.assert_close(attn(x), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("path", LAYERS, ids=lambda p: p.stem)
def test_a_fused_layer_equals_the_authors_layer(path):
    attn, x, expected = golden_layer(path)
    attn.add_module("linfusion_fused", FusedLayer(attn, attn.linfusion, torch.float32))
    with torch.no_grad():
        torch.testing.assert_close(attn(x), expected, atol=2e-5, rtol=0)


def test_there_are_golden_layers():
    assert len(LAYERS) == 3


@pytest.mark.parametrize("mid", [None, 4, 1])
def test_a_fresh_map_changes_nothing(mid):
    attn, x = linear(attention()), torch.randn(2, 9, 32)
    with torch.no_grad():
        without = attn(x)
        attn.add_module("linfusion", FeatureMap(32, mid))
        assert torch.equal(attn(x), without)


def test_the_map_without_mlp_doubles_its_input():
    x = torch.randn(2, 5, 32)
    q, k = FeatureMap(32, -1)(x, x)
    assert torch.equal(q, 2 * x) and torch.equal(k, 2 * x)


@pytest.mark.parametrize("mid", [0, -2])
def test_a_hidden_width_that_cannot_be_is_refused(mid):
    with pytest.raises(ValueError, match=f"projection_mid_dim: got {mid}"):
        FeatureMap(32, mid)


def test_no_leaf_has_a_name_that_lora_targets():
    targets = {"to_q", "to_k", "to_v", "to_out", "0", "proj_in", "proj_out", "linear_1", "linear_2"}
    leaves = {name.rpartition(".")[2] for name, _ in FeatureMap(32).named_modules()}
    assert not leaves & targets


def test_the_map_does_not_write_into_its_input():
    x = torch.randn(2, 5, 32)
    before = x.clone()
    trained_map(32)(x, x)
    assert torch.equal(x, before)


def test_the_processor_is_stateless_and_needs_no_arguments():
    processor = LinFusionProcessor()
    assert not isinstance(processor, torch.nn.Module) and not vars(processor)
    assert (processor._attention_backend, processor._parallel_config) == (None, None)


def test_the_processor_names_every_argument():
    kinds = {p.kind for p in inspect.signature(LinFusionProcessor.__call__).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_one_processor_serves_layers_of_different_shapes():
    processor, outputs = LinFusionProcessor(), []
    for dim, heads in ((32, 4), (40, 1)):
        attn = attention(dim, heads)
        attn.set_processor(processor)
        outputs.append(attn(torch.randn(1, 6, dim)).shape)
    assert outputs == [(1, 6, 32), (1, 6, 40)]


@pytest.mark.parametrize("text_tokens", [1, 7])
def test_cross_attention_stays_softmax(text_tokens):
    attn = attention(cross_attention_dim=24)
    x, text = torch.randn(2, 9, 32), torch.randn(2, text_tokens, 24)
    expected = attn(x, text)
    torch.testing.assert_close(linear(attn)(x, text), expected, atol=1e-6, rtol=1e-5)


def test_cross_attention_honours_its_mask():
    attn, x, text = attention(cross_attention_dim=24), torch.randn(2, 9, 32), torch.randn(2, 7, 24)
    bias = torch.zeros(2, 1, 7)
    bias[..., 4:] = -10000.0
    torch.testing.assert_close(
        linear(attn)(x, text, attention_mask=bias), attn(x, text[:, :4]), atol=1e-5, rtol=1e-5
    )


def test_cross_attention_goes_through_the_backend_that_was_chosen():
    attn = linear(attention(cross_attention_dim=24))
    attn.processor._attention_backend = "no such backend"
    with pytest.raises(ValueError, match="no such backend"):
        attn(torch.randn(1, 4, 32), torch.randn(1, 7, 24))


def test_a_picture_of_four_axes_with_every_norm_keeps_its_shape():
    attn = attention(
        norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0, qk_norm="layer_norm"
    )
    x = torch.randn(2, 32, 3, 5)
    tokens = attn.group_norm(x).flatten(2).transpose(1, 2)
    linear(attn)
    got = attn(x)
    attn.group_norm, attn.residual_connection, attn.rescale_output_factor = None, False, 1.0
    expected = (attn(tokens).transpose(1, 2).reshape(x.shape) + x) / 2
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(2, 9), (2, 1, 9), (1, 1, 1, 9)])
def test_a_masked_key_is_as_good_as_absent(shape):
    attn, x = linear(attention(), trained_map(32)), torch.randn(2, 9, 32)
    keep = torch.ones(shape, dtype=torch.bool)
    keep[..., 6:] = False
    bias = torch.zeros(shape).masked_fill(~keep, -10000.0)
    expected = attn(x[:, :6])
    for mask in (keep, bias):
        torch.testing.assert_close(attn(x, attention_mask=mask)[:, :6], expected)


def test_a_bias_of_log_two_counts_a_key_twice():
    attn, x = linear(attention(), trained_map(32)), torch.randn(1, 5, 32)
    bias = torch.zeros(1, 1, 5)
    bias[..., 4] = torch.tensor(2.0).log()
    twice = attn(torch.cat([x, x[:, 4:]], 1))[:, :5]
    torch.testing.assert_close(attn(x, attention_mask=bias), twice)


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 4, 1, 9), (2, 8), (9,), (8, 1, 18)])
def test_a_mask_over_queries_or_of_another_length_is_refused(shape):
    attn, x = linear(attention()), torch.randn(2, 9, 32)
    with pytest.raises(ValueError, match="attention_mask: got"):
        attn(x, attention_mask=torch.zeros(shape))


def test_an_integer_mask_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask: got torch.int64"):
        key_weight(torch.ones(1, 4, dtype=torch.int64), 4)


def test_further_pixels_as_context_are_attended_to_linearly():
    attn = linear(attention(), trained_map(32))
    x, bank = torch.randn(2, 5, 32), torch.randn(2, 4, 32)
    both = torch.cat([x, bank], 1)
    torch.testing.assert_close(attn(x, both), attn(both)[:, :5])


def test_the_tuple_of_an_ip_adapter_is_refused():
    attn = linear(attention(cross_attention_dim=24))
    with pytest.raises(ValueError, match="encoder_hidden_states: got the tuple of an IP-Adapter"):
        attn(torch.randn(1, 4, 32), (torch.randn(1, 7, 24), [torch.randn(1, 1, 4, 24)]))


def test_context_parallelism_is_refused():
    attn = linear(attention())
    attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="_parallel_config: LinFusionProcessor"):
        attn(torch.randn(1, 4, 32))


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"added_kv_proj_dim": 24}, "second stream"),
        ({"kv_heads": 2}, "its keys have 16 channels"),
        ({"is_causal": True}, "it is causal"),
    ],
)
def test_a_layer_without_a_linear_form_is_refused(kwargs, reason):
    with pytest.raises(ValueError, match=f"cannot serve this layer: .*{reason}"):
        linear(attention(**kwargs))(torch.randn(1, 4, 32))


def test_a_keyword_the_processor_does_not_know_is_refused():
    attn = attention()
    with pytest.raises(TypeError, match="gate"):
        LinFusionProcessor()(attn, torch.randn(1, 4, 32), gate=2.0)


def test_an_undistilled_layer_warns_once(monkeypatch):
    monkeypatch.setattr(module, "_warned_undistilled", False)
    attn, x = linear(attention()), torch.randn(1, 4, 32)
    with pytest.warns(UserWarning, match="pictures will be wrong until"):
        attn(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn(x)


def test_the_last_part_of_a_pag_batch_attends_to_itself():
    with_guidance, without = get_method("linfusion").pag_processors()
    attn, x = linear(attention(), trained_map(32)), torch.randn(6, 5, 32)
    expected, alone = attn(x), attn.to_out[0](attn.to_v(x))
    for processor, straight in ((with_guidance, 4), (without, 3)):
        attn.set_processor(processor)
        got = attn(x)
        torch.testing.assert_close(got[:straight], expected[:straight])
        torch.testing.assert_close(got[straight:], alone[straight:])


def test_a_pag_batch_that_does_not_divide_is_refused():
    attn = attention()
    attn.set_processor(get_method("linfusion").pag_processors()[0])
    with pytest.raises(ValueError, match="3 equal parts"):
        attn(torch.randn(4, 5, 32))


def test_gradients_reach_the_map_and_the_projections():
    attn = linear(attention(), trained_map(32))
    attn(torch.randn(2, 5, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attn.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_float32(dtype):
    attn, x = linear(attention(), trained_map(32)), torch.randn(2, 50, 32)
    with torch.no_grad():
        expected = attn.to(dtype).float()(x.to(dtype).float())
        got = attn.to(dtype)(x.to(dtype))
        softmax = attention()(x)
    assert got.dtype == dtype
    error = (got.float() - expected).abs().max()
    assert error < 20 * torch.finfo(dtype).eps * expected.abs().max()
    assert (expected - softmax).abs().max() > 10 * error


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"method: 'quadratic' is not one of \[.*'linfusion'.*\]"):
        get_method("quadratic")


def test_the_processor_imports_without_diffusers():
    code = (
        "import sys, linfusion; linfusion.LinFusionProcessor(); print('diffusers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
