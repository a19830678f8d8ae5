"""Whole runs of the trainer, small; one of them killed."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import linfusion
from linfusion.training import TrainConfig, distill
from tests.tiny import (
    run,
    tiny_image,
    tiny_scheduler,
    tiny_sd_pipeline,
    tiny_xl_pipeline,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"


def settings(tmp_path, **changes):
    folder = tmp_path / "pictures"
    if not folder.exists():
        folder.mkdir()
        for i in range(6):
            tiny_image(i, 32).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"picture {i}")
    return TrainConfig.of(
        **{
            "train_data_dir": str(folder),
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "resolution": 32,
            "train_batch_size": 4,
            "max_train_steps": 4,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "ema_decay": 0.5,
            **changes,
        }
    )


def same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_gives_weights_that_linearize_takes_and_the_unet_as_it_was(tmp_path):
    pipe = tiny_sd_pipeline()
    before = run(pipe)
    out = distill(settings(tmp_path), pipeline=pipe)
    assert torch.equal(run(pipe), before)
    linfusion.linearize(pipe, "linfusion", weights=out)
    assert not torch.equal(run(pipe), before)


def test_what_is_saved_is_the_average(tmp_path):
    out = distill(settings(tmp_path, max_train_steps=5), pipeline=tiny_sd_pipeline())
    average = load_file(out / "checkpoint-5" / "ema.safetensors")
    last = load_file(out / "checkpoint-5" / "student.safetensors")
    saved = load_file(out / WEIGHTS)
    assert saved.keys() == average.keys()
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


def test_equal_settings_give_equal_weights(tmp_path):
    first = distill(settings(tmp_path), pipeline=tiny_sd_pipeline())
    second = distill(
        settings(tmp_path, output_dir=str(tmp_path / "2")), pipeline=tiny_sd_pipeline()
    )
    third = distill(
        settings(tmp_path, output_dir=str(tmp_path / "3"), seed=1), pipeline=tiny_sd_pipeline()
    )
    assert same(first / WEIGHTS, second / WEIGHTS)
    assert not same(first / WEIGHTS, third / WEIGHTS)


def test_only_so_many_checkpoints_are_kept(tmp_path):
    out = distill(
        settings(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2),
        pipeline=tiny_sd_pipeline(),
    )
    assert sorted(p.name for p in out.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("accumulation, optimizer", [(1, "adamw"), (2, "adamw"), (1, "muon")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, accumulation, optimizer):
    changes = {
        "max_train_steps": 5,
        "gradient_accumulation_steps": accumulation,
        "optimizer": optimizer,
        "checkpointing_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 1,
    }
    whole = distill(settings(tmp_path, **changes), pipeline=tiny_sd_pipeline())
    resumed = distill(
        settings(
            tmp_path,
            **changes,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(whole / "checkpoint-2"),
        ),
        pipeline=tiny_sd_pipeline(),
    )
    assert same(resumed / WEIGHTS, whole / WEIGHTS)
    assert same(
        resumed / "checkpoint-5/student.safetensors", whole / "checkpoint-5/student.safetensors"
    )


def test_a_run_killed_at_any_instant_resumes_to_the_same_weights(tmp_path):
    """SIGKILL at moments that differ, during steps and checkpoint writes alike."""
    tiny_sd_pipeline().save_pretrained(tmp_path / "pipe")
    base = settings(
        tmp_path,
        pretrained_model_name_or_path=str(tmp_path / "pipe"),
        max_train_steps=20,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
    )
    whole = distill(dataclasses.replace(base, output_dir=str(tmp_path / "whole")))
    config = dataclasses.replace(base, output_dir=str(tmp_path / "killed"))
    program = (
        "import json, sys; from linfusion.training import TrainConfig, distill;"
        "distill(TrainConfig(**json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(config))]
    out, kills = Path(config.output_dir), 0
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    while True:
        reached = len_of_latest(out)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        # Long enough to get somewhere, and each time another instant of a step or a write.
        while process.poll() is None and len_of_latest(out) < reached + 6:
            time.sleep(0.002)
        time.sleep(0.013 * kills)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    assert same(out / WEIGHTS, whole / WEIGHTS)


def len_of_latest(out):
    return max((int(p.name.partition("-")[2]) for p in out.glob("checkpoint-*")), default=0)


def test_a_checkpoint_half_written_is_never_taken_for_one(tmp_path):
    config = settings(tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    out = Path(config.output_dir)
    (out / ".partial-99").mkdir(parents=True)
    (out / ".partial-99" / "optimizer.bin").write_bytes(b"half")
    distill(config, pipeline=tiny_sd_pipeline())
    assert sorted(p.name for p in out.glob("*9*")) == []
    assert (out / "checkpoint-4").is_dir()


def test_a_resumed_run_with_other_settings_warns(tmp_path):
    out = distill(settings(tmp_path, checkpointing_steps=2), pipeline=tiny_sd_pipeline())
    changed = settings(
        tmp_path, learning_rate=1e-3, resume_from_checkpoint=str(out / "checkpoint-2")
    )
    with pytest.warns(UserWarning, match=r"other settings \(learning_rate\)"):
        distill(changed, pipeline=tiny_sd_pipeline())


def test_a_new_run_does_not_mix_with_an_earlier_one(tmp_path):
    out = distill(settings(tmp_path, max_train_steps=1), pipeline=tiny_sd_pipeline())
    with pytest.raises(ValueError, match=r"output_dir: .* has checkpoints of an earlier run"):
        distill(settings(tmp_path), pipeline=tiny_sd_pipeline())
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-1"]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    config = settings(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: got .*checkpoint-7, accepted"):
        distill(config, pipeline=tiny_sd_pipeline())


def test_validation_draws_a_grid_and_changes_nothing(tmp_path):
    plain = distill(settings(tmp_path), pipeline=tiny_sd_pipeline())
    watched = distill(
        settings(
            tmp_path,
            output_dir=str(tmp_path / "watched"),
            validation_prompts=("a", "b"),
            validation_steps=2,
            teacher_steps=2,
        ),
        pipeline=tiny_sd_pipeline(),
    )
    from PIL import Image

    assert Image.open(watched / "samples" / "step-0000004.png").size == (64, 64)
    assert same(plain / WEIGHTS, watched / WEIGHTS)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_sdxl_distils(tmp_path, precision):
    out = distill(
        settings(tmp_path, max_train_steps=2, mixed_precision=precision),
        pipeline=tiny_xl_pipeline(),
    )
    assert all(t.isfinite().all() for t in load_file(out / WEIGHTS).values())


def test_a_run_that_failed_leaves_the_next_one_its_own_precision(tmp_path):
    config = settings(tmp_path, max_train_steps=1)
    broken = tmp_path / "pictures" / "0.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"train_data_dir: .*0\.png.*truncated"):
        distill(config, pipeline=tiny_sd_pipeline())
    broken.write_bytes(whole)
    distill(
        settings(tmp_path, max_train_steps=1, mixed_precision="bf16"), pipeline=tiny_sd_pipeline()
    )


def test_gradient_checkpointing_gives_the_same_student(tmp_path):
    plain = distill(settings(tmp_path), pipeline=tiny_sd_pipeline())
    pipe = tiny_sd_pipeline()
    saved = distill(
        settings(tmp_path, output_dir=str(tmp_path / "saved"), gradient_checkpointing=True),
        pipeline=pipe,
    )
    assert not pipe.unet.is_gradient_checkpointing
    a, b = load_file(plain / WEIGHTS), load_file(saved / WEIGHTS)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5)


def test_v_prediction_distils(tmp_path):
    scheduler = tiny_scheduler()
    scheduler.register_to_config(prediction_type="v_prediction")
    out = distill(settings(tmp_path), pipeline=tiny_sd_pipeline(scheduler=scheduler))
    plain = settings(tmp_path, output_dir=str(tmp_path / "epsilon"))
    assert not same(out / WEIGHTS, distill(plain, pipeline=tiny_sd_pipeline()) / WEIGHTS)


def test_steps_are_counted_in_passes_where_they_are_not_given(tmp_path):
    out = distill(
        settings(tmp_path, max_train_steps=None, num_train_epochs=2), pipeline=tiny_sd_pipeline()
    )
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-4"]  # 2 × ⌈6 / 4⌉


def test_tensorboard_gets_the_losses_and_a_rate_that_warms_up(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = distill(
        settings(
            tmp_path,
            report_to="tensorboard",
            logging_steps=1,
            learning_rate=4e-3,
            lr_warmup_steps=4,
        ),
        pipeline=tiny_sd_pipeline(),
    )
    events = EventAccumulator(str(out / "logs" / "linfusion")).Reload()
    logged = {
        name: [scalar.value for scalar in events.Scalars(name)]
        for name in ("loss", "simple", "kd", "feature", "lr")
    }
    assert logged["lr"] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3])
    for loss, simple, kd, feature in zip(*list(logged.values())[:4], strict=True):
        assert loss == pytest.approx(simple + 0.5 * kd + 0.5 * feature, rel=1e-5)


def wrong_weights(tmp_path):
    return {"weights": str(tmp_path / "nowhere")}, "weights: cannot read .*nowhere"


def wrong_resolution(tmp_path):
    return {"resolution": 33}, "resolution: got 33x33, accepted are multiples of 8"


def wrong_output(tmp_path):
    (tmp_path / "file").write_text("")
    return {"output_dir": str(tmp_path / "file" / "out")}, "output_dir: cannot write to .*file/out"


def wrong_cache(tmp_path):
    (tmp_path / "file").write_text("")
    return {"cache_dir": str(tmp_path / "file" / "c")}, "cache_dir: cannot write to .*file/c"


def wrong_prompts(tmp_path):
    changes = {"train_data_dir": None, "train_prompts": str(tmp_path / "none.txt")}
    return changes, "train_prompts: there is no file .*none.txt"


@pytest.mark.parametrize(
    "wrong", [wrong_weights, wrong_resolution, wrong_output, wrong_cache, wrong_prompts]
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, wrong):
    changes, said = wrong(tmp_path)
    config, pipe = settings(tmp_path, **changes), tiny_sd_pipeline()
    before = run(pipe)
    with pytest.raises(ValueError, match=said):
        distill(config, pipeline=pipe)
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.safetensors"))
    assert torch.equal(run(pipe), before)


def test_a_pipeline_that_is_linear_already_is_refused_and_stays_so(tmp_path):
    pipe = linfusion.linearize(tiny_sd_pipeline(), "linfusion")
    before = run(pipe)
    with pytest.raises(ValueError, match="is linearized already"):
        distill(settings(tmp_path), pipeline=pipe)
    assert torch.equal(run(pipe), before)


def test_a_pipeline_without_a_unet_is_refused(tmp_path):
    pipe = tiny_sd_pipeline()
    pipe.unet = None
    with pytest.raises(ValueError, match="StableDiffusionPipeline has neither a unet"):
        distill(settings(tmp_path), pipeline=pipe)


def test_an_unknown_prediction_type_is_refused_before_anything_is_written(tmp_path):
    scheduler = tiny_scheduler()
    scheduler.register_to_config(prediction_type="sample")
    config = settings(tmp_path)
    with pytest.raises(ValueError, match="prediction_type: the scheduler has 'sample'"):
        distill(config, pipeline=tiny_sd_pipeline(scheduler=scheduler))
    assert not Path(config.output_dir).exists() and not Path(config.cache_path).exists()


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"linfusion\[train\]"):
        distill(settings(tmp_path, report_to="tensorboard"), pipeline=tiny_sd_pipeline())


def test_a_failed_run_gives_the_unet_back(tmp_path, monkeypatch):
    pipe = tiny_sd_pipeline()
    before = run(pipe)
    monkeypatch.setattr("linfusion.training.trainer._losses", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        distill(settings(tmp_path), pipeline=pipe)
    assert torch.equal(run(pipe), before)


@pytest.mark.parametrize("changes, said", [
    ({"in_channels": 9}, "takes 9 channels and predicts 4"),
    ({"num_class_embeds": 10}, "conditioned by num_class_embeds=10"),
    ({"class_embed_type": "timestep"}, "conditioned by class_embed_type='timestep'"),
    ({"addition_embed_type": "text"}, "conditioned by addition_embed_type='text'"),
])  # fmt: skip
def test_a_unet_that_is_given_more_than_text_is_refused_before_the_cache(tmp_path, changes, said):
    pipe = tiny_sd_pipeline()
    pipe.unet.register_to_config(**changes)  # as of inpainting, upscaling, unCLIP
    with pytest.raises(ValueError, match=f"pretrained_model_name_or_path: .*{said}"):
        distill(settings(tmp_path), pipeline=pipe)
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
