"""Students that are trained whole: LiT of DiT and PixArt."""

import json
import re

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, PixArtSigmaPipeline
from diffusers import DiTPipeline as StockDiTPipeline
from safetensors.torch import load_file

import linfusion
from linfusion.lit.whole import load_whole
from linfusion.pipelines import DiTPipeline
from linfusion.training import TrainConfig, distill
from linfusion.training.config import recipes
from linfusion.training.objectives.hybrid import hybrid_losses
from linfusion.training.objectives.whole import WholeStudent
from linfusion.training.teachers.variance import ClassTeacher, PixArtTeacher
from tests.tiny import tiny_image, tiny_vae
from tests.tiny_dit import dit_inputs, forward, tiny_dit, tiny_pixart
from tests.tiny_joint import tiny_t5, tiny_t5_tokenizer

NAMES = {0: "face", 1: "heart", 2: "food", 3: "sky", 4: "sign"}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def scheduler():
    return DDPMScheduler(variance_type="learned_range", clip_sample=False)


def dit_pipeline(cls=DiTPipeline, **changes):
    pipe = cls(tiny_dit(**changes), tiny_vae(), scheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart_pipeline():
    text = tiny_t5()
    pipe = PixArtSigmaPipeline(
        tokenizer=tiny_t5_tokenizer(),
        text_encoder=text,
        vae=tiny_vae(),
        transformer=tiny_pixart(caption_channels=text.config.d_model),
        scheduler=DDPMScheduler(clip_sample=False),  # this pipeline keeps no variance
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settings(tmp_path, **changes):
    folder = tmp_path / "pictures"
    if not folder.exists():
        folder.mkdir()
        for i in range(4):
            tiny_image(i, 64).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(NAMES[i])
    return TrainConfig.of(
        **{
            "method": "lit",
            "kd_variance_weight": 0.05,
            "train_data_dir": str(folder),
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "resolution": 64,
            "train_batch_size": 2,
            "max_train_steps": 2,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "ema_decay": 0.5,
            **changes,
        }
    )


def example(host, seed=0):
    batch = {"latents": torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))}
    batch |= host.text_states(["face", "", "sign"])
    return host.example(batch, torch.Generator().manual_seed(seed + 1))


@pytest.mark.parametrize("cls", [DiTPipeline, StockDiTPipeline])
def test_a_run_gives_a_whole_model_that_is_linear_and_the_pipeline_as_it_was(tmp_path, cls):
    pipe = dit_pipeline(cls)
    before, own = forward(pipe.transformer, dit_inputs()), pipe.transformer
    out = distill(settings(tmp_path), pipeline=pipe)
    assert pipe.transformer is own
    assert torch.equal(forward(own, dit_inputs()), before)
    student = linfusion.linearize(DiTTransformer2DModel.from_pretrained(out))
    assert linfusion.summary(student).method == "lit"
    trained = load_file(out / WEIGHTS)
    moved = [n for n, t in own.state_dict().items() if not torch.equal(trained[n], t)]
    assert any("ff.net" in name for name in moved)  # not attention alone
    assert not any(".norm1.emb." in name for name in moved)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    changes = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = distill(settings(tmp_path, **changes), pipeline=dit_pipeline())
    again = {"output_dir": str(tmp_path / "2"), "resume_from_checkpoint": f"{whole}/checkpoint-2"}
    resumed = distill(settings(tmp_path, **changes, **again), pipeline=dit_pipeline())
    a, b = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_on_from_a_student(tmp_path):
    first = distill(settings(tmp_path), pipeline=dit_pipeline())
    student = WholeStudent(ClassTeacher(dit_pipeline()), weights=first)
    saved = load_file(first / WEIGHTS)
    assert all(torch.equal(t, saved[name]) for name, t in student.model.state_dict().items())
    assert linfusion.summary(student.model).method == "lit"


def test_text_to_picture_models_are_distilled(tmp_path):
    config = settings(
        tmp_path,
        inherit="lit-t2i",
        kd_weight=1.0,
        use_aspect_ratio_buckets=True,
        aspect_ratio_buckets="64,64;48,80",
        gradient_checkpointing=True,
        validation_steps=2,
        validation_prompts=("heart",),
        teacher_steps=2,
    )
    out = distill(config, pipeline=pixart_pipeline())
    assert all(t.isfinite().all() for t in load_file(out / WEIGHTS).values())
    assert (out / "samples" / "step-0000002.png").is_file()


