"""Which optimizer has which weights, and several of them as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from linfusion.training import TrainConfig
from linfusion.training.optimizers import build_optimizer

CHOICES = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "eps": 1e-8}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 4)])
        self.blocks[2].requires_grad_(False)


def trained(optimizer, model, steps):
    for step in range(steps):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()


def test_matrices_inside_blocks_are_muons():
    model = Model()
    groups = build_optimizer("muon", model, **CHOICES).param_groups
    ids = {name: id(p) for name, p in model.named_parameters()}
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [ids["blocks.0.weight"]],
        [ids[n] for n in ("patch.weight", "patch.bias", "blocks.0.bias", "blocks.1.weight")],
    ]


def test_its_update_is_orthogonal_and_of_the_size_of_adamws():
    model = Model()
    before = model.blocks[0].weight.detach().clone()
    trained(build_optimizer("muon", model, **CHOICES), model, 1)
    values = torch.linalg.svdvals(before - model.blocks[0].weight.detach()) / (0.1 * 0.2 * 4**0.5)
    assert ((values > 0.6) & (values < 1.3)).all()  # as near to 1 as Muon's iteration brings them


def test_a_schedule_reaches_all_and_a_state_is_taken_back():
    model = Model()
    optimizer = build_optimizer("muon", model, **CHOICES)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trained(optimizer, model, 2)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    weights, state = dict(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    weights = {name: value.clone() for name, value in weights.items()}

    other = Model()
    other.load_state_dict(weights)
    resumed = build_optimizer("muon", other, **CHOICES)
    resumed.load_state_dict(state)
    for group in [*resumed.param_groups, *optimizer.param_groups]:
        group["lr"] = 0.01
    trained(optimizer, model, 3)
    trained(resumed, other, 3)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_refusals():
    with pytest.raises(ValueError, match=r"optimizer: got 'sgd', accepted are adamw, muon"):
        TrainConfig(train_data_dir="x", optimizer="sgd")
    with pytest.raises(ValueError, match=r"optimizer: .* no matrix inside a block"):
        build_optimizer("muon", nn.Linear(3, 4), **CHOICES)
