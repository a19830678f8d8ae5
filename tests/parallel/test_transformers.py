"""Transformers that ranks share give what they give alone, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map

from linfusion.linearize import linearize
from linfusion.parallel.parallelize import parallelize
from tests import tiny_video, tiny_video_hosts
from tests.parallel.pool import cases, run
from tests.parallel.sharing import alone_and_shared, difference, shared
from tests.tiny_dit import dit_inputs, pixart_inputs, tiny_dit, tiny_pixart
from tests.tiny_joint import SD35, flux_inputs, sd3_inputs, tiny_flux, tiny_sd3
from tests.tiny_video_hosts import tiny_cogvideox, tiny_sana, tiny_wan


def double(inputs):
    return tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs
    )


def lively(model):
    """Fresh children that do something."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lit." in name or ".clear." in name or ".mate." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_(0.1 * noise.to(parameter))
    return model


def job(ranks, name, dtype):
    make, inputs = CASES[name]
    model = lively(make()).to(dtype)
    given = inputs()
    return alone_and_shared(ranks, model, double(given) if dtype == torch.float64 else given)


CASES = {
    # 9 rows of 6 tokens, windows of 5 to either side: with 4 ranks, of three others.
    "flux": (
        lambda: linearize(tiny_flux(), "clear", radius=5.5),
        lambda: flux_inputs(9, 6),
    ),
    "flux pooled": (
        lambda: linearize(tiny_flux(), "clear", radius=2, down_factor=2, proportional=True),
        lambda: flux_inputs(8, 6, batch=2),
    ),
    "flux controlled": (
        lambda: linearize(tiny_flux(), "clear", radius=3),
        lambda: flux_inputs(
            8,
            6,
            controlnet_block_samples=[torch.ones(1, 48, 32).cumsum(1) / 48],
            controlnet_single_block_samples=[torch.ones(1, 48, 32).cumsum(2) / 32],
        ),
    ),
    "sd3": (
        lambda: linearize(tiny_sd3(**SD35), "clear", radius=3),
        lambda: sd3_inputs(9, 6),
    ),
    "dit": (
        lambda: linearize(tiny_dit(), "lit", heads=2, softmax_every=3),
        lambda: dit_inputs(10),
    ),
    "pixart": (
        lambda: linearize(
            tiny_pixart(), "lit", heads=2, key_center=True, conv="input_full", normalizer="sum"
        ),
        lambda: pixart_inputs(14, 8),
    ),
    # Windows of 3 rows that odd layers move by one, scans in four orders, review tokens of 2 rows.
    "wan": (
        lambda: linearize(tiny_wan(num_layers=4), "mate", window=(2, 3, 2)),
        lambda: video(tiny_wan(), (3, 8, 3)),
    ),
    # Wan 2.2: a time for every token.
    "wan ti2v": (
        lambda: linearize(tiny_wan(), "mate", window=(2, 4, 2)),
        lambda: video(tiny_wan(), (2, 8, 3), timestep=torch.arange(48.0)[None] * 20),
    ),
    # Rows of 2 ranks are not even a window, pooling rounds up at the last row.
    "sana": (
        lambda: linearize(
            tiny_sana(),
            "mate",
            window=(2, 5, 2),
            review_placement="front",
            scan_orders=("wth", "htw", "thw"),
            share_bc=False,
            average=True,
        ),
        lambda: video(tiny_sana(), (2, 7, 3)),
    ),
    "cogvideox": (
        lambda: linearize(
            tiny_cogvideox(), "mate", window=(8, 2, 8), review_placement="none", d_conv=6
        ),
        lambda: video(tiny_cogvideox(), (1, 5, 2)),
    ),
    "lingen": (
        lambda: tiny_video.tiny_transformer(causal=True, num_layers=4),
        lambda: {
            "hidden_states": torch.randn(
                2, 4, 8, 16, 4, generator=torch.Generator().manual_seed(0)
            ),
            "timestep": torch.tensor([300.0, 700.0]),
            "encoder_hidden_states": torch.ones(2, 3, 32),
        },
    ),
}


