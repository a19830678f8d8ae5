"""The `linfusion` command, run as a user runs it, on a tiny pipeline with random weights."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import linfusion
from linfusion import zoo
from linfusion.cli import main
from linfusion.students import saving as weights
from tests.tiny import tiny_image, tiny_sd_pipeline
from tests.tiny_joint import tiny_flow_vae, tiny_flux_pipeline

PROMPT = "a red apple"
generate_module = sys.modules["linfusion.cli.generate"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny pipeline with a trained-looking student in its subfolder `linfusion`."""
    folder = tmp_path_factory.mktemp("tiny")
    pipe = tiny_sd_pipeline(image_encoder=None)
    pipe.save_pretrained(folder)
    linfusion.linearize(pipe)
    torch.manual_seed(0)
    for name, parameter in pipe.unet.named_parameters():
        if ".linfusion." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    weights.save(pipe, folder / "linfusion", attention_weights=True)
    return folder


@pytest.fixture
def run(capsys):
    """Call the command line; gives exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def draw(run, model):
    """`generate` with two steps on the tiny pipeline."""

    def call(*arguments: object) -> tuple[int, str, str]:
        return run("generate", "-m", model, "--steps", 2, *arguments)

    return call


def test_generate_writes_the_picture_it_names(draw, tmp_path):
    code, out, _ = draw(PROMPT, "--seed", 3, "-o", tmp_path / "new")
    assert code == 0
    assert out == f"{tmp_path / 'new' / 'a-red-apple-3.png'}\n"
    assert Image.open(out.strip()).size == (64, 64)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a-red-apple-3.png"]


def test_json_is_all_there_is_on_stdout(draw, tmp_path):
    code, out, err = draw(PROMPT, "a pear", "--json", "--seed", 5, "-o", tmp_path)
    told = json.loads(out)
    assert code == 0
    assert [(i["prompt"], i["seed"]) for i in told["images"]] == [(PROMPT, 5), ("a pear", 6)]
    assert "loading" in err


def test_a_picture_carries_what_made_it(draw, tmp_path, model):
    draw(PROMPT, "--seed", 3, "--guidance-scale", 2, "-o", tmp_path / "x.png")
    about = json.loads(Image.open(tmp_path / "x.png").text["parameters"])
    assert about["prompt"] == PROMPT
    assert about["seed"] == 3
    assert about["weights"] == str(model / "linfusion")
    size = {"height": 64, "width": 64}
    assert about["call"] == {"num_inference_steps": 2, "guidance_scale": 2.0, **size}


def test_the_seed_decides_the_picture(draw, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw(PROMPT, "--seed", seed, "-o", tmp_path / f"{name}.png")
    a, b, c = (Image.open(tmp_path / f"{name}.png").tobytes() for name in "abc")
    assert a == b != c


def test_linear_and_softmax_draw_different_pictures(draw, tmp_path):
    draw(PROMPT, "--seed", 1, "-o", tmp_path / "linear.png")
    _, out, _ = draw(PROMPT, "--seed", 1, "--softmax", "--json", "-o", tmp_path / "softmax.png")
    linear, softmax = (Image.open(tmp_path / f"{n}.png").tobytes() for n in ("linear", "softmax"))
    assert linear != softmax
    assert json.loads(out)["method"] == "softmax"


def test_size_is_width_by_height(draw, tmp_path):
    draw(PROMPT, "--size", "96x64", "-o", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (96, 64)


def test_pictures_in_a_folder_are_never_overwritten(draw, tmp_path):
    for _ in range(2):
        assert draw(PROMPT, "--seed", 0, "--steps", 1, "-o", tmp_path)[0] == 0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["a-red-apple-0-1.png", "a-red-apple-0.png"]


def test_pipeline_kwargs_reach_the_pipeline(draw, tmp_path):
    code, out, _ = draw(
        PROMPT, "--json", "-o", tmp_path, "--pipeline-kwargs", '{"num_inference_steps": 1}'
    )
    assert code == 0
    assert json.loads(out)["call"]["num_inference_steps"] == 1


def test_a_zoo_model_is_found_by_its_name(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "_ROOT", model.parent)
    code, out, _ = run(
        "generate", PROMPT, "-m", f"zoo:{model.name}", "--steps", 1, "--json", "-o", tmp_path
    )
    assert code == 0
    assert json.loads(out)["weights"] == str(model / "linfusion")


WRONG = {
    "empty prompt": (["  "], "prompt: '  ' is empty; say what to draw"),
    "long prompt": (
        ["red apple " * 1000],
        "prompt: 10000 characters are 8000 tokens, but this model reads 75; shorten it.",
    ),
    "size": ([PROMPT, "--size", "big"], "size: 'big' is not a size; accepted are 512x768 and 512"),
    "height": ([PROMPT, "--height", "100"], "height: 100 px; accepted are multiples of 8"),
    "both sizes": (
        [PROMPT, "--size", "64", "--width", "64"],
        "size: give either --size or --height and --width",
    ),
    "steps": ([PROMPT, "--steps", "0"], "num_inference_steps: 0; accepted is 1 or more"),
    "guidance": ([PROMPT, "--guidance-scale", "nan"], "guidance_scale: nan; accepted is 0 or more"),
    "infinite guidance": (
        [PROMPT, "--guidance-scale", "inf"],
        "guidance_scale: inf; accepted are finite",
    ),
    "format": (
        [PROMPT, "-o", "x.jpg"],
        "output: 'x.jpg' is neither a .png file nor a folder",
    ),
    "one file": (
        [PROMPT, "a pear", "-o", "x.png"],
        "output: 'x.png' is one file, but 2 pictures are wanted",
    ),
    "unwritable": ([PROMPT, "-o", "/dev/null/x"], "output: cannot write to '/dev/null/x'"),
    "kwargs": (
        [PROMPT, "--pipeline-kwargs", "[1]"],
        "--pipeline-kwargs: expected a JSON object, got '[1]'",
    ),
    "lora": ([PROMPT, "--lora", "{}"], "--lora: expected lora_id and perhaps lora_scale"),
    "offload": (
        [PROMPT, "--cpu-offload", "model", "--device-map", "cpu"],
        "cpu_offload: 'model' needs a GPU, and the device is the CPU",
    ),
    "flash": (
        [PROMPT, "--attention-backend", "flash"],
        "attention_backend: 'flash' cannot be used here",
    ),
    "no backend": (
        [PROMPT, "--attention-backend", "magic"],
        "attention_backend: 'magic' is not one of _flash_3",
    ),
    "device": ([PROMPT, "--device", "foo"], "device: 'foo' is none; accepted are cuda, cuda:1"),
    "no such GPU": ([PROMPT, "--device-map", "cuda:99"], "device: 'cuda:99' is not here"),
    "balanced": ([PROMPT, "--device", "balanced"], "device: 'balanced' needs GPUs"),
    "huge": ([PROMPT, "--size", "1000000x1000000"], "height: 1000000 px; accepted are multiples"),
    "no argument": (
        [PROMPT, "--pipeline-kwargs", '{"speed": 1}'],
        "--pipeline-kwargs: StableDiffusionPipeline takes no 'speed'",
    ),
    "our argument": (
        [PROMPT, "--pipeline-kwargs", '{"output_type": "latent"}'],
        "--pipeline-kwargs: 'output_type' is set by this command",
    ),
    "clip skip": (
        [PROMPT, "--pipeline-kwargs", '{"clip_skip": 1}'],
        "--pipeline-kwargs: the pipeline fails with clip_skip (AttributeError:",
    ),
    "class": (["--class", "x"], "class: "),
    "backend": (
        [PROMPT, "--attention-backend", "native"],
        "attention_backend: 'native' would be without effect",
    ),
    "method": (
        [PROMPT, "--method", "magic"],
        "method: 'magic' is not one of ['clear', 'hybrid', 'linfusion', 'lit', 'mate']",
    ),
    "weights": ([PROMPT, "-w", "/nowhere"], "weights: there is no folder or file '/nowhere'"),
    "softmax": ([PROMPT, "--softmax", "-w", "x"], "--softmax: takes no --weights and no --layers"),
    "no prompt": ([], "prompt: missing; say what to draw (--class for a model of classes)"),
    "flag": ([PROMPT, "--nope"], "No such option: --nope"),
    "dtype": ([PROMPT, "--dtype", "int8"], "Invalid value for '--dtype'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_of_generate_says_why_in_one_line(draw, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    arguments, reason = WRONG[wrong]
    code, out, err = draw(*arguments)
    assert code == 2
    assert out == ""
    *_, last = err.rstrip("\n").splitlines()
    assert last.startswith(f"linfusion: {reason}")
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("zoo:cats", "no model 'cats' in the zoo"),
        ("./missing", "model: './missing' is not a folder; accepted are"),
        ("missing", "model: 'missing' is not a folder; accepted are"),
    ],
)
def test_an_unknown_model_is_refused_by_name(run, name, reason):
    code, _, err = run("generate", PROMPT, "-m", name)
    assert code == 2
    assert reason in err
    assert err.count("\n") == 1


def test_a_folder_that_is_no_pipeline_is_refused(run, tmp_path):
    code, _, err = run("summary", tmp_path)
    assert code == 2
    assert "has no model_index.json, so it is no pipeline" in err


def test_a_model_without_a_student_is_not_drawn_with(run, model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for part in model.iterdir():
        if part.name != "linfusion":
            (bare / part.name).symlink_to(part)
    code, _, err = run("generate", PROMPT, "-m", bare, "-o", tmp_path)
    assert code == 2
    assert f"weights: {bare} has no student in its folder" in err


def test_a_student_that_is_not_there_is_refused(run, model, tmp_path):
    code, _, err = run("generate", PROMPT, "-m", model, "-w", "clear-9", "-o", tmp_path)
    assert code == 2
    assert f"weights: {model} has no student 'clear-9', and there is no such folder; it has" in err


def test_summary_lists_every_layer(run, model):
    code, out, _ = run("summary", model, "--json")
    told = json.loads(out)
    assert code == 0
    assert told["method"] == "linfusion"
    assert len(told["layers"]) == 7
    assert all(layer["linear"] for layer in told["layers"])


def test_summary_shows_a_model_that_was_saved_linear_as_linear(run):
    code, out, err = run("summary", "zoo:emoji-lit", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["weights"] is None
    assert [layer["linear"] for layer in found["layers"]] == [True] * 8


def test_summary_is_readable_without_json(run, model):
    code, out, _ = run("summary", model)
    assert code == 0
    assert out.startswith("UNet2DConditionModel: 7 of 7 self-attention layers linear")


def test_weights_survive_conversion_there_and_back(run, model, tmp_path):
    ours, theirs, again = model / "linfusion", tmp_path / "theirs", tmp_path / "again"
    code, out, _ = run("convert", ours, theirs, "--to", "authors", "--json")
    assert code == 0
    assert json.loads(out)["to"] == "authors"
    assert run("convert", theirs, again)[0] == 0
    file = "diffusion_pytorch_model.safetensors"
    first, converted, last = (load_file(f / file) for f in (ours, theirs, again))
    assert "0.to_q_.0.weight" in converted
    assert set(first) == set(last)
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_conversion_asks_for_the_base_model_only_where_it_must(run, model, tmp_path):
    pipe = tiny_sd_pipeline()
    linfusion.linearize(pipe)
    part = weights.save(pipe, tmp_path / "part", attention_weights=False)
    code, _, err = run("convert", part, tmp_path / "theirs", "--to", "authors")
    assert code == 2
    assert "name the base model they come from with --model" in err
    assert not (tmp_path / "theirs").exists()
    assert run("convert", part, tmp_path / "theirs", "--to", "authors", "-m", model)[0] == 0


def test_conversion_overwrites_nothing(run, model):
    code, _, err = run("convert", model / "linfusion", model / "linfusion")
    assert code == 2
    assert "already holds weights" in err


def test_conversion_of_a_truncated_file_is_a_wrong_call(run, model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (model / "linfusion").iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.suffix == ".safetensors" else len(content)
        (broken / file.name).write_bytes(content[:cut])
    code, _, err = run("convert", broken, tmp_path / "out")
    assert code == 2
    assert f"weights: cannot read {broken}" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_info_names_what_is_installed(run):
    code, out, _ = run("info", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["linfusion"] == linfusion.__version__
    assert told["packages"]["torch"] == torch.__version__


def test_bench_times_both_layers(run):
    code, out, _ = run(
        "bench", "--size", "64x32", "--channels", 16, "--heads", 2, "--runs", 1, "--json"
    )
    (row,) = json.loads(out)["rows"]
    assert code == 0
    assert row["tokens"] == 32
    assert row["speedup"] == row["softmax_seconds"] / row["linear_seconds"]


def test_bench_refuses_heads_that_do_not_divide(run):
    code, _, err = run("bench", "--channels", 10, "--heads", 3)
    assert code == 2
    assert "channels: 10 is not a multiple of the 3 heads" in err


def test_a_device_that_is_not_here_is_refused(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("bench", "--device", "cuda:1")
    assert code == 2
    assert "device: 'cuda:1' is not here; this machine has" in err


def test_every_training_argument_is_a_flag(run):
    import dataclasses

    from linfusion.training.config import TrainConfig

    code, out, _ = run("train", "--help")
    assert code == 0
    for field in dataclasses.fields(TrainConfig):
        if field.name != "options":  # each of them is a flag
            assert f"--{field.name} " in out


def test_training_flags_reach_the_trainer(run, monkeypatch, tmp_path):
    import linfusion.training.trainer as trainer

    seen = []
    monkeypatch.setattr(trainer, "distill", lambda config: seen.append(config) or tmp_path)
    code, out, _ = run(
        *("train", "--train_data_dir", "pictures", "--output_dir", tmp_path, "--learning_rate"),
        *(0.01, "--max-train-steps", 3, "--no_use_ema", "--extra_resolutions", 256),
        *("--extra_resolutions", 512, "--json"),
    )
    assert code == 0
    assert json.loads(out)["weights"] == str(tmp_path)
    (config,) = seen
    assert (config.train_data_dir, config.learning_rate) == ("pictures", 0.01)
    assert (config.max_train_steps, config.use_ema) == (3, False)
    assert config.extra_resolutions == (256, 512)


@pytest.mark.parametrize("flag", ["--resume", "--resume_from_checkpoint"])
def test_training_goes_on_from_where_it_was(run, monkeypatch, tmp_path, flag):
    import linfusion.training.trainer as trainer

    seen = []
    monkeypatch.setattr(trainer, "distill", lambda config: seen.append(config) or tmp_path)
    run("train", "--train_data_dir", "pictures", "--output_dir", tmp_path, flag, "latest")
    assert seen[0].resume_from_checkpoint == "latest"


def test_training_passes_on_what_matters_of_what_libraries_say(run, monkeypatch, tmp_path):
    import linfusion.training.trainer as trainer

    log, said = logging.getLogger("diffusers"), []

    def distill(config):
        log.warning("There are modules that should be kept in float32: []. Take care")
        log.warning("The scheduler is broken")
        return tmp_path

    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(trainer, "distill", distill)
    log.addHandler(handler)
    try:
        run("train", "--train_data_dir", "pictures", "--output_dir", tmp_path)
    finally:
        log.removeHandler(handler)
    assert said == ["The scheduler is broken"]


def test_training_without_pictures_is_a_wrong_call(run):
    code, _, err = run("train")
    assert code == 2
    assert "exactly one is needed, got none" in err


def test_eval_compares_student_and_teacher(run, model, tmp_path):
    for i in range(2):
        tiny_image(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(PROMPT)
    code, out, _ = run(
        *("eval", "-m", model, "--images", tmp_path, "--size", 64, "--num-images", 2),
        *("--batch-size", 2, "--steps", 1, "--json"),
    )
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0
    assert found["n"] == 2
    assert found["sizes"]["64"]["psnr"] > 0


def test_eval_refuses_prompts_that_are_not_there(run, model, tmp_path):
    code, _, err = run("eval", "-m", model, "--images", tmp_path, "--prompts", "none.txt")
    assert code == 2
    assert err == "linfusion: prompts: 'none.txt' is not a file\n"


def test_eval_refuses_what_is_no_folder(run, model, tmp_path):
    code, _, err = run("eval", "-m", model, "--images", tmp_path / "none")
    assert code == 2
    assert "is not a folder" in err


def test_eval_judges_one_large_picture(run, tmp_path):
    tiny_image(0, 96).save(tmp_path / "large.png")
    tiny_image(0, 48).save(tmp_path / "base.png")
    (tmp_path / "real").mkdir()
    for i in range(2):
        tiny_image(i, 64).save(tmp_path / "real" / f"{i}.png")
    code, out, _ = run(
        *("eval", "--picture", tmp_path / "large.png", "--base", tmp_path / "base.png"),
        *("--band", 32, "--images", tmp_path / "real", "--crop", 32, "--num-images", 3, "--json"),
    )
    assert code == 0
    found = json.loads(out)
    assert (found["height"], found["width"]) == (96, 96)
    assert list(found["scores"]) == [
        *("seam", "psnr", "ssim", "repetition", "repetition_above_base"),
        *("patch_frechet_distance", "patch_kernel_distance"),
    ]


def test_eval_of_a_picture_prints_a_table(run, tmp_path):
    tiny_image(0, 48).save(tmp_path / "p.png")
    code, out, _ = run("eval", "--picture", tmp_path / "p.png", "--border", 16, "--border", 27)
    assert code == 0
    assert "seam" in out and "repetition" in out and "psnr" not in out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--picture", "none.png"], "picture: 'none.png' is not a file"),
        (["--picture", "none.png", "--steps", "3"], "not taken together with --picture"),
        (["--picture", "p", "--border", "1", "--band", "1"], "band: give either --border or"),
        (["--images", ".", "--band", "8"], "band: taken only together with --picture"),
        ([], "images: missing; accepted is a folder of real pictures"),
    ],
)
def test_eval_refuses_flags_that_do_not_go_together(run, arguments, said):
    code, out, err = run("eval", *arguments)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_the_commands(run, arguments):
    code, out, _ = run(*arguments)
    assert code == 0
    for command in ("generate", "info", "summary", "convert", "train", "eval", "bench"):
        assert command in out


def test_the_version_is_printed(run):
    assert run("--version") == (0, f"linfusion {linfusion.__version__}\n", "")


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def test_an_interrupted_run_says_what_was_kept(draw, tmp_path, monkeypatch):
    real, calls = generate_module._draw, []

    def second(*arguments):
        calls.append(arguments)
        return interrupt() if len(calls) == 2 else real(*arguments)

    monkeypatch.setattr(generate_module, "_draw", second)
    code, out, err = draw(PROMPT, "a pear", "--seed", 3, "-o", tmp_path)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (
        "linfusion: interrupted; 1 of 2 pictures are written, the last"
        f" {tmp_path}/a-red-apple-3.png; --seed 4 goes on with the others"
    )


@pytest.mark.parametrize("command", ["summary", "convert", "bench", "eval", "generate"])
def test_ctrl_c_is_130_in_every_command(run, model, tmp_path, monkeypatch, command):
    from linfusion.cli import load
    from linfusion.students.student import LinFusion

    monkeypatch.setattr(load, "load_pipeline", interrupt)
    monkeypatch.setattr(LinFusion, "from_pretrained", interrupt)
    monkeypatch.setattr(sys.modules["linfusion.cli.bench"], "_layers", interrupt)
    tiny_image(0, 32).save(tmp_path / "a.png")
    flags = {
        "summary": [model],
        "convert": [model / "linfusion", tmp_path / "x"],
        "bench": [],
        "eval": ["-m", model, "--images", tmp_path],
        "generate": [PROMPT, "-m", model, "-o", tmp_path / "x.png"],
    }[command]
    code, out, err = run(command, *flags)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("linfusion: interrupted; nothing was kept")


def test_interrupted_training_says_how_to_go_on(run, tmp_path, monkeypatch):
    import linfusion.training.trainer as trainer

    monkeypatch.setattr(trainer, "distill", interrupt)
    flags = ["--train_data_dir", "d", "--output_dir", tmp_path]
    code, _, err = run("train", *flags)
    assert code == 130 and "interrupted; no checkpoint was written yet" in err
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    code, _, err = run("train", *flags)
    assert code == 130
    assert f"{tmp_path / 'checkpoint-10'} is kept: the same command with --resume latest" in err


@pytest.mark.parametrize("text", ["out[/x].png", "photos[final].png", "[bold red]x", "a [b", "\\["])
def test_brackets_in_a_table_are_text(text, capsys):
    from linfusion.cli.console import emit_table

    emit_table(["", text], [[text, "1"]], title=text)
    assert capsys.readouterr().out.count(text) == 3


@pytest.mark.parametrize("error, said", [
    (EOFError("Ran out of input"), "Ran out of input"),
    (MemoryError(), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes"), "out of memory (Default"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory"),
])  # fmt: skip
def test_what_runs_out_is_one_line(draw, tmp_path, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(generate_module, "_draw", fail)
    code, out, err = draw(PROMPT, "-o", tmp_path)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert said in err.splitlines()[-1] or "a file ends before its time" in err.splitlines()[-1]


def test_a_choice_is_refused_without_a_word_of_the_parser(run):
    code, _, err = run("upscale", PROMPT, "--size", 128, "--strategy", "x")
    assert code == 2 and "Value error" not in err and "'x' is not one of 'sdedit'" in err


def test_a_hub_name_offline_says_that_it_is_offline(run, monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("generate", PROMPT, "-m", "owner/name", "-o", tmp_path)
    assert code == 2
    assert "model: owner/name is not in the cache of the hub, and HF_HUB_OFFLINE is set" in err


def test_the_student_of_a_whole_model_is_judged_by_the_teacher_beside_it(run, tmp_path):
    for i in range(2):
        tiny_image(i, 128).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("face")
    common = ("--images", tmp_path, "--num-images", 2, "--steps", 1, "--json")
    code, out, err = run("eval", "-m", "zoo:emoji-lit", *common)
    assert code == 0, err
    assert 0 < json.loads(out)["sizes"]["128"]["psnr"] < 100


def test_eval_of_a_model_of_videos_is_refused_by_name(run, tmp_path):
    tiny_image(0, 32).save(tmp_path / "a.png")
    code, _, err = run("eval", "-m", "zoo:emoji-video", "--images", tmp_path)
    assert code == 2 and "model: zoo:emoji-video draws videos" in err


def test_summary_of_a_model_that_is_linear_itself_says_so(run):
    code, _, err = run("summary", "zoo:emoji-video")
    assert code == 2 and "linear itself" in err.splitlines()[-1]


def test_classes_are_checked_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    from linfusion.cli import load

    monkeypatch.setattr(load, "load_pipeline", None)
    for model, flags, said in (
        ("zoo:emoji-lit", ["--class", "dog"], "class_labels: there is no class 'dog'"),
        ("zoo:emoji-lit", [PROMPT], "class: zoo:emoji-lit is a model of classes: animal, face"),
        ("zoo:emoji", ["--class", "dog"], "class: zoo:emoji has none; give a prompt"),
    ):
        code, _, err = run("generate", *flags, "-m", model, "-o", tmp_path)
        assert code == 2 and said in err


def test_libraries_say_nothing_where_nothing_is_wrong(draw, tmp_path):
    code, _, err = draw(PROMPT, "-o", tmp_path)
    assert code == 0
    for noise in ("id2label", "kept in float32", "cannot run with"):
        assert noise not in err


def test_fp16_on_a_cpu_is_said_to_be_slow_once(draw, tmp_path):
    code, _, err = draw(PROMPT, "--steps", 1, "--dtype", "fp16", "--device", "cpu", "-o", tmp_path)
    assert code == 0 and err.count("thirty times slower") == 1


@pytest.mark.parametrize(
    "command, name, message",
    [
        (
            "generate",
            "WanPipeline",
            "draws videos; `linfusion video` draws those of LinGenPipeline",
        ),
        ("generate", "CogVideoXPipeline", "draws videos"),
        ("generate", "DDPMPipeline", "draws from neither a prompt nor a class"),
        ("generate", "StableDiffusionInpaintPipeline", "starts from a picture"),
        ("generate", "FluxControlPipeline", "draws after a control picture"),
        ("generate", "KandinskyV22Pipeline", "draws from neither a prompt nor a class"),
        ("video", "WanPipeline", "runs in diffusers itself; here are those of LinGenPipeline"),
        ("video", "DDPMPipeline", "draws no videos"),
    ],
)
def test_a_model_of_another_kind_is_refused_before_it_is_loaded(
    command, name, message, tmp_path, capsys
):
    (tmp_path / "model").mkdir()  # nothing but its class: loading it would fail otherwise
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(SystemExit) as stop:
        output = tmp_path / ("x.mp4" if command == "video" else "x.png")
        main([command, PROMPT, "-m", str(tmp_path / "model"), "-o", str(output)])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("linfusion: model: ") and f"is a {name}, which {message}" in last


def test_a_size_that_flux_cannot_draw_names_the_nearest_two(tmp_path, capsys):
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4}
    blocks |= {"up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [8] * 4}
    vae = AutoencoderKL.from_config({**tiny_flow_vae().config, **blocks})
    tiny_flux_pipeline(vae=vae).save_pretrained(tmp_path / "flux")  # 16 pixels to a token
    call = ["generate", PROMPT, "-m", tmp_path / "flux", "--softmax", "--size", "136x64"]
    with pytest.raises(SystemExit) as stop:
        main([*(str(a) for a in call), "-o", str(tmp_path / "x.png")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and not (tmp_path / "x.png").exists()
    assert "width: 136 px; accepted are multiples of 16, from 16 up; nearest: 128 and 144" in last
