"""Distillation of the flow models FLUX and Stable Diffusion 3 into CLEAR."""

import dataclasses

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import linfusion
from linfusion.training import Distillation, TrainConfig, distill
from linfusion.training.teachers.images import FlowTeacher
from tests.tiny import tiny_image
from tests.tiny_joint import (
    flux_inputs,
    forward,
    sd3_inputs,
    tiny_flux,
    tiny_flux_pipeline,
    tiny_sd3,
    tiny_sd3_pipeline,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINES = {"flux": tiny_flux_pipeline, "sd3": tiny_sd3_pipeline}
MODELS = {"flux": (tiny_flux, flux_inputs), "sd3": (tiny_sd3, sd3_inputs)}


def settings(tmp_path, **changes):
    folder = tmp_path / "pictures"
    if not folder.exists():
        folder.mkdir()
        for i in range(4):
            tiny_image(i, 32).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"picture {i}")
    return TrainConfig.of(
        **{
            "method": "clear",
            "radius": 2,
            "train_data_dir": str(folder),
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "resolution": 32,
            "train_batch_size": 2,
            "max_train_steps": 3,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "ema_decay": 0.5,
            **changes,
        }
    )


def test_a_hybrid_is_trained_as_a_whole_from_where_stage_1_left_it(tmp_path):
    pipe = tiny_flux_pipeline()
    options = {"window": 2.0, "cell": 2, "maps": True}
    pictures = settings(tmp_path)
    changes = {"method": "hybrid", "options": options}
    out = distill(dataclasses.replace(pictures, **changes), pipeline=pipe)
    student = load_file(out / WEIGHTS)
    assert any(".hybrid.map_k." in name for name in student)
    linfusion.linearize(pipe, weights=out)
    found = linfusion.summary(pipe)
    assert found.method == "hybrid" and all(layer.linear for layer in found.layers)


@pytest.fixture(params=["flux", "sd3"])
def host(request):
    return request.param


def teacher_and_batch(host, size=(8, 12), n=3):
    pipe = PIPELINES[host]()
    teacher = FlowTeacher(pipe)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(n, 4, *size, generator=generator)
    with torch.no_grad():
        states = teacher.text_states([f"picture {i}" for i in range(n)])
    return pipe, teacher, {"latents": latents, **states}


def disturb(pair):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in pair.trained().values():
            p += 0.1 * torch.randn(p.shape, generator=generator)


def test_a_run_gives_a_student_that_linearize_takes_and_the_model_as_it_was(tmp_path, host):
    pipe = PIPELINES[host]()
    before = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    out = distill(settings(tmp_path), pipeline=pipe)
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    linfusion.linearize(pipe, weights=out)
    report = linfusion.summary(pipe)
    assert report.method == "clear"
    assert any(not torch.equal(t, before[n]) for n, t in pipe.transformer.state_dict().items())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, host):
    changes = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = distill(settings(tmp_path, **changes), pipeline=PIPELINES[host]())
    resumed = distill(
        settings(
            tmp_path,
            **changes,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(whole / "checkpoint-2"),
        ),
        pipeline=PIPELINES[host](),
    )
    a, b = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_pictures_of_the_teacher_and_buckets_that_are_not_square_are_learned_from(tmp_path, host):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a heart\na star\na cat\n")
    config = settings(
        tmp_path,
        train_data_dir=None,
        train_prompts=str(prompts),
        teacher_steps=2,
        teacher_guidance_scale=2.0,
        use_aspect_ratio_buckets=True,
        aspect_ratio_buckets="32,32;24,40",
        gradient_checkpointing=True,
        validation_steps=3,
        validation_prompts=("a heart",),
    )
    out = distill(config, pipeline=PIPELINES[host]())
    assert all(t.isfinite().all() for t in load_file(out / WEIGHTS).values())
    assert (out / "samples" / "step-0000003.png").is_file()


def test_the_noised_picture_and_its_target_lie_on_one_line(host):
    """x_σ = (1 − σ) x₀ + σ ε and target = ε − x₀, so that x_σ − σ·target = x₀."""
    _, teacher, batch = teacher_and_batch(host)
    inputs, target = teacher.example(batch, torch.Generator().manual_seed(1))
    thousand = 1 if host == "flux" else 1000
    sigma = (inputs["timestep"] / thousand).view(-1, *[1] * (target.ndim - 1))
    assert sigma.min() > 0 and sigma.max() <= 1 and len(sigma.unique()) > 1
    expected = teacher._packed(batch["latents"])
    torch.testing.assert_close(inputs["hidden_states"] - sigma * target, expected)


