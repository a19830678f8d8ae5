"""The bidirectional forms of Mamba-2: what they compute, load, carry, inherit and refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from linfusion.attention.mamba2.bidirectional import BiMamba2
from linfusion.attention.mamba2.causal import Mamba2
from linfusion.attention.mamba2.inherit import from_attention
from linfusion.attention.mamba2.qk_norms import QK_NORMS
from tests.attention.mamba2.test_causal import causal, shaken, tokens


def both(bidirectional="flip_sum", **options):
    torch.manual_seed(0)
    taps = {"flip_sum": 4, "hydra": 7}[bidirectional]
    return shaken(
        BiMamba2(24, d_state=6, headdim=8, d_conv=taps, bidirectional=bidirectional, **options)
    )


def one_direction(layer, suffix=""):
    """The causal layer inside a "flip_sum" one, without gate, norm and output."""
    inner = Mamba2(24, d_state=6, headdim=8, rmsnorm=False).double()
    weights = layer.state_dict()
    state = {name: weights[name] for name in ("in_proj.weight", "out_proj.weight")}
    for name in ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"):
        head, dot, leaf = name.partition(".")
        state[name] = weights[f"{head}{suffix}{dot}{leaf}"]
    rows, heads = state["in_proj.weight"], layer.heads
    step = rows[-heads:] if suffix else rows[-2 * heads : -heads]
    state["in_proj.weight"] = torch.cat([rows[: -2 * heads], step])
    state["in_proj.weight"][:48] = 0  # an even gate, half of y on either side
    inner.load_state_dict(state)
    return inner


def scanned(inner, x):
    """y of a causal layer before gate and output."""
    found = []
    hook = inner.out_proj.register_forward_hook(lambda m, args, out: found.append(args[0]))
    inner.in_proj.bias = torch.nn.Parameter(torch.zeros(inner.in_proj.out_features).double())
    with torch.no_grad():
        inner.in_proj.bias[:48] = 1.2784645427610738  # silu of it is 1
    inner(x)
    hook.remove()
    return found[0]


def hydra_by_the_matrix(layer, x):
    """Strictly lower, strictly upper and diagonal part of each head, written out (Hydra)."""
    z, xbc, dt = layer.in_proj(x).split([48, layer.conv1d.in_channels, 2 * layer.heads], -1)
    xbc = F.conv1d(
        xbc.transpose(1, 2), layer.conv1d.weight, layer.conv1d.bias, padding=3, groups=72
    )
    x_, bf, cf, bb, cb = F.silu(xbc.transpose(1, 2)).split([48, 6, 6, 6, 6], -1)
    heads = x_.unflatten(-1, (6, 8))
    step = F.softplus(dt.unflatten(-1, (2, 6)) + layer.dt_bias)
    a = -layer.A_log.exp()
    y = heads * (layer.fc_D(x_) + layer.D)[..., None]
    for i in range(x.shape[1]):
        for j in range(x.shape[1]):
            if i == j:
                continue
            # The state that reaches i was last decayed one token before it.
            side, b, c = (0, bf, cf) if j < i else (1, bb, cb)
            at = i - 1 if j < i else i + 1
            between = range(j + 1, at + 1) if j < i else range(at, j)
            decay = (step[:, list(between), side].sum(1) * a).exp()
            score = (c[:, at] * b[:, j]).sum(-1)[:, None]
            y[:, i] += (score * decay * step[:, j, side])[..., None] * heads[:, j]
    return layer.out_proj(layer.norm(y.flatten(2), z))


def test_flip_sum_is_two_causal_layers():
    layer, x = both(), tokens(23)
    y = scanned(one_direction(layer), x) + scanned(one_direction(layer, "_b"), x.flip(1)).flip(1)
    z = layer.in_proj(x)[..., :48]
    expected = layer.out_proj(layer.norm(y, z))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-8)


def test_a_causal_checkpoint_loads_and_serves_both_directions():
    source, layer = causal(), both()
    layer.load_state_dict(source.state_dict())
    x = tokens(15)
    torch.testing.assert_close(layer(x.flip(1)).flip(1), layer(x), atol=1e-10, rtol=1e-8)
    assert torch.equal(layer.in_proj.weight[: -layer.heads], source.in_proj.weight)


def test_hydra_is_its_quasiseparable_matrix():
    layer, x = both("hydra"), tokens(11)
    torch.testing.assert_close(layer(x), hydra_by_the_matrix(layer, x), atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("bidirectional", ["flip_sum", "hydra"])
def test_leading_tokens_are_read_but_not_returned(bidirectional):
    layer, x = both(bidirectional), tokens(19)
    last = layer(x, lead=5, lead_first=False)
    torch.testing.assert_close(last, layer(x)[:, 5:], atol=1e-12, rtol=0)
    changed = x.clone()
    changed[:, :5] += 1
    assert ((layer(changed, lead=5) - layer(x, lead=5)).abs() > 1e-9).any(-1).all()


def test_the_forward_direction_carries_a_state_and_the_backward_one_starts_afresh():
    layer, x = both(), tokens(30)
    with torch.no_grad():
        layer.D_b.zero_()
        layer.conv1d_b.weight.zero_()  # silences the backward direction
        layer.conv1d_b.bias.zero_()
    whole, state = layer(x, return_state=True)
    first, middle = layer(x[:, :13], return_state=True)
    second, last = layer(x[:, 13:], middle, return_state=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(tuple(last), tuple(state), atol=1e-10, rtol=0)


def test_from_attention_starts_as_the_attention_without_its_softmax():
    torch.manual_seed(0)
    attn = Attention(24, heads=3, dim_head=8, bias=True).double()
    layer, x = from_attention(attn), tokens(17)
    q, k, v = (p(x).unflatten(-1, (3, 8)) for p in (attn.to_q, attn.to_k, attn.to_v))
    n = torch.arange(17)
    weight = 1e-3 * torch.exp(-1e-3 * (n[:, None] - n).abs()) * (1 + (n[:, None] == n).double())
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 * weight
    y = torch.einsum("bhij,bjhd->bihd", scores, v).flatten(2)
    torch.testing.assert_close(layer(x), attn.to_out[0](y), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    "bidirectional, options",
    [
        ("flip_sum", {}),
        ("flip_sum", {"share_bc": False, "share_dt": True, "qk_norm": "layer_norm_across_heads"}),
        ("hydra", {}),
    ],
)
def test_every_parameter_gets_a_gradient(bidirectional, options):
    layer = both(bidirectional, **options)
    layer(tokens(12), lead=3).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"headdim": 7}, "headdim: got 7, which does not divide 48 channels; 8 does"),
        ({"ngroups": 4}, "ngroups: got 4, which does not divide 6 heads"),
        ({"bidirectional": "both"}, "bidirectional: got 'both', expected one of"),
        ({"bidirectional": "hydra"}, "d_conv: got 4, expected an odd number"),
        ({"conv_act": "relu"}, "conv_act: got 'relu', expected 'silu' or None"),
        ({"d_state": 0}, "d_state: got 0, expected a positive whole number"),
        ({"qk_norm": "l2"}, "qk_norm: got 'l2', expected one of"),
        ({"share_bc": 1}, "share_bc: got 1, expected True or False"),
        (
            {"bidirectional": "hydra", "d_conv": 7, "average": True},
            "average: got True, expected False for 'hydra'",
        ),
    ],
)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        BiMamba2(24, **({"headdim": 8} | options))


def test_a_bad_input_is_named():
    layer = both()
    with pytest.raises(ValueError, match=r"u: expected \[B, L, 24\], got \(2, 5, 8\)"):
        layer(tokens(5, width=8))
    with pytest.raises(ValueError, match="lead: got 5, expected 0 to 4"):
        layer(tokens(5), lead=5)
    with pytest.raises(ValueError, match="state: 'hydra' has none"):
        both("hydra")(tokens(5), return_state=True)


def normed(kind):
    torch.manual_seed(0)
    attn = Attention(24, heads=3, kv_heads=3, dim_head=8, bias=True, qk_norm=kind, eps=1e-6)
    return shaken(attn)


@pytest.mark.parametrize("kind", QK_NORMS)
def test_from_attention_norms_queries_and_keys_as_the_attention_does(kind):
    attn, x = normed(kind), tokens(17)
    layer = from_attention(attn)
    q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    if kind.endswith("across_heads"):
        q, k = attn.norm_q(q), attn.norm_k(k)
    q, k, v = (t.unflatten(-1, (3, 8)) for t in (q, k, v))
    if not kind.endswith("across_heads"):
        q, k = attn.norm_q(q), attn.norm_k(k)
    n = torch.arange(17)
    weight = 1e-3 * torch.exp(-1e-3 * (n[:, None] - n).abs()) * (1 + (n[:, None] == n).double())
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5 * weight
    y = torch.einsum("bhij,bjhd->bihd", scores, v).flatten(2)
    expected = attn.to_out[0](y)
    # Float32 inside diffusers' norms; without ours the difference is 1e-3 and more.
    torch.testing.assert_close(layer(x), expected, atol=1e-8, rtol=1e-5)
    bare = from_attention(attn)
    bare.norm_q = bare.norm_k = None
    assert (bare(x) - expected).abs().max() > 1e-3


def test_a_norm_the_scan_has_no_place_for_is_refused():
    attn = normed("l2")
    with pytest.raises(ValueError, match="attn: norms queries and keys with LpNorm"):
        from_attention(attn)
    attn = normed("rms_norm")
    attn.norm_k.eps = 1e-3
    with pytest.raises(ValueError, match="attn: norm_q and norm_k differ"):
        from_attention(attn)


def test_average_halves_the_sum_of_the_directions():
    x, whole, half = tokens(13), both(), both(average=True)
    half.load_state_dict(whole.state_dict())
    for layer in (whole, half):
        layer.norm = None  # which would undo it
    with torch.no_grad():
        torch.testing.assert_close(half(x), whole(x) / 2, atol=1e-12, rtol=0)


def test_directions_share_what_they_are_told_to():
    sizes = {
        name: both(**options).in_proj.out_features
        for name, options in {
            "usual": {},
            "own_bc": {"share_bc": False},
            "one_dt": {"share_dt": True},
        }.items()
    }
    assert sizes["own_bc"] - sizes["usual"] == 2 * 6
    assert sizes["usual"] - sizes["one_dt"] == 6


@pytest.mark.parametrize("share_bc", [True, False])
@pytest.mark.parametrize("share_dt", [True, False])
def test_with_equal_rows_sharing_changes_nothing(share_bc, share_dt):
    torch.manual_seed(0)
    one = shaken(Mamba2(24, d_state=6, headdim=8, ngroups=2))
    x, outs = tokens(19), []
    for options in ({}, {"share_bc": share_bc, "share_dt": share_dt}):
        layer = BiMamba2(24, d_state=6, headdim=8, ngroups=2, **options).double()
        layer.load_state_dict(one.state_dict())
        outs.append(layer(x, lead=3))
    torch.testing.assert_close(*outs, atol=1e-12, rtol=0)


def test_the_backward_direction_has_its_own_keys_and_queries():
    layer, x = both(share_bc=False), tokens(9)
    before = layer(x)
    first = 48 + layer.conv1d.in_channels + layer.heads
    with torch.no_grad():
        layer.in_proj.weight[first : first + 12] += 0.1
        layer.D_b.zero_()
        layer.conv1d_b.weight.zero_()
        layer.conv1d_b.bias.zero_()
        silenced = layer(x)
        layer.in_proj.weight[first : first + 12] -= 0.1
        torch.testing.assert_close(layer(x), silenced, atol=1e-12, rtol=0)
    assert (silenced - before).abs().max() > 1e-3


@pytest.mark.parametrize("bidirectional", ["flip_sum", "hydra"])
def test_decays_steps_and_skips_stay_float32(bidirectional):
    odd = {"d_conv": 3} if bidirectional == "hydra" else {}
    layer = BiMamba2(16, d_state=4, headdim=8, bidirectional=bidirectional, **odd)
    names = {"A_log", "dt_bias", "D"} | ({"A_log_b", "dt_bias_b", "D_b"} if not odd else set())
    kept = {name: getattr(layer, name) for name in names}
    values = {name: p.detach().clone() for name, p in kept.items()}
    for cast in (layer.bfloat16, layer.half, lambda: layer.to("cpu", torch.bfloat16)):
        cast()
        for name, p in layer.named_parameters():
            assert p.dtype == (torch.float32 if name in names else layer.in_proj.weight.dtype)
    assert all(kept[name] is getattr(layer, name) for name in names)
    assert all(torch.equal(kept[name], value) for name, value in values.items())
    y = layer(torch.randn(1, 6, 16).bfloat16())
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in layer.double().parameters()} == {torch.float64}
