"""Settings have the types they have, whether they come from Python, a recipe or a flag."""

from __future__ import annotations

import dataclasses
import json

import pytest

from linfusion.cli import main
from linfusion.training import TrainConfig
from linfusion.training.config import LINGEN, options_type
from linfusion.training.schema import checked, from_text, hints_of

# TOML, and what of it the error names.
WRONG = {
    'train_batch_size = "8"': "train_batch_size: got '8', accepted is a whole number",
    "train_batch_size = 2.5": "train_batch_size: got 2.5",
    'use_ema = "false"': "use_ema: got 'false', accepted is True or False",
    "use_ema = 0": "use_ema: got 0",
    'random_flip = "no"': "random_flip: got 'no'",
    'seed = "1"': "seed: got '1'",
    "seed = 1.5": "seed: got 1.5",
    'learning_rate = "1e-4"': "learning_rate: got '1e-4', accepted is a number",
    "learning_rate = inf": "learning_rate: got inf, accepted is a finite number",
    "learning_rate = true": "learning_rate: got True",
    "resolution = 64.5": "resolution: got 64.5",
    'validation_prompts = "a red apple"': "validation_prompts: got 'a red apple', accepted",
    "validation_prompts = [1]": "validation_prompts: got 1, accepted is text",
    "extra_resolutions = 64": "extra_resolutions: got 64, accepted is a list",
    "max_train_steps = true": "max_train_steps: got True",
    "kd_weight = inf": "kd_weight: got inf",
    "adam_epsilon = nan": "adam_epsilon: got nan",
    "adam_epsilon = -1.0": "adam_epsilon: got -1.0, accepted is more than 0",
    "teacher_guidance_scale = nan": "teacher_guidance_scale: got nan",
    "output_dir = 3": "output_dir: got 3, accepted is text",
    'use_aspect_ratio_buckets = true\naspect_ratio_buckets = "x"': "aspect_ratio_buckets: got 'x'",
    "checkpointing_steps = 1.5": "checkpointing_steps: got 1.5",
    "projection_mid_dim = -7": "projection_mid_dim: got -7",
    'projection_mid_dim = "7"': "projection_mid_dim: got '7'",
    "radius = 8": "radius: given, but only method 'clear' has it",
    'method = "clear"\n[options]\nradius = "8"': "radius: got '8', accepted is a number",
    'method = "clear"\n[options]\nradius = 0': "radius: got 0, expected a number above 0",
    'method = "clear"\n[options]\nheads = 2': "heads: given, but only method 'lit' has it",
    'method = "mate"\nwindow = "8,4"': "window: got '8,4'",
    'method = "lit"\nheads = 2.0': "heads: got 2.0",
    "options = 3": "options: got 3",
    "metadata_anywhere = 1": "metadata_anywhere: got 1",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_recipe_of_other_types_is_refused_by_name(text, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as refusal:
        TrainConfig.from_recipe(file, train_data_dir="d")
    assert str(refusal.value).startswith(WRONG[text])


@pytest.mark.parametrize("method, flat, table", [
    ("clear", 'radius = 8.5\ndown_factor = 4', "[options]\nradius = 8.5\ndown_factor = 4"),
    ("mate", 'window = "8,4,4"', "[options]\nwindow = [8, 4, 4]"),
    ("lingen", 'clip_schedule = "2,3,16"', '[options]\nclip_schedule = "2,3,16"'),
])  # fmt: skip
def test_options_stand_beside_the_others_or_in_a_table_of_their_own(method, flat, table, tmp_path):
    found = []
    for text in (flat, table):
        (tmp_path / "r.toml").write_text(f'method = "{method}"\n{text}')
        found.append(TrainConfig.from_recipe(tmp_path / "r.toml", train_data_dir="d"))
    assert found[0] == found[1] and type(found[0].options) is options_type(method)


def test_settings_survive_json():
    config = TrainConfig.of(method="mate", window=(2, 2, 2), train_data_dir="d")
    again = TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and again.method_options == {"window": (2, 2, 2)}


def test_options_that_are_as_the_method_says_leave_it_to_the_weights():
    config = TrainConfig.of(method="lit", heads=2, weights="w", train_data_dir="d")
    assert config.method_options == {}
    assert TrainConfig.of(method="lit", conv=None, train_data_dir="d").method_options == {
        "conv": None
    }


@pytest.mark.parametrize("kind", [TrainConfig, *map(options_type, ("clear", "lit", LINGEN))])
def test_every_default_is_of_its_type_and_no_field_takes_just_anything(kind):
    hints = hints_of(kind)
    for field in dataclasses.fields(kind):
        if field.name == "options":
            continue
        default, hint = field.default, hints[field.name]
        assert checked(field.name, default, hint) == default
        with pytest.raises(ValueError, match=rf"^{field.name}: got .*Thing"):
            checked(field.name, type("Thing", (), {})(), hint)


@pytest.mark.parametrize("hint, text, value", [
    (int, "3", 3), (float, "3", 3.0), (int | None, "none", None), (bool, "true", True),
    (tuple[int, int, int], "8,4,4", (8, 4, 4)), (tuple[str, ...], "thw,twh", ("thw", "twh")),
    (str | None, "gated", "gated"), (float | None, "1e-3", 1e-3),
])  # fmt: skip
def test_a_flag_is_read_as_its_type(hint, text, value):
    found = from_text("x", text, hint)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("hint", [int, float, bool, tuple[int, int, int], int | None])
def test_a_flag_of_another_type_is_refused(hint):
    with pytest.raises(ValueError, match=r"^x: got 'many'"):
        from_text("x", "many", hint)


@pytest.mark.parametrize("flags, said", [
    (["--radius", "3"], "--radius: no such flag, and method 'linfusion' has no such option"),
    (["--method", "clear", "--radius", "x"], "radius: got 'x', accepted is a number"),
    (["--method", "clear", "--radius"], "--radius: got no value"),
    (["--method", "clear", "3"], "'3': unexpected"),
    (["--method", "wonder"], "method: got 'wonder', accepted are linfusion, "),
    (["--kd_weight", "inf"], "kd_weight: got inf, accepted is a finite number"),
])  # fmt: skip
def test_a_wrong_flag_of_training_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--train_data_dir", "nowhere", *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"linfusion: {said}") and err.count("\n") == 1


def test_flags_of_a_method_reach_its_options(monkeypatch, tmp_path, capsys):
    import linfusion.training.trainer as trainer

    seen = []
    monkeypatch.setattr(trainer, "distill", lambda config: seen.append(config) or tmp_path)
    flags = ["--method", "clear", "--radius=3.5", "--down-factor", "4", "--proportional"]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--train_data_dir", "d", "--output_dir", str(tmp_path), *flags])
    assert not stop.value.code, capsys.readouterr().err
    given = {"radius": 3.5, "down_factor": 4, "proportional": True}
    assert seen[0].method_options == given


def test_help_lists_the_options_of_every_method(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for method in ("linfusion", "clear", "lit", "mate", LINGEN):
        assert f"Options of --method {method}" in out
        assert all(f"--{name}" in out for name in hints_of(options_type(method)))
