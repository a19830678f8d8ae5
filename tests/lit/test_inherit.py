"""What a LiT student takes over from its teacher: every tensor accounted for."""

from __future__ import annotations

import pytest
import torch

import linfusion
from linfusion.lit.inherit import POLICIES, inherit
from linfusion.students.saving import save
from tests.tiny_dit import dit_inputs, forward, pixart_inputs, tiny_dit, tiny_pixart

pytestmark = pytest.mark.filterwarnings("ignore:.*linearized without weights")

LINEAR = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}


def student(make=tiny_dit, seed=0, **options):
    return linfusion.linearize(make(seed), "lit", **options)


def projections(parts, blocks=3):
    return {
        f"transformer_blocks.{i}.attn1.{LINEAR[part]}.{leaf}"
        for i in range(blocks)
        for part in parts
        for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize("make, blocks", [(tiny_dit, 3), (tiny_pixart, 2)])
@pytest.mark.parametrize(
    "policy, parts", [*POLICIES.items(), ("kv", "kv"), (["o", "q"], "qo"), ((), "")]
)
def test_the_lists_are_exact_and_what_is_inherited_is_the_teachers_to_the_bit(
    make, blocks, policy, parts
):
    teacher = make(seed=1).state_dict()
    model = student(make)
    report = inherit(model, make(seed=1), policy)
    state = model.state_dict()
    anew = projections(set("qkvo") - set(parts), blocks)
    new = {
        f"transformer_blocks.{i}.attn1.lit.dwc.{leaf}"
        for i in range(blocks)
        for leaf in ("weight", "bias")
    }
    assert report.parts == parts
    assert set(report.reinitialised) == anew and set(report.new) == new
    assert set(report.inherited) == set(teacher) - anew
    assert len(report.inherited) + len(anew) + len(new) == len(state)
    assert all(torch.equal(state[name], teacher[name]) for name in report.inherited)
    weights = [name for name in anew if name.endswith("weight")]
    assert not any(torch.equal(state[name], teacher[name]) for name in weights)


def test_cross_attention_is_inherited_under_every_policy():
    teacher, model = tiny_pixart(seed=1), student(tiny_pixart)
    names = [name for name in teacher.state_dict() if ".attn2." in name]
    for policy in POLICIES:
        assert set(names) <= set(inherit(model, teacher, policy).inherited)


def test_the_teacher_is_by_default_the_model_itself():
    model, original = student(), tiny_dit().state_dict()
    inherit(model, policy="lit")
    report = inherit(model, policy="lit-t2i")
    state = model.state_dict()
    assert projections("o") <= set(report.inherited)
    assert all(torch.equal(state[name], original[name]) for name in report.inherited)


def test_full_starts_as_plain_linear_attention():
    model = student(key_center=True)
    inherit(model, policy="full")
    plain = student(key_center=True, conv=None)
    assert torch.equal(forward(model, dit_inputs()), forward(plain, dit_inputs()))


def test_a_larger_student_inherits_the_convolutions_of_a_smaller_one():
    small = student(seed=1)
    inherit(small, policy="lit", seed=5)
    model = student()
    report = inherit(model, small, "full")
    assert report.new == [] and report.reinitialised == []
    assert torch.equal(forward(model, dit_inputs()), forward(small, dit_inputs()))
    assert len(inherit(model, small, "lit").new) == 6


def test_fresh_projections_are_xavier_and_depend_on_the_seed_alone():
    states = []
    for seed in (3, 3, 4):
        model = student()
        inherit(model, seed=seed)
        states.append(model.state_dict())
    name = "transformer_blocks.1.attn1.to_q"
    assert torch.equal(states[0][f"{name}.weight"], states[1][f"{name}.weight"])
    assert not torch.equal(states[0][f"{name}.weight"], states[2][f"{name}.weight"])
    bound = (6 / 48) ** 0.5
    assert 0.9 * bound < states[0][f"{name}.weight"].abs().max() <= bound
    assert not states[0][f"{name}.bias"].any()
    filters = states[0]["transformer_blocks.1.attn1.lit.dwc.weight"]
    assert 0.18 < filters.abs().max() <= 0.2


def test_a_layer_that_keeps_softmax_is_inherited_whole():
    model = student(softmax_every=3)
    report = inherit(model, tiny_dit(seed=1))
    kept = {name for name in model.state_dict() if name.startswith("transformer_blocks.2.")}
    assert kept <= set(report.inherited)


@pytest.mark.parametrize("policy", ["lit", "kv", "full"])
def test_restore_gives_the_teacher(policy):
    teacher, model = tiny_dit(seed=1), student()
    inherit(model, teacher, policy)
    linfusion.restore(model)
    assert torch.equal(forward(model, dit_inputs()), forward(teacher, dit_inputs()))


def test_a_student_that_inherited_is_saved_and_loaded(tmp_path):
    model = student()
    inherit(model)
    save(model, tmp_path)
    again = linfusion.linearize(tiny_dit(), "lit", weights=tmp_path)
    assert torch.equal(forward(again, dit_inputs()), forward(model, dit_inputs()))


def test_a_student_of_wider_type_inherits_without_rounding():
    model = student()
    teacher = tiny_dit(seed=1).bfloat16().state_dict()
    state = inherit(model, teacher, "full") and model.state_dict()
    assert all(torch.equal(state[name], t.float()) for name, t in teacher.items())


def teacher_with(change):
    tensors = tiny_dit(seed=1).state_dict()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("proj_out_2.bias"), r"Missing: proj_out_2.bias\."),
        (lambda t: t.update(more=torch.ones(1)), r"Unexpected: more\."),
        (
            lambda t: t.update({"proj_out_2.bias": torch.ones(3)}),
            r"Misshapen: proj_out_2.bias \(3,\), expected \(32,\)",
        ),
        (
            lambda t: t.update({"proj_out_2.bias": t["proj_out_2.bias"].double()}),
            r"Rounded: proj_out_2.bias torch.float64",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_changes_nothing(change, message):
    model = student()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        inherit(model, teacher_with(change))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_checkpoint_without_attention_serves_a_policy_that_starts_it_anew():
    tensors = teacher_with(lambda t: [t.pop(name) for name in projections("qkvo")])
    assert set(inherit(student(), tensors).reinitialised) == projections("qkvo")
    with pytest.raises(ValueError, match=r"Missing: .*attn1\.to_out"):
        inherit(student(), tensors, "lit-t2i")


@pytest.mark.parametrize("policy", ["qx", "all", ["q", "z"], 3])
def test_a_policy_of_unknown_parts_is_refused(policy):
    with pytest.raises(ValueError, match=r"policy: got .*expected one of lit, lit-t2i, full, or"):
        inherit(student(), policy=policy)


def test_a_student_that_is_not_lit_is_refused():
    with pytest.raises(ValueError, match=r"student: DiTTransformer2DModel is not linearized"):
        inherit(tiny_dit())
    with pytest.raises(ValueError, match=r"student: .* of method 'linfusion'"):
        inherit(linfusion.linearize(tiny_dit(), "linfusion"))


def test_pixart_runs_after_inheritance():
    model = student(tiny_pixart)
    inherit(model, tiny_pixart(seed=1), "lit-t2i")
    assert forward(model, pixart_inputs(4, 8)).isfinite().all()
