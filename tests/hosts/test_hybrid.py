"""The hybrid's form: what its parts are equal to, and stage 1 of its training."""

from __future__ import annotations

import diffusers
import pytest
import torch

import linfusion
from linfusion.attention.hybrid.features import KINDS, FeatureMap
from linfusion.attention.hybrid.form import Summarised
from linfusion.layers.record import record_of
from linfusion.training.layerwise import _knapsack, choose_layers, fit_layers
from tests.tiny_joint import tiny_flux, tiny_flux_pipeline

GRID = (5, 7)
CONTEXT = 3


def tokens(grid=GRID, heads=2, dim=8, seed=0):
    torch.manual_seed(seed)
    size = torch.Size(grid).numel()
    q, k, v = (torch.randn(2, size, heads, dim) for _ in range(3))
    context = tuple(torch.randn(2, CONTEXT, heads, dim) for _ in range(2))
    return {"q": q, "k": k, "v": v, "grid": grid, "context": context, "scale": None}


def form(**setting):
    torch.manual_seed(1)
    return Summarised(2, 8, setting)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_never_negative_and_of_each_head_alone(kind):
    torch.manual_seed(0)
    phi, x = FeatureMap(kind, 2, 8), torch.randn(2, 35, 2, 8)
    features = phi(x)
    assert features.shape == (2, 35, 2, phi.count) and (features >= 0).all()
    x[:, :, 1] += 1.0
    assert torch.equal(phi(x)[:, :, 0], features[:, :, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_part_is_the_sum_over_what_the_window_does_not_see(kind):
    given, made = tokens(), form(window=2.5, cell=0, features=kind)
    with torch.no_grad():
        made.log_weight.weight.fill_(0.3)
        q, k, v = (given[name].transpose(1, 2) for name in "qkv")
        root = q.shape[-1] ** -0.25
        w = made.phi_q(given["q"] * root).transpose(1, 2) @ (
            made.phi_k(given["k"] * root).transpose(1, 2).mT
        )
        at = torch.cartesian_prod(*[torch.arange(n) for n in GRID])
        near = (at[:, None] - at).square().sum(-1) < 2.5**2
        keys = torch.cat([given["context"][0].transpose(1, 2), k], 2)
        scores = (q @ keys.mT * root**2).exp()
        far = w * torch.tensor(0.3).exp()
        scores[..., CONTEXT:] = torch.where(near, scores[..., CONTEXT:], far)
        values = torch.cat([given["context"][1].transpose(1, 2), v], 2)
        expected = (scores @ values / scores.sum(-1, keepdim=True)).transpose(1, 2)
        torch.testing.assert_close(made(**given), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", [(5, 7), (3, 4, 5)])
def test_fresh_maps_change_nothing_and_a_fresh_state_next_to_nothing(grid):
    given = tokens(grid)
    with torch.no_grad():
        plain = form(window=2, cell=2)(**given)
        assert torch.equal(form(window=2, cell=2, maps=True)(**given), plain)
        state = form(window=2, cell=2, features="hedgehog")(**given)
    assert not torch.equal(state, plain)
    torch.testing.assert_close(state, plain, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "setting", [{"maps": True}, {"features": "hedgehog"}, {"features": "poly2", "cell": 0}], ids=str
)
def test_every_parameter_learns(setting):
    given, made = tokens(), form(**{"window": 2, "cell": 2, **setting})
    made(**given).square().sum().backward()
    assert list(made.parameters())
    dead = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    # A map of keys moves all scores of a head alike through its bias, unless queries differ.
    assert dead == []


def test_a_window_that_covers_the_grid_is_softmax():
    given = tokens()
    keys, values = (
        torch.cat([c, given[n]], 1).transpose(1, 2)
        for c, n in zip(given["context"], "kv", strict=True)
    )
    q = given["q"].transpose(1, 2)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, keys, values).transpose(1, 2)
    for setting in ({"cell": 2}, {"cell": 3, "maps": True}, {"cell": 0, "features": "elu1"}):
        torch.testing.assert_close(form(window=99, **setting)(**given), softmax)


def test_stage_1_comes_nearer_to_the_teacher_and_touches_nothing_else():
    pipe = tiny_flux_pipeline(transformer=tiny_flux(seed=3))
    linfusion.linearize(pipe, "hybrid", window=1.5, cell=2, maps=True)
    model = pipe.transformer
    before = {n: p.clone() for n, p in model.named_parameters()}
    forms = {p: model.get_submodule(f"{p}.hybrid") for p in record_of(model).layers}
    call = {"height": 32, "width": 32, "num_inference_steps": 2}
    errors = []
    for pictures, lr in ((1, 1e-12), (12, 1e-2), (1, 1e-12)):
        found = fit_layers(pipe, ["a red apple"], pictures=pictures, lr=lr, **call)
        errors.append(sum(found.values()))
    assert errors[2] < 0.95 * errors[0]
    assert all(model.get_submodule(f"{p}.hybrid") is form for p, form in forms.items())
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".hybrid." in name for name in changed)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "method, options, given, message",
    [
        (None, {}, {}, "pipe: its transformer is softmax"),
        ("hybrid", {}, {}, "has nothing to learn; linearize with maps=True"),
        ("hybrid", {"maps": True}, {"prompts": []}, r"prompts: got \[\]"),
        ("hybrid", {"maps": True}, {"pictures": 0}, "pictures: got 0"),
        ("clear", {"down_factor": 2}, {}, "pipe: its transformer is 'clear', expected 'hybrid'"),
    ],
    ids=["softmax", "nothing", "prompts", "pictures", "clear"],
)
def test_stage_1_refuses_before_it_begins(method, options, given, message):
    pipe = tiny_flux_pipeline()
    if method is not None:
        linfusion.linearize(pipe, method, **options)
    with pytest.raises(ValueError, match=message):
        fit_layers(pipe, **{"prompts": ["a dog"], "pictures": 1, **given})