def test_the_teacher_draws_what_the_student_learns_from(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("heart\nsky\n")
    config = settings(tmp_path, train_data_dir=None, train_prompts=str(prompts), teacher_steps=2)
    out = distill(config, pipeline=dit_pipeline())
    assert all(t.isfinite().all() for t in load_file(out / WEIGHTS).values())


def test_the_losses_are_the_hybrid_ones():
    host = ClassTeacher(dit_pipeline())
    pair = WholeStudent(host, kd_weight=0.7, kd_variance_weight=0.2)
    inputs, target = example(host)
    losses = pair.losses(pair.model, inputs, target)
    taught, guess = forward(tiny_dit(), inputs), forward(pair.model, inputs)
    noise, clean = target.chunk(2, 1)
    expected = hybrid_losses(
        guess, taught, noise, inputs["hidden_states"], clean, inputs["timestep"],
        host.scheduler, 0.7, 0.2,
    )  # fmt: skip
    total = sum(pair.weights[name] * value for name, value in losses.items())
    torch.testing.assert_close(total, expected.total)


def test_without_weights_for_it_the_teacher_is_not_asked(monkeypatch):
    host = ClassTeacher(dit_pipeline())
    pair = WholeStudent(host, kd_weight=0.0, kd_variance_weight=0.0)
    monkeypatch.setattr(pair, "_taught_by", None)
    losses = pair.losses(pair.model, *example(host))
    assert losses["kd"] == 0 and losses["variance"] == 0 and losses["simple"] > 0


def test_teacher_and_student_see_one_condition():
    """The empty caption is the class of none, drawn before either sees it."""
    host = ClassTeacher(dit_pipeline())
    pair = WholeStudent(host)
    inputs, target = example(host)
    assert inputs["class_labels"].tolist() == [0, 5, 4]
    first = pair.losses(pair.model, inputs, target)
    second = pair.losses(pair.model, inputs, target)  # no dropout of their own
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_student_that_inherits_all_starts_at_plain_linear_attention():
    host = ClassTeacher(dit_pipeline())
    pair = WholeStudent(host, policy="full", heads=4)
    plain = linfusion.linearize(tiny_dit(), "lit", heads=4)
    torch.testing.assert_close(forward(pair.model, dit_inputs()), forward(plain, dit_inputs()))
    assert pair.inheritance.parts == "qkvo"


def test_another_teacher_may_be_larger(tmp_path):
    dit_pipeline(num_layers=5).save_pretrained(tmp_path / "large")
    config = settings(tmp_path, teacher_model_name_or_path=str(tmp_path / "large"))
    out = distill(config, pipeline=dit_pipeline())
    assert sum("attn1.to_q.weight" in name for name in load_file(out / WEIGHTS)) == 3


def test_a_weaker_teacher_is_warned_of():
    host = ClassTeacher(dit_pipeline())
    with pytest.warns(UserWarning, match="a weaker teacher makes the student worse"):
        WholeStudent(host, teacher=tiny_dit(num_layers=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads: "),
        ({"inherit": "half"}, "policy: got 'half'"),
        ({"radius": 4}, "radius: given, but only method 'clear'"),
        ({"use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;48,80"},
         "aspect_ratio_buckets: got 48x80; DiTTransformer2DModel draws squares"),
        ({"kd_variance_weight": -1.0}, "kd_variance_weight: got -1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    pipe = dit_pipeline()
    own = pipe.transformer
    with pytest.raises(ValueError, match=message):
        distill(settings(tmp_path, **changes), pipeline=pipe)
    assert pipe.transformer is own and linfusion.summary(own).method is None
    assert not (tmp_path / "out").exists()


def test_a_teacher_without_variance_teaches_none():
    host = ClassTeacher(dit_pipeline(out_channels=4))
    with pytest.raises(ValueError, match=r"kd_variance_weight: got 0\.05, but the teacher has 4"):
        WholeStudent(host)


def test_a_caption_that_is_no_class_is_refused(tmp_path):
    config = settings(tmp_path)
    (tmp_path / "pictures" / "0.txt").write_text("a dog")
    with pytest.raises(ValueError, match="caption_column: 'a dog' is none of the model's classes"):
        distill(config, pipeline=dit_pipeline())


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_run(name, tmp_path):
    config = TrainConfig.from_recipe(name, train_data_dir=str(tmp_path), seed=3)
    assert config.method == name.partition("_")[0] and config.seed == 3


def test_what_is_given_wins_over_the_recipe(tmp_path):
    config = TrainConfig.from_recipe("lit_c2i_256", train_data_dir=str(tmp_path), heads=3)
    assert config.options.heads == 3 and config.train_batch_size == 256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe: .* is no .toml file and none of"),
        ("method = ", "is no TOML"),
        ("speed = 3", "speed: no argument of TrainConfig and no option of method"),
    ],
)
def test_a_recipe_that_is_none_is_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.from_recipe(file, train_data_dir=str(tmp_path))


def test_the_command_takes_a_recipe_and_what_is_otherwise(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    import linfusion.training.trainer as trainer
    from linfusion.cli import app

    seen = []
    monkeypatch.setattr(trainer, "distill", lambda config: seen.append(config) or tmp_path)
    flags = ["--recipe", "lit_emoji", "--train_data_dir", "p", "--heads", "4", "--json"]
    result = CliRunner().invoke(app, ["train", *flags, "--output_dir", str(tmp_path / "o")])
    assert result.exit_code == 0, result.output
    assert (
        seen[0].options.heads == 4 and seen[0].method == "lit" and seen[0].max_train_steps == 4500
    )
    assert json.loads(result.stdout)["config"]["options"]["heads"] == 4


def test_pixart_of_1024_px_is_told_its_size():
    pipe = pixart_pipeline()
    pipe.transformer.use_additional_conditions = True
    host = PixArtTeacher(pipe)
    batch = {
        "latents": torch.zeros(2, 4, 8, 16),
        "time_ids": torch.tensor([[9, 9, 0, 0, 64, 128]] * 2),
    }
    batch |= host.text_states(["heart", ""])
    added = host.conditions(batch)["added_cond_kwargs"]
    assert added["resolution"].tolist() == [[64, 128]] * 2
    assert added["aspect_ratio"].tolist() == [[0.5]] * 2


def saved_pipeline(tmp_path):
    dit_pipeline().save_pretrained(tmp_path / "dit")
    out = distill(settings(tmp_path), pipeline=dit_pipeline())
    return tmp_path / "dit", out


def test_the_command_draws_a_class_with_a_whole_student(tmp_path):
    from typer.testing import CliRunner

    from linfusion.cli import app

    model, student = saved_pipeline(tmp_path)
    common = ["generate", "-m", str(model), "--steps", "2", "--seed", "0"]
    for what in ("face", "4"):
        target = str(tmp_path / f"{what}.png")
        result = CliRunner().invoke(
            app, [*common, "--class", what, "-w", str(student), "-o", target, "--json"]
        )
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["method"] == "lit"
    whole = tmp_path / "lit"
    pipe = dit_pipeline()
    load_whole(pipe, student)
    pipe.save_pretrained(whole)
    target = str(tmp_path / "again.png")
    result = CliRunner().invoke(
        app, ["generate", "-m", str(whole), *common[3:], "--class", "face", "-o", target]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.png").read_bytes()[-2000:] == (tmp_path / "face.png").read_bytes()[
        -2000:
    ]


def test_prompts_and_classes_are_not_mixed_up(tmp_path):
    from typer.testing import CliRunner

    from linfusion.cli import app

    model = tmp_path / "dit"
    dit_pipeline().save_pretrained(model)
    for flags, message in (
        (["a heart"], "class: .* is a model of classes: face, food, heart, sign, sky"),
        (["a heart", "--class", "face"], "prompt: got both a prompt and --class"),
        ([], "prompt: missing; say what to draw"),
        (["--class", "dog", "--softmax"], "class_labels: there is no class 'dog'"),
    ):
        result = CliRunner().invoke(app, ["generate", "-m", str(model), *flags])
        assert isinstance(result.exception, ValueError)
        assert re.search(message, str(result.exception))


def test_eval_compares_a_whole_student_with_its_teacher(tmp_path):
    from linfusion.evaluation import evaluate

    model, student = saved_pipeline(tmp_path)
    pipe = DiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.transformer
    found = evaluate(
        pipe, student, images=tmp_path / "pictures", sizes=[64], n=4, batch_size=2,
        num_inference_steps=2, guidance_scale=2.0,
    )  # fmt: skip
    assert pipe.transformer is own
    assert found["paired"] and 0 < found["sizes"][64]["psnr"] < 100


def test_a_whole_model_that_is_softmax_is_no_student(tmp_path):
    tiny_dit().save_pretrained(tmp_path)
    pipe = dit_pipeline()
    own = pipe.transformer
    with pytest.raises(ValueError, match=r"weights: the DiTTransformer2DModel in .* not saved lin"):
        load_whole(pipe, tmp_path)
    assert pipe.transformer is own
