"""A run that was killed ends with the bits of one that was not."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from linfusion import HighResPipeline
from linfusion.files.picture_reader import read
from linfusion.pipelines.state import State, pack, seed_of
from tests.pipelines.highres.killed import CASES, DEATHS
from tests.tiny import tiny_scheduler, tiny_sd_pipeline

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler"),
    *("PNDMScheduler", "UniPCMultistepScheduler"),
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder of the runs of `killed`, and how each of them ended."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.highres.killed", str(folder)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    ends = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    return folder, ends, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_was_killed_ends_with_the_same_file(killed, case):
    folder, ends, log = killed
    assert ends[case] == ["0", *["9"] * len(DEATHS), "0"], log
    alone, resumed = (folder / case / name for name in ("alone", "killed"))
    for file in ("picture.png", "state/stage-00.safetensors", "state/stage-01.safetensors"):
        assert (resumed / file).read_bytes() == (alone / file).read_bytes()


def test_a_finished_run_leaves_no_unfinished_files(killed):
    folder, _, _ = killed
    left = {p.name for p in (folder / "ddim" / "killed").rglob("*") if p.is_file()}
    assert left == {
        "parameters.json",
        "picture.png",
        "picture.preview.png",
        "stage-00.safetensors",
        "stage-01.safetensors",
        "start-01.safetensors",
    }


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_a_scheduler_remembers_survives_the_file(name, tmp_path):
    kind = getattr(diffusers, name)
    ours, theirs = (kind.from_config(tiny_scheduler().config) for _ in range(2))
    state = State(tmp_path / "run", {}, resume=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 4, generator=generator)
    draws = "generator" in ours.step.__code__.co_varnames
    more = {"generator": generator} if draws else {}
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
    for t in ours.timesteps[:4]:
        x = ours.step(torch.sin(x), t, x, **more).prev_sample
    state.save_step(0, 4, x, generator, ours)
    step = state.step(0)
    theirs.__dict__.update(step.scheduler)
    ends = []
    for scheduler, y in ((ours, x), (theirs, step.latents)):
        generator.set_state(step.generator)
        for t in scheduler.timesteps[4:]:
            y = scheduler.step(torch.sin(y), t, y, **more).prev_sample
        ends.append(y)
    assert torch.equal(*ends)


def test_a_scheduler_with_noise_of_its_own_is_refused():
    scheduler = tiny_scheduler()
    scheduler.noise_sampler = None  # as DPMSolverSDEScheduler has it before its first step
    with pytest.raises(ValueError, match=r"state: DDIMScheduler keeps .* in noise_sampler"):
        pack(scheduler, {})


def draw(state, **changes):
    arguments = {
        "prompt": "a red apple",
        "size": 64,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "pt",
        "state": state,
    }
    pipe = changes.pop("pipe", None) or tiny_sd_pipeline()
    return HighResPipeline(pipe)(**{**arguments, **changes}).images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    draw(folder)
    return folder


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"prompt": "a pear"}, "prompt"),
        ({"generator": torch.Generator().manual_seed(2)}, "seed"),
        ({"num_inference_steps": 3}, "num_inference_steps"),
        ({"pipe": tiny_sd_pipeline(seed=1)}, "model.unet"),
        ({"eta": 0.5}, "eta"),
    ],
)
def test_a_run_with_other_parameters_is_refused_and_they_are_named(run, changes, named):
    with pytest.raises(ValueError, match=rf"state: .* other parameters: .*{named} \("):
        draw(run, resume=True, **changes)


def test_a_folder_that_holds_a_run_is_not_written_over(run):
    with pytest.raises(ValueError, match=r"state: .* holds a run; pass resume=True"):
        draw(run)


def test_without_a_generator_the_seed_of_the_run_is_taken(run):
    assert torch.equal(draw(run, resume=True, generator=None), draw(run, resume=True))


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume: got True without state"):
        draw(None, resume=True)


def test_another_budget_may_go_on_with_a_run(tmp_path):
    stop = {"callback_on_step_end": lambda p, i, t, k: 1 / 0 if i == 1 else {}}
    with pytest.raises(ZeroDivisionError):
        draw(tmp_path / "run", **stop)
    highres = HighResPipeline(tiny_sd_pipeline(), memory_budget="30MB")
    given = {"num_inference_steps": 2, "guidance_scale": 1.0, "output": tmp_path / "x.png"}
    generator = torch.Generator().manual_seed(1)
    highres(
        "a red apple", size=64, generator=generator, state=tmp_path / "run", resume=True, **given
    )
    whole = draw(None)[0].permute(1, 2, 0).mul(255).round()
    assert (torch.from_numpy(read(tmp_path / "x.png")).float() - whole).abs().max() <= 1


def test_a_full_disk_is_said_and_leaves_what_was_kept(tmp_path, monkeypatch):
    real, written = os.fsync, 0

    def fsync(file):
        nonlocal written
        written += 1
        if written > 4:  # parameters and the first step, each with its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"state: no .* bytes could be written"):
        draw(tmp_path / "run")
    monkeypatch.undo()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"parameters.json", "step.safetensors"}
    assert torch.equal(draw(tmp_path / "run", resume=True), draw(None))


@pytest.mark.parametrize("name", ["parameters.json", "stage-00.safetensors"])
def test_a_flipped_bit_anywhere_in_a_state_is_noticed_and_the_file_is_named(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / name
    whole = file.read_bytes()
    state = State(None, {}, resume=False)
    state.folder = tmp_path / "run"
    for position in range(0, len(whole), max(1, len(whole) // 200)):
        file.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :]
        )
        with pytest.raises(ValueError, match=rf"state: .*{name} is damaged"):
            seed_of(tmp_path / "run")
            state.read("stage-00")
    state.folder = None
    with pytest.raises(ValueError, match=rf"state: .*{name} is damaged"):
        draw(tmp_path / "run", resume=True)


def test_a_second_run_in_a_state_folder_is_refused_until_the_first_ends(tmp_path):
    def look(pipe, i, t, kwargs):
        with pytest.raises(ValueError, match=r"state: .* is in use by another run"):
            draw(tmp_path / "run", resume=True)
        return {}

    draw(tmp_path / "run", callback_on_step_end=look)
    draw(tmp_path / "run", resume=True)