def test_a_hybrid_of_flux_runs_in_its_stock_pipeline():
    pipe = tiny_flux_pipeline()
    assert type(pipe) is diffusers.FluxPipeline
    call = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}

    def run():
        return pipe("a dog", generator=torch.Generator().manual_seed(0), **call).images

    softmax = run()
    linfusion.linearize(pipe, "hybrid", window=2, cell=2)
    hybrid = run()
    linfusion.restore(pipe)
    assert torch.equal(run(), softmax) and not torch.equal(hybrid, softmax)


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_of_layers_is_the_best_of_all_choices(seed):
    generator = torch.Generator().manual_seed(seed)
    saved = torch.rand(7, generator=generator).sub(0.1).tolist()  # some cost more than softmax
    errors = torch.rand(7, generator=generator).tolist()
    need = 0.6 * sum(s for s in saved if s > 0)
    sets = [[i for i in range(7) if bits >> i & 1] for bits in range(2**7)]
    enough = [s for s in sets if sum(saved[i] for i in s) >= need]
    best = min(sum(errors[i] for i in s) for s in enough)
    found = _knapsack(saved, errors, need)
    assert sum(saved[i] for i in found) >= need
    # Savings are rounded down to a thousandth of what is needed.
    assert sum(errors[i] for i in found) <= best + 0.02


def test_layers_are_chosen_by_their_error_within_a_budget():
    pipe = tiny_flux_pipeline()
    linfusion.linearize(pipe, "hybrid", window=1.5, cell=4)
    call = {"height": 64, "width": 64, "num_inference_steps": 1}
    seen = []
    paths = choose_layers(pipe, ["a dog"], budget=0.8, report=seen.extend, **call)
    assert paths == [c.path for c in seen if c.chosen] and 0 < len(paths) < len(seen)
    spent = sum(c.weight * (c.cost if c.chosen else 1) for c in seen)
    assert spent <= 0.8 and sum(c.weight for c in seen) == pytest.approx(1)
    worst = max(c.error for c in seen if c.chosen)
    assert all(c.error >= worst for c in seen if not c.chosen)  # all layers cost the same here
    with pytest.raises(ValueError, match=r"budget: got 0.01, but all layers .* 0\.\d+ of softmax"):
        choose_layers(pipe, ["a dog"], budget=0.01, **call)
    linfusion.restore(pipe)
    linfusion.linearize(pipe, "hybrid", layers=paths)
    assert [x.path for x in linfusion.summary(pipe).layers if x.linear] == paths
