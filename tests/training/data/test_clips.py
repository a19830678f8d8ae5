"""Distillation of the video transformers Wan, SANA-Video and CogVideoX into MATE."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import linfusion
from linfusion.training import Distillation, TrainConfig, distill
from linfusion.training.data.clips import ClipSet, check_clips, clip_folder, encode_clips
from linfusion.training.teachers.video import VideoTeacher
from tests.tiny_joint import tiny_flux_pipeline
from tests.tiny_video_hosts import forward, inputs, tiny_wan
from tests.tiny_video_pipelines import (
    tiny_cogvideox_pipeline,
    tiny_sana_pipeline,
    tiny_wan_pipeline,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINES = {
    "wan": tiny_wan_pipeline,
    "sana": tiny_sana_pipeline,
    "cogvideox": tiny_cogvideox_pipeline,
}
each_host = pytest.mark.parametrize("host", list(PIPELINES))


def clips(tmp_path, shapes=((4, 3, 4, 6),) * 3):
    folder = tmp_path / "clips"
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(0)
    for i, shape in enumerate(shapes):
        save_file({"latents": torch.randn(shape, generator=g)}, folder / f"{i}.safetensors")
        (folder / f"{i}.txt").write_text(f"clip {i}")
    return folder


def settings(tmp_path, **changes):
    if "train_data_dir" not in changes:
        changes["train_data_dir"] = str(clips(tmp_path))
    return TrainConfig.of(
        **{
            "method": "mate",
            "window": "2,2,2",
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "train_batch_size": 2,
            "max_train_steps": 3,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "ema_decay": 0.5,
            **changes,
        }
    )


def teacher_and_batch(host, frames=3, n=3):
    pipe = PIPELINES[host]()
    teacher = VideoTeacher(pipe)
    latents = torch.randn(n, 4, frames, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = teacher.text_states([f"clip {i}" for i in range(n)])
    return pipe, teacher, {"latents": latents, **states}


@each_host
def test_a_run_gives_a_student_that_linearize_takes_and_the_model_as_it_was(tmp_path, host):
    pipe = PIPELINES[host]()
    before = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    out = distill(settings(tmp_path, gradient_checkpointing=True), pipeline=pipe)
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    linfusion.linearize(pipe, weights=out)
    assert linfusion.summary(pipe).method == "mate"
    kept = load_file(out / WEIGHTS)
    assert any(t.any() for name, t in kept.items() if name.endswith("mate.mix.weight"))
    assert any("to_q" in name and not torch.equal(t, before[name]) for name, t in kept.items())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    changes = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = distill(settings(tmp_path, **changes), pipeline=tiny_wan_pipeline())
    resumed = distill(
        settings(
            tmp_path,
            **changes,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(whole / "checkpoint-2"),
        ),
        pipeline=tiny_wan_pipeline(),
    )
    a, b = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each_host
def test_a_few_steps_bring_the_student_nearer_to_its_teacher(host):
    pipe, teacher, batch = teacher_and_batch(host)
    pair = Distillation(pipe.transformer, method="mate", window=(2, 2, 2), compare="block")
    given = teacher.example(batch, torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(pair.trained().values(), lr=5e-3)
    totals = []
    for _ in range(15):
        losses = pair.losses(pipe.transformer, *given)
        totals.append((losses["kd"] + losses["feature"]).item())
        optimizer.zero_grad()
        (losses["kd"] + losses["feature"]).backward()
        optimizer.step()
    assert totals[-1] < 0.5 * totals[0]


def test_the_teacher_inside_is_the_model_bit_for_bit():
    model = tiny_wan()
    given = inputs(model)
    before = forward(model, given)
    pair = Distillation(model, method="mate", window=(2, 2, 2), compare="block")
    with torch.no_grad():
        for i, parameter in enumerate(pair.trained().values()):
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(i)
            )
    with pair.teacher():
        assert torch.equal(forward(model, given), before)
    assert (forward(model, given) - before).abs().max() > 1e-2
    pair.close()
    assert torch.equal(forward(model, given), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_trained_is_the_scan_the_weights_and_the_projections():
    pair = Distillation(tiny_wan(), method="mate", window=(2, 2, 2))
    kinds = {name.split(".attn1.")[1].split(".weight")[0] for name in pair.trained()}
    assert {"to_q", "to_k", "to_v", "to_out.0", "mate.mix", "mate.ma.in_proj"} <= kinds
    assert not kinds & {"norm_q", "norm_k"}


def test_hidden_states_are_compared_after_the_blocks_that_are_named():
    """Outputs of the second block's feed-forward are in its hidden states, in no layer's output."""
    pipe, teacher, batch = teacher_and_batch("wan")
    given = teacher.example(batch, torch.Generator().manual_seed(1))
    found = {}
    for compare in ("layer", "block"):
        pair = Distillation(
            pipe.transformer,
            method="mate",
            window=(9, 9, 9),
            feature_layers=["blocks.1"],
            compare=compare,
        )
        hook = pipe.transformer.blocks[1].ffn.register_forward_hook(
            lambda module, args, output, pair=pair: output if pair._teaching else output + 1
        )
        found[compare] = pair.losses(pipe.transformer, *given)["feature"].item()
        hook.remove()
        pair.close()
    assert found["layer"] < 1e-6 < 1e-3 < found["block"]


def test_a_comparison_there_is_not_changes_nothing():
    model = tiny_wan()
    with pytest.raises(ValueError, match="compare: got 'model', expected one of"):
        Distillation(model, method="mate", compare="model")
    assert not hasattr(model.blocks[0].attn1, "mate")


@pytest.mark.parametrize("host", ["wan", "sana"])
def test_the_noised_clip_and_its_target_lie_on_one_line(host):
    """x_σ = (1 − σ) x₀ + σ ε and target = ε − x₀, so that x_σ − σ·target = x₀."""
    _, teacher, batch = teacher_and_batch(host, n=2)
    given, target = teacher.example(batch, torch.Generator().manual_seed(1))
    sigma = (given["timestep"] / 1000).view(-1, 1, 1, 1, 1)
    assert sigma.min() > 0 and sigma.max() <= 1 and len(sigma.unique()) > 1
    torch.testing.assert_close(given["hidden_states"] - sigma * target, batch["latents"])


def test_sigmas_are_shifted_as_the_scheduler_shifts_them():
    t = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(VideoTeacher(tiny_wan_pipeline())._sigmas, 3 * t / (1 + 2 * t))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_cogvideox_predicts_what_its_scheduler_says(prediction):
    teacher = VideoTeacher(tiny_cogvideox_pipeline(prediction_type=prediction))
    latents = torch.randn(2, 4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    batch = {"latents": latents, "states": torch.zeros(2, 5, 32)}
    given, target = teacher.example(batch, torch.Generator().manual_seed(1))
    x0, at = latents.transpose(1, 2), teacher.scheduler.alphas_cumprod[given["timestep"]]
    at = at.float()
    a, b = at.sqrt().view(-1, 1, 1, 1, 1), (1 - at).sqrt().view(-1, 1, 1, 1, 1)
    noise = target if prediction == "epsilon" else (target + b * x0) / a
    torch.testing.assert_close(given["hidden_states"], a * x0 + b * noise)


@each_host
def test_the_model_takes_what_an_example_holds(host):
    pipe, teacher, batch = teacher_and_batch(host)
    given, target = teacher.example(batch, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert pipe.transformer(**given).sample.shape == target.shape


def test_batches_hold_clips_of_one_shape_with_their_captions(tmp_path):
    shapes = ((4, 3, 4, 6), (4, 1, 4, 4), (4, 3, 4, 6), (4, 1, 4, 4))
    folder = clips(tmp_path, shapes)
    config = settings(tmp_path, train_data_dir=str(folder), proportion_empty_prompts=0.0)
    teacher = VideoTeacher(tiny_wan_pipeline())
    data = ClipSet(config, teacher, clip_folder(folder))
    assert data.batches_per_epoch == 2
    stored = [load_file(folder / f"{i}.safetensors")["latents"] for i in range(4)]
    seen = []
    for number in range(2):
        batch = data.batch(number, 0, torch.Generator())
        for latents, states in zip(batch["latents"], batch["states"], strict=True):
            (i,) = [i for i, t in enumerate(stored) if torch.equal(t, latents)]
            with torch.no_grad():
                expected = teacher.text_states([f"clip {i}"])["states"][0]
            torch.testing.assert_close(states, expected)
            seen.append(i)
    assert sorted(seen) == [0, 1, 2, 3]


@each_host
def test_encoded_clips_are_what_the_pipeline_would_decode(tmp_path, host):
    pipe = PIPELINES[host]()
    g = torch.Generator().manual_seed(0)
    videos = [torch.randint(256, (f, 16, 32, 3), generator=g, dtype=torch.uint8) for f in (5, 1)]
    paths = encode_clips(pipe, zip(videos, ("one", "two"), strict=True), tmp_path)
    found = clip_folder(tmp_path)
    assert [clip.path for clip in found] == paths
    assert [clip.caption for clip in found] == ["one", "two"]
    check_clips(VideoTeacher(pipe), found)
    config = pipe.vae.config
    mean, std = (
        torch.zeros(4),
        torch.full((4,), 1 / config.scaling_factor if host == "cogvideox" else 1.0),
    )
    if host != "cogvideox":
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    for video, path in zip(videos, paths, strict=True):
        latents = load_file(path)["latents"][None]
        raw = latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
        with torch.no_grad():
            pixels = video.permute(3, 0, 1, 2)[None] / 127.5 - 1
            expected = pipe.vae.encode(pixels).latent_dist.mode()
        torch.testing.assert_close(raw, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 16, 16), r"clips: number 0 is torch.uint8 \(5, 16, 16\); expected uint8"),
        ((4, 16, 16, 3), "clips: number 0 has 4 frames of 16 by 16 pixels; expected a multiple of"),
        ((5, 16, 18, 3), "clips: number 0 has 5 frames of 16 by 18 pixels; .* multiples of 4"),
    ],
)
def test_videos_that_would_be_cut_are_refused(tmp_path, shape, message):
    clip = torch.zeros(shape, dtype=torch.uint8), "one"
    with pytest.raises(ValueError, match=message):
        encode_clips(tiny_wan_pipeline(), [clip], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": "8,4"}, "window: got '8,4', accepted is 3 of a whole number"),
        ({"window": "0,4,4"}, r"window: got \(0, 4, 4\), expected three positive"),
        ({"radius": 2}, "radius: given, but only method 'clear' has it"),
        ({"branch_mix": "max"}, "branch_mix: got 'max', expected one of"),
        ({"random_flip": True}, "random_flip: given, but method 'mate' learns from a folder"),
        (
            {"train_data_dir": None, "train_prompts": "prompts.txt"},
            "train_data_dir: missing, but method 'mate' learns from a folder",
        ),
        ({"feature_layers": ("down_blocks",)}, "feature_layers: 'down_blocks' selects"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distill(settings(tmp_path, **changes), pipeline=tiny_wan_pipeline())
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3, 4),), r"0.safetensors has 'latents' of shape \[4, 3, 4\]; expected \[C, T, h, w"),
        (((5, 3, 4, 4),), r"has latents of shape \(5, 3, 4, 4\); WanTransformer3DModel takes 4"),
        (((4, 3, 4, 5),), r"has latents of shape \(4, 3, 4, 5\); .* multiples of \(1, 2, 2\)"),
        ((), "train_data_dir: no clips"),
    ],
)
def test_clips_that_do_not_fit_are_refused_by_name(tmp_path, shapes, message):
    folder = clips(tmp_path, shapes)
    config = settings(tmp_path, train_data_dir=str(folder))
    with pytest.raises(ValueError, match=message):
        distill(config, pipeline=tiny_wan_pipeline())
    assert not (tmp_path / "out").exists()


def test_a_clip_needs_a_caption_and_has_to_be_readable(tmp_path):
    folder = clips(tmp_path)
    (folder / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"train_data_dir: .*1.safetensors has no caption"):
        clip_folder(folder)
    (folder / "0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"train_data_dir: cannot read .*0.safetensors"):
        clip_folder(folder)
    with pytest.raises(ValueError, match="train_data_dir: there is no folder"):
        clip_folder(tmp_path / "none")


def test_pipelines_that_are_not_text_to_video_are_refused(tmp_path):
    two = tiny_wan_pipeline(transformer_2=tiny_wan())
    with pytest.raises(ValueError, match="WanPipeline has a transformer and a transformer_2"):
        distill(settings(tmp_path), pipeline=two)
    image = tiny_wan_pipeline(transformer=tiny_wan(in_channels=9))
    with pytest.raises(ValueError, match="takes 9 channels and predicts 4"):
        distill(settings(tmp_path), pipeline=image)
    with pytest.raises(ValueError, match="FluxTransformer2DModel has no self-attention that MATE"):
        distill(settings(tmp_path), pipeline=tiny_flux_pipeline())
    with pytest.raises(ValueError, match="prediction_type: the scheduler has 'sample'"):
        VideoTeacher(tiny_cogvideox_pipeline(prediction_type="sample"))
