"""`linfusion upscale` and examples/generate_16k.py, on a tiny pipeline with random weights."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import linfusion
from linfusion import zoo
from linfusion.cli import main
from linfusion.files.picture_reader import read_parameters
from linfusion.students import saving as weights
from tests.tiny import tiny_image, tiny_sd_pipeline
from tests.tiny_joint import tiny_flux_pipeline

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny pipeline with a student in its subfolder `linfusion`."""
    folder = tmp_path_factory.mktemp("zoo") / "emoji"
    pipe = tiny_sd_pipeline(image_encoder=None)
    pipe.save_pretrained(folder)
    weights.save(linfusion.linearize(pipe), folder / "linfusion")
    return folder


@pytest.fixture
def upscale(model, capsys):
    """Call `linfusion upscale` on the tiny pipeline; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        common = ["upscale", "-m", model, "--steps", 4, "--guidance-scale", 1]
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in [*common, *arguments]])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_upscale_writes_the_picture_it_names(upscale, tmp_path):
    file = tmp_path / "new" / "x.png"
    code, out, err = upscale(PROMPT, "--size", "96x72", "--strength", 0.5, "--seed", 3, "-o", file)
    assert (code, out) == (0, f"{file}\n"), err
    assert Image.open(file).size == (96, 72)
    assert Image.open(file.with_name("x.preview.png")).size == (96, 72)


def test_a_pipeline_of_videos_is_refused_as_what_it_is(upscale, tmp_path):
    code, _, err = upscale(PROMPT, "-m", "zoo:emoji-video", "--size", 256, "-o", tmp_path / "x.png")
    assert code == 2
    assert "pipe: got LinGenPipeline; accepted is a text-to-image pipeline" in err


def test_json_says_what_made_the_picture(upscale, tmp_path):
    picture = tmp_path / "small.png"
    tiny_image(size=64).save(picture)
    code, out, err = upscale(
        *(PROMPT, "--size", 96, "--image", picture, "--strength", 0.5, "--seed", 3),
        *("-o", tmp_path / "x.png", "--json"),
    )
    assert code == 0, err
    told = json.loads(out)
    assert (told["width"], told["height"], told["seed"]) == (96, 96, 3)
    assert told["stages"] == read_parameters(tmp_path / "x.png")["stages"]
    assert [s["strength"] for s in told["stages"]] == [0.5]


def test_a_dry_run_prints_the_plan_alone(upscale, tmp_path):
    code, out, err = upscale(PROMPT, "--size", 64, "--dry-run", "--json", "-o", tmp_path / "x.png")
    assert code == 0, err
    assert [w["what"] for w in json.loads(out)["work"]] == ["denoise", "decode"]
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_goes_on_to_the_same_file(upscale, tmp_path):
    common = (PROMPT, "--size", 64, "--state", tmp_path / "run", "--resume")
    assert upscale(*common, "-o", tmp_path / "a.png")[0] == 0
    assert upscale(*common, "-o", tmp_path / "b.png")[0] == 0  # without a seed: that of the run
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "size: missing"),
        (["--size", 100], "height: 100 px; accepted are multiples of 8"),
        (["--size", 96, "--strength", 2], "strength: 2.0; accepted are numbers above 0, up to 1"),
        (["--size", 96, "--resume"], "resume: needs --state"),
        (["--size", 96, "-o", "x.gif"], "output: 'x.gif'; accepted are .png"),
        (["--size", 96, "--memory-budget", "much"], "memory_budget: got 'much'"),
        (["--size", 64, "--memory-budget", "1MB"], "memory_budget: got '1MB'; 64×64 needs at"),
        (["--size", 96, "--strategy", "tiles"], "'tiles' is not one of"),
        (["--size", 96, "--image", "nowhere.png"], "nowhere.png"),
        (["--size", 96, "--scratch", "/nowhere"], "scratch: there is no folder /nowhere"),
    ],
)
def test_a_wrong_call_ends_with_2_and_one_line(upscale, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = upscale(PROMPT, *arguments)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("linfusion: ") and message in last
    assert list(tmp_path.iterdir()) == []


def test_the_16k_example_prints_its_plan_and_draws(model, tmp_path, monkeypatch, capsys):
    file = Path(__file__).parents[2] / "examples" / "generate_16k.py"
    spec = importlib.util.spec_from_file_location("generate_16k", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(zoo, "_ROOT", model.parent)
    monkeypatch.setattr(module, "BASE", 64)
    monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(module, "STRENGTHS", (0.5,))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate_16k.py", "--size", "128", "--prompt", PROMPT])
    module.main()
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "16k.png"
    assert "128×128" in out
    assert Image.open("16k.png").size == (128, 128)


@pytest.fixture(scope="module")
def flux_model(tmp_path_factory):
    """Folder of a tiny FLUX pipeline with a CLEAR student in its subfolder `clear`."""
    folder = tmp_path_factory.mktemp("flux") / "flux"
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(folder)
    weights.save(linfusion.linearize(pipe, "clear", radius=2.5), folder / "clear")
    return folder


@pytest.fixture
def upscale_flux(flux_model, capsys):
    """Call `linfusion upscale` on the tiny FLUX; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        common = ["upscale", PROMPT, "-m", flux_model, "--size", 64, "--base-size", 32]
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in [*common, "--steps", 4, *arguments]])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def test_flux_draws_with_the_student_in_its_folder(upscale_flux, tmp_path):
    given = ("--seed", 3, "-o", tmp_path / "x.png", "--json")
    code, out, err = upscale_flux(*given, "--shift", 5, "--low-resolution-guidance", 0.5)
    assert code == 0, err
    told = json.loads(out)
    assert (told["shift"], told["attention"]["radius"], told["attention"]["ntk"]) == (5, 2.5, 10)
    assert [(s["guidance_scale"], s["pull"]) for s in told["stages"]] == [(3.5, 0), (7.5, 0.5)]
    assert Image.open(tmp_path / "x.png").size == (64, 64)


def test_flux_goes_without_windows(upscale_flux, tmp_path):
    code, out, err = upscale_flux("--softmax", "-o", tmp_path / "x.png", "--json")
    assert code == 0, err
    assert json.loads(out)["attention"] == "softmax"


def test_flux_prints_its_plan(upscale_flux, tmp_path):
    code, out, err = upscale_flux("--dry-run", "--json", "-o", tmp_path / "x.png")
    assert code == 0, err
    assert len(json.loads(out)["work"]) == 5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--method", "linfusion"],
            "method: got 'linfusion'; FluxTransformer2DModel takes 'clear'",
        ),
        (["--strategy", "guided"], "strategy: 'guided' dilates convolutions"),
        (["--shift", -1], "shift: got -1.0; accepted are numbers above 0"),
        (["--negative-prompt", "b"], "negative_prompt: got 'b', which FluxPipeline would not read"),
    ],
)
def test_a_wrong_call_of_flux_ends_with_2_and_one_line(upscale_flux, arguments, message):
    code, out, err = upscale_flux(*arguments)
    assert (code, out) == (2, "")
    assert message in err.strip().splitlines()[-1]
