"""CLEAR's attention on FLUX and Stable Diffusion 3: what it computes, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open

import linfusion
from linfusion.attention.clear.processor import CLEARProcessor
from linfusion.attention.clear.window import Window
from linfusion.attention.grids.joint import grids_of
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from tests.dense import masked, window_mask
from tests.tiny_joint import (
    SD35,
    flux_inputs,
    forward,
    sd3_inputs,
    tiny_flux,
    tiny_flux_controlnet,
    tiny_sd3,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("clear_flux_*.safetensors"))


def golden(file):
    """The model, its inputs, the options of CLEAR, the authors' output, and its pooling weights."""
    with safe_open(file, framework="pt") as f:
        meta = f.metadata()
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    model = FluxTransformer2DModel(**json.loads(meta["config"])).eval()
    cut = len("model.")
    model.load_state_dict({k[cut:]: t for k, t in tensors.items() if k.startswith("model.")})
    options = {
        "radius": int(meta["window_size"]),
        "down_factor": int(meta["down_factor"]),
        "proportional": meta["proportional_attention"] == "True",
    }
    inputs = {k[3:]: t for k, t in tensors.items() if k.startswith("io.")}
    pool = {k[len("clear.") :]: t for k, t in tensors.items() if k.startswith("clear.")}
    return model, inputs, options, tensors["output_clear"], pool


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_the_authors_output_is_reached_to_rounding(file):
    model, inputs, options, expected, pool = golden(file)
    linfusion.linearize(model, "clear", **options)
    for name, weight in pool.items():
        path = name.removesuffix(".processor.spatial_weight")
        model.get_submodule(f"{path}.clear.pool").weight.data = weight.reshape(1, -1)
    # Softmax attention differs from it by 1e-2 and more.
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "size, text, radius, batch",
    [((8, 8), 6, 3, 1), ((5, 13), 1, 2.5, 2), ((1, 31), 40, 4, 1), ((7, 3), 3, 1, 2)],
)
def test_flux_is_softmax_under_a_dense_mask(size, text, radius, batch):
    model, inputs = tiny_flux(), flux_inputs(*size, text, batch)
    with masked(window_mask([size], radius, text)):
        expected = forward(model, inputs)
    assert (forward(model, inputs) - expected).abs().max() > 1e-2
    got = forward(linfusion.linearize(model, "clear", radius=radius), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, SD35], ids=["3", "3.5 medium"])
@pytest.mark.parametrize("size, text, radius", [((8, 8), 6, 3), ((5, 13), 3, 2.5)])
def test_stable_diffusion_3_is_softmax_under_a_dense_mask(changes, size, text, radius):
    model, inputs = tiny_sd3(**changes), sd3_inputs(*size, text, batch=2)
    joint = window_mask([size], radius, text, text_first=False)
    with masked(joint, window_mask([size], radius, 0)):
        expected = forward(model, inputs)
    assert (forward(model, inputs) - expected).abs().max() > 1e-2
    got = forward(linfusion.linearize(model, "clear", radius=radius), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[(6, 6), (6, 6)], [(4, 7), (5, 3)], [(4, 4), (3, 5), (2, 2)]])