def test_sigmas_are_those_of_the_schedulers_own_shift(host):
    pipe = PIPELINES[host](scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.scheduler.set_timesteps(4)  # what a user did with it before is nothing to us
    found = FlowTeacher(pipe)._sigmas
    t = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(found, 3 * t / (1 + 2 * t))


def test_the_model_takes_what_an_example_holds(host):
    pipe, teacher, batch = teacher_and_batch(host)
    inputs, target = teacher.example(batch, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert pipe.transformer(**inputs).sample.shape == target.shape


def test_the_teacher_inside_is_the_model_bit_for_bit(host):
    build, arguments = MODELS[host]
    model = build()
    before = forward(model, arguments())
    pair = Distillation(model, method="clear", radius=2, down_factor=2)
    disturb(pair)
    with pair.teacher():
        assert torch.equal(forward(model, arguments()), before)
    assert (forward(model, arguments()) - before).abs().max() > 1e-2
    pair.close()
    assert torch.equal(forward(model, arguments()), before)


def test_each_loss_reaches_projections_and_pooling_and_nothing_else():
    pipe, teacher, batch = teacher_and_batch("flux")
    pair = Distillation(pipe.transformer, method="clear", radius=2, down_factor=2)
    kinds = {name.split(".attn.")[1].rpartition(".")[0] for name in pair.trained()}
    assert kinds == {"to_q", "to_k", "to_v", "to_out.0", "clear.pool"}
    inputs, target = teacher.example(batch, torch.Generator().manual_seed(1))
    losses = pair.losses(pipe.transformer, inputs, target)
    for loss in losses.values():
        for p in pair.trained().values():
            p.grad = None
        loss.backward(retain_graph=True)
        reached = {name for name, p in pipe.transformer.named_parameters() if p.grad is not None}
        assert reached <= set(pair.trained())
        assert any("clear.pool" in name for name in reached)


def test_the_feature_loss_compares_the_layers_that_are_named():
    """Moving one single block's values changes the features of that block and of no other."""
    pipe, teacher, batch = teacher_and_batch("flux")
    inputs, target = teacher.example(batch, torch.Generator().manual_seed(1))
    distances = []
    for layer in ("single_transformer_blocks.0", "single_transformer_blocks.1"):
        pair = Distillation(pipe.transformer, method="clear", radius=20, feature_layers=[layer])
        with torch.no_grad():
            pipe.transformer.single_transformer_blocks[1].attn.to_v.weight.add_(0.1)
        losses = pair.losses(pipe.transformer, inputs, target)
        distances.append(losses["feature"].item())
        pair.close()
    assert distances[0] < 1e-6 < distances[1]


def test_the_layers_compared_are_every_fourth_single_block():
    flux = FlowTeacher(tiny_flux_pipeline())
    paths = [f"transformer_blocks.{i}.attn" for i in range(19)]
    paths += [f"single_transformer_blocks.{i}.attn" for i in range(38)]
    found = [int(path.split(".")[1]) for path in flux.feature_layers(paths)]
    assert found == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"radius": 0}, "radius: got 0, expected a number above 0"),
        ({"projection_mid_dim": 8}, "projection_mid_dim: given, but only method 'linfusion'"),
        ({"method": "linfusion", "radius": None}, "model_or_pipe: FluxTransformer2DModel has no"),
        ({"method": "lin"}, "method: got 'lin', accepted are linfusion, "),
        ({"feature_layers": ("down_blocks",)}, "feature_layers: 'down_blocks' selects"),
        ({"resolution": 30}, "resolution: got 30x30, accepted are multiples of 4"),
        ({"guidance_embedding": -1.0}, "guidance_embedding: got -1.0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(settings(tmp_path, **changes), pipeline=tiny_flux_pipeline())
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("host, changes, said", [
    ("flux", {"in_channels": 24, "out_channels": 8}, "takes 24 channels and predicts 8"),
    ("sd3", {"in_channels": 8, "out_channels": 4}, "takes 8 channels and predicts 4"),
])  # fmt: skip
def test_a_model_that_is_also_given_a_picture_is_refused_before_anything_is_written(
    tmp_path, host, changes, said
):
    pipe = PIPELINES[host]()
    pipe.transformer.register_to_config(**changes)  # as of FLUX Fill
    with pytest.raises(ValueError, match=f"pretrained_model_name_or_path: .*{said}.*from text"):
        distill(settings(tmp_path), pipeline=pipe)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
