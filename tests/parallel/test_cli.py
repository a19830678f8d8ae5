"""The command line on ranks: what the first one writes is what one process writes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from linfusion.cli import main
from linfusion.cli.ranks import join_ranks
from tests.parallel.pool import ALL, cases, run


def command_job(ranks, arguments):
    os.environ["WORLD_SIZE"] = "4"  # as torchrun says
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code
    finally:
        del os.environ["WORLD_SIZE"]


COMMANDS = {
    "generate": ["--size", "128", "--steps", "1", "--parallel", "cfg=2,sp=2"],
    "upscale": [
        *("--size", "144", "--base-size", "128", "--steps", "2", "--strength", "0.5"),
        *("--memory-budget", "400MB", "--parallel", "sp=4"),
    ],
}


@pytest.mark.parametrize("command", cases(["generate"], ["upscale"]))
def test_a_command_on_ranks_draws_the_picture_of_one(command, tmp_path, capsys):
    alone, together = tmp_path / "alone.png", tmp_path / "together.png"
    given = [command, "a red apple", "--seed", "5", *COMMANDS[command]]
    with pytest.raises(SystemExit) as stop:
        main([*given[:-2], "-o", str(alone)])
    assert not stop.value.code, capsys.readouterr().err
    assert not any(run(4, command_job, [*given, "-o", str(together)]))
    a, b = (np.asarray(Image.open(path)).astype(int) for path in (alone, together))
    assert a.std() > 10 and abs(a - b).max() <= 1  # rounding to 8 bits may go either way


@pytest.mark.skipif(not ALL, reason="make parallel")
def test_a_video_on_ranks_is_that_of_one(tmp_path, capsys):
    given = ["video", "a red apple", "--seed", "5", "--steps", "1", "--seconds", "1"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    with pytest.raises(SystemExit) as stop:
        main([*given, "-o", str(alone)])
    assert not stop.value.code, capsys.readouterr().err
    given += ["--parallel", "sp=4"]
    assert not any(run(4, command_job, [*given, "-o", str(together)]))
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in together.iterdir()) and names
    for name in names:
        a, b = (np.asarray(Image.open(d / name)).astype(int) for d in (alone, together))
        assert abs(a - b).max() <= 1


@pytest.mark.parametrize("text", ["4", "sp=0", "sp=2,sp=2", "sp=2 tp=2", "tp=2", "sp=2;cfg=2"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match=r"parallel: .*; accepted are sp=N and cfg=2,sp=N"):
        join_ranks(text)


def test_one_process_is_told_how_to_start_several(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"there is one process; start several, as in torchrun"):
        join_ranks("sp=2")