def video(model, grid, **more):
    return tiny_video_hosts.inputs(model, grid, batch=1, return_dict=True, **more)


@pytest.mark.parametrize(
    "name, world",
    cases(
        [(name, 3) for name in CASES] + [("flux", 4), ("wan", 4), ("wan", 1)],
        [(name, 2) for name in CASES] + [(name, 4) for name in CASES if name not in "flux wan"],
    ),
)
def test_a_shared_transformer_is_the_one_alone(name, world):
    # Rotary embeddings and norms of diffusers round gradients to float32, of which each rank has
    # its own share. What is ours is held to 1e-10 in test_scan and test_ranks.
    exact = name in ("dit", "pixart", "cogvideox", "lingen")
    for out, grads in run(world, job, name, torch.float64):
        assert out < 1e-10 and grads < (1e-10 if exact else 5e-6)


def traces(model):
    """All that hooks, processors and attributes say about a model."""
    found = {}
    for path, module in model.named_modules():
        hooks = [list(r.values()) for r in (module._forward_hooks, module._forward_pre_hooks)]
        names = {n for n in module.__dict__ if not isinstance(module.__dict__[n], dict)}
        found[path] = (hooks, names, getattr(module, "processor", None))
    return found


def undone_job(ranks, name):
    make, inputs = CASES[name]
    model = lively(make())
    before = traces(model)
    with shared(ranks, model), torch.no_grad():
        model(**inputs())
    return before == traces(model)


@pytest.mark.parametrize("name", ["flux", "sd3", "dit", "wan", "sana", "cogvideox", "lingen"])
def test_nothing_of_it_is_left_on_a_model(name):
    assert all(run(2, undone_job, name))


def checkpointed_job(ranks, name):
    make, inputs = CASES[name]
    model = lively(make()).double()
    model.enable_gradient_checkpointing()
    return alone_and_shared(ranks, model, double(inputs()))


@pytest.mark.parametrize("name", ["flux", "sana", "pixart", "lingen"])
def test_what_checkpointing_computes_again_knows_its_rows(name):
    for out, grads in run(2, checkpointed_job, name):
        assert out < 1e-10 and grads < 5e-6


def compiled_job(ranks, name):
    torch.compiler.reset()
    make, inputs = CASES[name]
    model = lively(make())
    given = inputs()
    with torch.no_grad():
        alone = model(**given).sample
        with shared(ranks, model):
            for block in model.transformer_blocks:
                block.compile(fullgraph=True, backend="eager")
            return difference(model(**given).sample, alone)


@pytest.mark.parametrize("name", cases(["pixart"], ["flux"]))
def test_blocks_of_a_shared_model_compile_whole(name):
    assert max(run(2, compiled_job, name)) < 2e-5


def sharded_job(ranks):
    """Gradients where FSDP2 has the parameters in pieces over two samples and rows of each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    make, inputs = CASES["pixart"]
    pair = inputs()
    weight = torch.randn(2, 8, 14, 8, generator=torch.Generator().manual_seed(1))
    found = []
    for own in (False, True):
        model, given, part = lively(make()), pair, slice(None)
        if own:
            parallelize(model, mesh=mesh)
            everyone = mesh["dp", "sp"]._flatten()
            for module in (*model.transformer_blocks, model):
                fully_shard(module, mesh=everyone)
            part = slice(mesh["dp"].get_local_rank(), mesh["dp"].get_local_rank() + 1)
            given = {k: v[part] if isinstance(v, torch.Tensor) else v for k, v in pair.items()}
        # The mean over samples, which ranks of one sample compute alike.
        (model(**given).sample * weight[part]).sum(dim=(1, 2, 3)).mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({n: g.full_tensor() if own else g for n, g in grads.items()})
    alone, together = found
    assert alone.keys() == together.keys()
    return max(difference(together[n], g) for n, g in alone.items() if g.abs().max() > 1e-6)


def test_gradients_under_fsdp2_are_those_of_one_process():
    assert max(run(4, sharded_job)) < 2e-4
