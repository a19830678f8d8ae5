"""Mamba-2: what it computes, loads and carries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from linfusion.attention.mamba2.causal import Mamba2, Mamba2State


def tokens(length, width=24, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, width, generator=g, dtype=torch.float64).to(dtype)


def shaken(layer, dtype=torch.float64):
    """The layer with no parameter left at a value that hides it."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return layer.to(dtype).eval()


def causal(**options):
    torch.manual_seed(0)
    return shaken(Mamba2(24, d_state=6, headdim=8, **options))


@pytest.mark.parametrize("length, groups", [(1, 1), (37, 1), (70, 2)])
def test_it_is_the_mixer_of_transformers_with_the_same_weights(length, groups):
    config = Mamba2Config(
        hidden_size=24,
        state_size=6,
        head_dim=8,
        num_heads=6,
        n_groups=groups,
        expand=2,
        chunk_size=16,
        conv_kernel=4,
        num_hidden_layers=1,
    )
    mixer = shaken(Mamba2Mixer(config, 0), torch.float32)
    ours = Mamba2(24, d_state=6, headdim=8, ngroups=groups)
    ours.load_state_dict(mixer.state_dict())  # strict: the keys are the same
    x = tokens(length, dtype=torch.float32)
    expected = mixer(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert expected.std() > 1e-2
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ngroups": 3, "D_has_hdim": True, "bias": True},
        {"d_ssm": 32, "rmsnorm": False},
        {"norm_before_gate": True, "conv_bias": False, "d_conv": 2},
    ],
)
def test_runs_that_carry_the_state_are_one_run(options):
    layer, x = causal(**options), tokens(41)
    whole, last = layer(x, return_state=True)
    parts, state = [], None
    for run in x.split([1, 2, 20, 1, 17], 1):
        out, state = layer(run, state, return_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(tuple(state), tuple(last), atol=1e-10, rtol=0)


def test_a_state_is_not_written_to():
    layer, x = causal(), tokens(9)
    _, state = layer(x, return_state=True)
    kept = Mamba2State(*(t.clone() for t in state))
    layer(x, state, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


def test_a_token_sees_nothing_that_comes_later():
    layer, x = causal(), tokens(20)
    changed = x.clone()
    changed[:, 12:] += 1
    difference = (layer(changed) - layer(x)).abs().amax((0, 2))
    assert not difference[:12].any() and difference[12:].all()


def test_rows_that_are_no_part_of_the_scan_are_a_gated_mlp():
    layer, x = causal(d_ssm=32), tokens(5)
    with torch.no_grad():
        layer.out_proj.weight[:, 16:] = 0  # what the scan contributes
    z0, x0 = layer.in_proj(x)[..., :32].chunk(2, -1)
    expected = (F.silu(z0) * x0) @ layer.out_proj.weight[:, :16].T
    torch.testing.assert_close(layer(x), expected)


def test_first_steps_and_decays_lie_in_their_ranges():
    layer = Mamba2(64, headdim=2, dt_min=0.01, dt_max=0.2, A_init_range=(2, 3))
    steps, decays = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 0.01 * 0.999 <= steps.min() < 0.03 and 0.1 < steps.max() <= 0.2 * 1.001
    assert decays.min() >= 2 * 0.999 and decays.max() <= 3 * 1.001