def test_pictures_to_look_at_are_grids_that_all_others_see(sizes):
    # FLUX Kontext gives the pictures that come after its own the number 1, all of them.
    parts = [flux_inputs(h, w, seed=i) for i, (h, w) in enumerate(sizes)]
    for part in parts[1:]:
        part["img_ids"][:, 0] = 1
    inputs = parts[0] | {
        "hidden_states": torch.cat([p["hidden_states"] for p in parts], 1),
        "img_ids": torch.cat([p["img_ids"] for p in parts]),
    }
    model = tiny_flux()
    with masked(window_mask(sizes, 2.5, 6)):
        expected = forward(model, inputs)
    got = forward(linfusion.linearize(model, "clear", radius=2.5), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_a_controlnet_is_softmax_under_a_dense_mask():
    model = tiny_flux_controlnet()
    inputs = flux_inputs(6, 9) | {"controlnet_cond": torch.randn(1, 54, 16)}

    def samples():
        with torch.no_grad():
            out = model(**inputs)
        return torch.cat([*out.controlnet_block_samples, *out.controlnet_single_block_samples])

    with masked(window_mask([(6, 9)], 3, 6)):
        expected = samples()
    linfusion.linearize(model, "clear", radius=3)
    torch.testing.assert_close(samples(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("host", ["FLUX", "SD3"])
def test_residuals_of_a_controlnet_are_added_to_the_tokens_they_are_for(host):
    size, generator = (6, 11), torch.Generator().manual_seed(3)
    samples = [torch.randn(1, 66, 32, generator=generator) for _ in range(2)]
    if host == "FLUX":
        model, joint = tiny_flux(), window_mask([size], 3, 6)
        residuals = {"controlnet_block_samples": samples[:1]}
        residuals["controlnet_single_block_samples"] = samples
        inputs = flux_inputs(*size, **residuals)
    else:
        model, joint = tiny_sd3(), window_mask([size], 3, 6, text_first=False)
        inputs = sd3_inputs(*size, block_controlnet_hidden_states=samples)
    with masked(joint):
        expected = forward(model, inputs)
    got = forward(linfusion.linearize(model, "clear", radius=3), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("host", ["FLUX", "SD3"])
def test_the_order_of_tokens_inside_does_not_show(host):
    # With gradients tokens stay in raster order, without they go through in tiles.
    model = tiny_flux() if host == "FLUX" else tiny_sd3()
    inputs = (flux_inputs if host == "FLUX" else sd3_inputs)(11, 14, batch=2)
    linfusion.linearize(model, "clear", radius=3)
    tokens = []
    model.transformer_blocks[0].register_forward_hook(lambda m, a, out: tokens.append(out[1]))
    raster = model(**inputs).sample
    tiles = forward(model, inputs)
    torch.testing.assert_close(tiles, raster.detach(), atol=1e-5, rtol=0)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1


def test_schnell_has_no_guidance_and_needs_none():
    model = tiny_flux(guidance_embeds=False)
    inputs = flux_inputs(guidance=None)
    with masked(window_mask([(8, 8)], 3, 6)):
        expected = forward(model, inputs)
    got = forward(linfusion.linearize(model, "clear", radius=3), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("radius", [12, 1000])
@pytest.mark.parametrize("host", ["FLUX", "SD3", "SD3.5"])
def test_a_radius_larger_than_the_grid_is_full_attention(host, radius):
    model = tiny_flux() if host == "FLUX" else tiny_sd3(**(SD35 if host == "SD3.5" else {}))
    inputs = (flux_inputs if host == "FLUX" else sd3_inputs)(6, 9)
    expected = forward(model, inputs)
    got = forward(linfusion.linearize(model, "clear", radius=radius), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("host", ["FLUX", "SD3"])
def test_sizes_may_alternate(host):
    model = tiny_flux() if host == "FLUX" else tiny_sd3()
    inputs = flux_inputs if host == "FLUX" else sd3_inputs
    linfusion.linearize(model, "clear", radius=3)
    a, b = inputs(4, 16), inputs(16, 4)  # as many tokens
    first, other = forward(model, a), forward(model, b)
    assert torch.equal(forward(model, a), first)
    assert torch.equal(forward(model, b), other)


def test_pooling_by_the_whole_grid_adds_one_average_key():
    # One token that sees itself and, pooled by 2, the average of all four.
    child = linfusion.linearize(tiny_flux(), "clear", radius=1, down_factor=2)
    pool = child.transformer_blocks[0].attn.clear.pool
    x = torch.randn(2, 4, 2, 16)
    torch.testing.assert_close(pool(x, (2, 2)), x.mean(1, keepdim=True))


def test_pooling_weighs_every_place_of_a_cell_by_itself():
    model = linfusion.linearize(tiny_flux(), "clear", down_factor=2)
    pool = model.transformer_blocks[0].attn.clear.pool
    pool.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    x = torch.arange(24.0).reshape(1, 24, 1, 1)  # 4 by 6: the first cell is 0 1 / 6 7
    got = pool(x, (4, 6)).flatten()
    assert got[0] == 0 * 1 + 1 * 2 + 6 * 3 + 7 * 4
    assert got.shape == (6,) and got[5] == 16 * 1 + 17 * 2 + 22 * 3 + 23 * 4


def test_the_proportional_scale_is_that_of_the_paper():
    tokens, d = 16896, 128
    assert Window().scale(tokens, d) == d**-0.5
    local = math.sqrt(math.log(tokens) / math.log(4608) / d)
    assert Window(proportional=True).scale(tokens, d) == pytest.approx(local)
    pooled = math.sqrt(math.log(10 * tokens) / math.log(4608) / d)
    assert Window(proportional=True, down_factor=4).scale(tokens, d) == pytest.approx(pooled)
    own = math.sqrt(math.log(3 * tokens) / math.log(1024) / d)
    window = Window(proportional=True, reference_tokens=1024, length_factor=3)
    assert window.scale(tokens, d) == pytest.approx(own)


def test_ntk_stretches_the_rotary_base_and_leaves_it():
    model, inputs = tiny_flux(), flux_inputs(8, 8)
    model.pos_embed.theta = 100_000
    with masked(window_mask([(8, 8)], 3, 6)):
        expected = forward(model, inputs)
    model.pos_embed.theta = 10_000
    got = forward(linfusion.linearize(model, "clear", radius=3, ntk=10), inputs)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert model.pos_embed.theta == 10_000 and type(model.pos_embed.theta) is int


def test_ntk_is_undone_after_an_error():
    model = linfusion.linearize(tiny_flux(), "clear", ntk=10)
    model.pos_embed.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, flux_inputs())
    assert model.pos_embed.theta == 10_000


def test_the_teacher_inside_has_full_attention_and_its_own_rotary_base():
    model, inputs = tiny_flux(), flux_inputs()
    expected = forward(model, inputs)
    linfusion.linearize(model, "clear", radius=2, ntk=10)
    student = forward(model, inputs)
    with as_softmax(model):
        assert torch.equal(forward(model, inputs), expected)
    assert torch.equal(forward(model, inputs), student)


@pytest.mark.parametrize("host", ["FLUX", "SD3", "ControlNet"])
def test_what_checkpointing_computes_again_has_the_grid_it_had(host):
    make = {"FLUX": tiny_flux, "SD3": tiny_sd3, "ControlNet": tiny_flux_controlnet}[host]
    inputs = sd3_inputs if host == "SD3" else flux_inputs

    def gradients(checkpointing):
        model = linfusion.linearize(make(), "clear", radius=3).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        more = {"controlnet_cond": torch.ones(1, 64, 16)} if host == "ControlNet" else {}
        out = model(**inputs(4, 16), **more, return_dict=False)[0]
        out = out[0] if isinstance(out, list | tuple) else out
        model(**inputs(16, 4), **more)  # before the backward pass of the other size
        out.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {n: g for n, g in grads.items() if ".to_" in n}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys() and len(plain) > 5
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def test_one_processor_serves_every_layer_and_a_copy_of_the_model():
    model, inputs = linfusion.linearize(tiny_flux(), "clear", radius=3), flux_inputs()
    assert len({id(processor) for processor in model.attn_processors.values()}) == 1
    expected = forward(model, inputs)
    twin = copy.deepcopy(model)
    linfusion.restore(model)
    assert torch.equal(forward(twin, inputs), expected)


def test_layers_that_were_not_taken_stay_full_and_silent(caplog):
    model, inputs = tiny_sd3(**SD35), sd3_inputs()
    linfusion.linearize(model, "clear", radius=3, layers=r"blocks\.0\.attn$")
    forward(model, inputs)
    assert "will be ignored" not in caplog.text
    kinds = [type(p).__name__ for p in model.attn_processors.values()]
    assert kinds == ["CLEARProcessor", "JointAttnProcessor2_0", "JointAttnProcessor2_0"]
    linfusion.restore(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_blocks_compile_into_one_graph():
    model, inputs = linfusion.linearize(tiny_flux(), "clear", radius=3), flux_inputs()
    expected = forward(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(model, inputs), expected, atol=1e-5, rtol=0)


def test_half_precision_gives_finite_pictures():
    model = linfusion.linearize(tiny_flux().to(torch.bfloat16), "clear", radius=3, down_factor=2)
    inputs = {k: v if k.endswith("ids") else v.to(torch.bfloat16) for k, v in flux_inputs().items()}
    out = forward(model, inputs)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_a_fused_projection_is_computed_with():
    model, inputs = linfusion.linearize(tiny_flux(), "clear", radius=3), flux_inputs()
    expected = forward(model, inputs)
    model.fuse_qkv_projections()
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.weight.zero_()  # no longer what is computed with
    torch.testing.assert_close(forward(model, inputs), expected, atol=2e-5, rtol=0)


def test_replaced_processors_of_stable_diffusion_3_are_said_and_put_back():
    model, inputs = linfusion.linearize(tiny_sd3(), "clear", radius=3), sd3_inputs()
    expected = forward(model, inputs)
    model.fuse_qkv_projections()
    with pytest.warns(UserWarning, match=r"2 of 2 .* run FusedJointAttnProcessor2_0 instead"):
        forward(model, inputs)
    linfusion.linearize(model, "clear")
    assert torch.equal(forward(model, inputs), expected)


def test_a_model_without_a_student_says_so_once():
    model = linfusion.linearize(tiny_flux(), "clear", radius=3)
    with pytest.warns(UserWarning, match=r'"clear", weights="Huage001/CLEAR/clear_local_8'):
        forward(model, flux_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(model, flux_inputs())


def test_summary_knows_the_window():
    found = linfusion.summary(tiny_flux())
    assert found.method is None and len(found.layers) == 3
    model = linfusion.linearize(tiny_flux(), "clear", radius=8, down_factor=2)
    found = linfusion.summary(model)
    assert found.method == "clear" and found.parameters == 3 * 4 and found.state_bytes == 0
    # A disc of radius 8 has 193 places; with N/4 pooled tokens that is less than N from 258 on.
    assert {layer.break_even_tokens for layer in found.layers} == {258}
    assert "3 of 3" in str(found)


def test_auto_takes_nothing_where_the_window_is_as_large_as_the_picture():
    with pytest.raises(ValueError, match='layers: "auto" found no layer'):
        linfusion.linearize(tiny_flux(), "clear", radius=8, layers="auto", size=192)
    model = linfusion.linearize(tiny_flux(), "clear", radius=8, layers="auto", size=256)
    assert linfusion.summary(model).layers[0].linear  # 16 by 16 tokens, 193 in the disc


@pytest.mark.parametrize(
    "options, message",
    [
        ({"radius": 0}, "radius: got 0, expected a number above 0"),
        ({"radius": -3.5}, "radius: got -3.5"),
        ({"radius": math.inf}, "radius: got inf"),
        ({"radius": "8"}, "radius: got '8'"),
        ({"down_factor": 0}, "down_factor: got 0, expected 1"),
        ({"down_factor": 2.0}, "down_factor: got 2.0"),
        ({"proportional": 1}, "proportional: got 1, expected True or False"),
        ({"reference_tokens": 1}, "reference_tokens: got 1, expected a number above 1"),
        ({"ntk": 0}, "ntk: got 0"),
        ({"window": 8}, "window: method 'clear' has no such option; it has radius"),
        ({"projection_mid_dim": 4}, "projection_mid_dim: method 'clear' has no such option"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, message):
    model = tiny_flux()
    with pytest.raises(ValueError, match=message):
        linfusion.linearize(model, "clear", **options)
    assert type(model.transformer_blocks[0].attn.processor).__name__ == "FluxAttnProcessor"


def test_a_model_whose_grid_is_not_known_is_refused():
    with pytest.raises(ValueError, match="Identity is no host that 'clear' knows the grid"):
        linfusion.linearize(torch.nn.Identity(), "clear")


def test_a_rotary_factor_without_a_rotary_table_is_refused():
    model = tiny_sd3()
    with pytest.raises(ValueError, match=r"ntk: got 10.*no rotary embedding"):
        linfusion.linearize(model, "clear", ntk=10)
    assert record_of(model) is None
    assert not any(name.endswith(".clear") for name, _ in model.named_modules())


@pytest.mark.parametrize("host", ["FLUX", "SD3"])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": torch.ones(1)}, "joint_attention_kwargs: got attention_mask"),
        ({"ip_adapter_image_embeds": []}, "got ip_adapter_image_embeds; CLEAR has no processors"),
    ],
    ids=["mask", "IP-Adapter"],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(host, arguments, message):
    model = linfusion.linearize(tiny_flux() if host == "FLUX" else tiny_sd3(), "clear")
    inputs = flux_inputs if host == "FLUX" else sd3_inputs
    with pytest.raises(ValueError, match=message):
        forward(model, inputs(joint_attention_kwargs=arguments))


@pytest.mark.parametrize("host", ["FLUX", "SD3"])
def test_a_factor_that_does_not_divide_the_grid_is_refused(host):
    model = tiny_flux() if host == "FLUX" else tiny_sd3()
    linfusion.linearize(model, "clear", down_factor=4)
    inputs = flux_inputs if host == "FLUX" else sd3_inputs
    forward(model, inputs(8, 4))
    with pytest.raises(ValueError, match="down_factor: 4 does not divide the grid of 8 by 6"):
        forward(model, inputs(8, 6))


def test_ids_that_are_no_picture_are_refused():
    model = linfusion.linearize(tiny_flux(), "clear")
    inputs = flux_inputs(4, 4)
    shuffled = inputs["img_ids"][torch.tensor([1, 0, *range(2, 16)])]
    with pytest.raises(ValueError, match="img_ids: tokens 0 to 15 are no picture in raster order"):
        forward(model, inputs | {"img_ids": shuffled})
    with pytest.raises(ValueError, match=r"img_ids: they describe \(\(4, 4\),\), 16 tokens, but"):
        forward(model, inputs | {"hidden_states": torch.randn(1, 15, 16)})


def test_ids_may_be_batched_or_begin_elsewhere():
    inputs = flux_inputs(3, 5)
    assert grids_of(inputs["img_ids"] + 7)[0].sizes == ((3, 5),)
    model = linfusion.linearize(tiny_flux(), "clear", radius=2)
    batched = {name: inputs[name][None] for name in ("img_ids", "txt_ids")}
    assert torch.equal(forward(model, inputs | batched), forward(model, inputs))


@pytest.mark.parametrize("size", [(300, 2), (2, 300), (1, 40), (40, 1), (1, 1), (257, 259)])
def test_ids_that_bfloat16_rounded_are_read_and_made_exact(size):
    # Pipelines cast ids to the dtype of the model; above 256 that merges them in pairs.
    ids = flux_inputs(*size)["img_ids"]
    grids, exact = grids_of(ids.to(torch.bfloat16))
    assert grids.sizes == (size,)
    assert torch.equal(exact, ids)


def test_a_processor_without_a_window_says_what_to_do():
    model = tiny_flux()
    model.set_attn_processor(CLEARProcessor())
    with pytest.raises(ValueError, match=r'misses a window.*linearize\(model, "clear", radius=8\)'):
        forward(model, flux_inputs())
    linfusion.restore(linfusion.linearize(model, "clear"))


def test_a_layer_called_by_itself_misses_its_grid():
    attn = linfusion.linearize(tiny_flux(), "clear").single_transformer_blocks[0].attn
    with pytest.raises(ValueError, match="misses the grid of its tokens"):
        attn(torch.randn(1, 16, 32))


def test_context_parallelism_is_refused(monkeypatch):
    model = linfusion.linearize(tiny_flux(), "clear")
    monkeypatch.setattr(CLEARProcessor, "_parallel_config", object())
    with pytest.raises(ValueError, match="_parallel_config: CLEARProcessor does not run"):
        forward(model, flux_inputs())


def test_fuse_says_that_there_is_nothing_to_fuse():
    with pytest.raises(ValueError, match="method 'clear' has nothing to fuse"):
        linfusion.fuse(linfusion.linearize(tiny_flux(), "clear"))
