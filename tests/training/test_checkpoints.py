"""What a run leaves on disk: whole, unharmed, its own, and readable by who may."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from accelerate import Accelerator

from linfusion.files.whole_files import Lock
from linfusion.training import distill
from linfusion.training.checkpoints import check_files
from tests.tiny import tiny_sd_pipeline
from tests.training.test_trainer import WEIGHTS, same, settings


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a run of 4 steps with checkpoints after 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    distill(settings(folder, checkpointing_steps=2), pipeline=tiny_sd_pipeline())
    return folder


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done / "out", tmp_path / "out")
    shutil.copytree(done / "pictures", tmp_path / "pictures")
    return tmp_path / "out"


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_noticed_and_named(copy):
    checkpoint = copy / "checkpoint-4"
    check_files(checkpoint)
    files = sorted(checkpoint.iterdir())
    assert len(files) >= 6
    for file in files:
        whole = file.read_bytes()
        for position in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            spoilt = bytearray(whole)
            spoilt[position] ^= 1 << position % 8
            file.write_bytes(spoilt)
            with pytest.raises(ValueError, match=rf"resume_from_checkpoint: .*{file.name}"):
                check_files(checkpoint)
        file.write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{file.name} is empty"):
            check_files(checkpoint)
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file.name}"):
            check_files(checkpoint)
        file.write_bytes(whole)
    check_files(checkpoint)


def test_latest_falls_back_to_the_checkpoint_before_and_says_so(copy, done):
    (copy / "checkpoint-4" / "optimizer.bin").write_bytes(b"")
    config = settings(copy.parent, checkpointing_steps=2, resume_from_checkpoint="latest")
    with pytest.warns(UserWarning, match=r"checkpoint-4/optimizer.bin is empty.*the one before"):
        out = distill(config, pipeline=tiny_sd_pipeline())
    assert same(out / WEIGHTS, done / "out" / WEIGHTS)
    check_files(out / "checkpoint-4")  # it was written anew


def test_a_damaged_checkpoint_that_was_named_is_refused(copy):
    (copy / "checkpoint-2" / "student.safetensors").write_bytes(bytes(100))
    named = str(copy / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2/student.safetensors is damaged"):
        distill(settings(copy.parent, resume_from_checkpoint=named), pipeline=tiny_sd_pipeline())


def test_without_a_whole_checkpoint_nothing_is_begun_anew(copy):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / "files.json").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-2/files.json"), \
            pytest.warns(UserWarning, match="checkpoint-4"):  # fmt: skip
        distill(settings(copy.parent, resume_from_checkpoint="latest"), pipeline=tiny_sd_pipeline())


def test_a_second_run_in_an_output_folder_is_refused_and_changes_nothing(copy):
    before = sorted((p.name, p.stat().st_mtime_ns) for p in copy.rglob("*"))
    config = settings(copy.parent, resume_from_checkpoint="latest")
    said = r"output_dir: .* is in use by another run"
    with Lock(copy, "output_dir"), pytest.raises(ValueError, match=said):
        distill(config, pipeline=tiny_sd_pipeline())
    after = sorted((p.name, p.stat().st_mtime_ns) for p in copy.rglob("*"))
    assert [x for x in after if "cache" not in x[0]] == [x for x in before if "cache" not in x[0]]


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0"),
])  # fmt: skip
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, error):
    real, calls = Accelerator.save_state, []

    def save(self, folder):
        calls.append(folder)
        if len(calls) == 2:
            Path(folder, "optimizer.bin").write_bytes(b"half")
            raise error
        return real(self, folder)

    monkeypatch.setattr(Accelerator, "save_state", save)
    config = settings(tmp_path, checkpointing_steps=1, max_train_steps=3)
    said = (
        r"output_dir: .*checkpoint-2 could not be written.*"
        r'checkpoint-1 is whole: resume_from_checkpoint="latest"'
    )
    with pytest.raises(OSError, match=said):
        distill(config, pipeline=tiny_sd_pipeline())
    monkeypatch.undo()
    out = Path(config.output_dir)
    assert {p.name for p in out.glob("*checkpoint*")} == {"checkpoint-1"}
    assert not list(out.glob(".*"))
    whole = distill(settings(tmp_path, max_train_steps=3, output_dir=str(tmp_path / "whole")),
                    pipeline=tiny_sd_pipeline())  # fmt: skip
    config.resume_from_checkpoint = "latest"
    assert same(distill(config, pipeline=tiny_sd_pipeline()) / WEIGHTS, whole / WEIGHTS)


def test_everything_is_written_with_the_mode_of_the_umask(done):
    before = os.umask(0)
    os.umask(before)
    files = [p for p in (done / "out").rglob("*") if p.is_file()]
    assert len(files) > 10
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o666 & ~before}


def test_a_finished_run_leaves_no_hidden_files(done):
    assert not list((done / "out").rglob(".*"))
