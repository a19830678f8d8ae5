"""The scripts in examples/zoo/, on two dozen pictures."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PICTURES = Path(__file__).parents[1] / "data" / "emoji"
SCRIPTS = Path(__file__).parents[2] / "examples" / "zoo"


@pytest.fixture
def script(monkeypatch):
    """Imports one of the scripts, which import each other by their bare names; nothing compiles."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with torch.compiler.set_stance("force_eager"):
        yield importlib.import_module
    recipes = ("train_vae", "train_unet", "train_dit", "train_flux", "train_video", "ablate_dit")
    for name in ("data", "clips", "text", "loop", "classes", "export", *recipes):
        sys.modules.pop(name, None)


def run(module, monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, argv)])
    module.main()


class StoppedError(Exception):
    pass


def stop_after_first_checkpoint(module, monkeypatch) -> None:
    save = module.loop.save

    def save_and_stop(path, **state):
        save(path, **state)
        raise StoppedError

    monkeypatch.setattr(module.loop, "save", save_and_stop)


def test_flags_and_skin_tones_are_left_out(script):
    captions = script("data").captions
    assert captions("2764-fe0f") == ("red heart", "heart")
    assert captions("1f44b-1f3fb") == ()  # a skin tone
    assert captions("1f1e6-1f1e8") == ()  # a flag
    assert captions("1f3f4-e0067_e0062_e0065_e006e_e0067") == ()  # not plain code points
    assert captions("README") == ()


def test_a_folder_without_pictures_is_refused(script, tmp_path):
    with pytest.raises(ValueError, match=r"folder: expected the \.webp files"):
        script("data").pictures(tmp_path)


def test_transparent_pixels_become_white(script):
    data = script("data")
    pixels = data.load_pixels(data.pictures(PICTURES)[:3], 32)
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.uint8
    assert (pixels[:, :, 0, 0] == 255).all()


def test_the_tokenizer_splits_and_joins_any_text(script):
    data, text = script("data"), script("text")
    tokenizer = text.build_tokenizer(c for item in data.pictures(PICTURES) for c in item.captions)
    for prompt in ("a red apple", "purple zebra"):
        ids = tokenizer(prompt).input_ids
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt
    assert len(tokenizer("red apple").input_ids) == 4  # a word of the captions is one token


def test_the_export_is_an_image_folder_with_captions(script, monkeypatch, tmp_path):
    run(script("export"), monkeypatch, "--data", PICTURES, "--output", tmp_path / "e", "--size", 32)
    lines = [json.loads(x) for x in (tmp_path / "e" / "metadata.jsonl").read_text().splitlines()]
    assert {"file_name": "2764-fe0f.png", "text": "red heart", "class": "heart"} in lines
    assert all((tmp_path / "e" / line["file_name"]).is_file() for line in lines)


def test_a_stopped_training_goes_on_to_the_same_weights(script, monkeypatch, tmp_path):
    train_vae, train_unet = script("train_vae"), script("train_unet")
    vae = ("--data", PICTURES, "--steps", 2, "--crop-steps", 1, "--batch-size", 1)
    vae += ("--checkpoint-every", 1)
    unet = ("--data", PICTURES, "--vae", tmp_path / "whole" / "vae", "--batch-size", 2)
    unet += ("--steps", 2, "--checkpoint-every", 1)
    monkeypatch.setattr(train_unet, "PROMPTS", ["pizza"])
    for module, flags, weights in (
        (train_vae, vae, "vae/diffusion_pytorch_model.safetensors"),
        (train_unet, unet, "pipeline/unet/diffusion_pytorch_model.safetensors"),
    ):
        run(module, monkeypatch, *flags, "--output", tmp_path / "whole")
        with monkeypatch.context() as patch:
            stop_after_first_checkpoint(module, patch)
            with pytest.raises(StoppedError):
                run(module, patch, *flags, "--output", tmp_path / "stopped")
        run(module, monkeypatch, *flags, "--output", tmp_path / "stopped")
        whole, stopped = (load_file(tmp_path / run / weights) for run in ("whole", "stopped"))
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)
        (tmp_path / "whole" / "checkpoint.pt").unlink()
        (tmp_path / "stopped" / "checkpoint.pt").unlink()


def test_a_stopped_training_of_the_dit_goes_on_to_the_same_weights(script, monkeypatch, tmp_path):
    train_dit = script("train_dit")
    monkeypatch.setattr(train_dit, "preview", lambda pipe, file: None)
    flags = ("--data", PICTURES, "--batch-size", 2, "--steps", 2, "--checkpoint-every", 1)
    run(train_dit, monkeypatch, *flags, "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after_first_checkpoint(train_dit, patch)
        with pytest.raises(StoppedError):
            run(train_dit, patch, *flags, "--output", tmp_path / "stopped")
    run(train_dit, monkeypatch, *flags, "--output", tmp_path / "stopped")
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    whole, stopped = (load_file(tmp_path / x / weights) for x in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    names = json.loads((tmp_path / "whole" / "pipeline" / "model_index.json").read_text())
    assert names["id2label"] == {str(i): c for i, c in enumerate(train_dit.CLASSES)}


def test_models_of_the_ablation_are_judged_on_the_way(script, monkeypatch, tmp_path):
    train_dit, ablate_dit = script("train_dit"), script("ablate_dit")
    monkeypatch.setattr(train_dit, "preview", lambda pipe, file: None)
    flags = ("--data", PICTURES, "--batch-size", 2)
    run(train_dit, monkeypatch, *flags, "--steps", 1, "--output", tmp_path / "dit")
    flags = (*flags, "--steps", 2, "--preview-every", 1, "--count", 2, "--output", tmp_path)
    arms = ("--arm", "distillation", "--arm", "linear")
    run(ablate_dit, monkeypatch, *flags, *arms, "--teacher", tmp_path / "dit" / "pipeline")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == {"teacher", "distillation", "linear"}
    assert found["linear"].keys() == found["distillation"].keys() == {"1", "2"}
    assert found["linear"]["2"] != found["distillation"]["2"] > 0 and found["teacher"] > 0


def test_every_picture_has_the_class_of_what_it_shows(script):
    data, classes = script("data"), script("classes")
    found = {item.captions[0]: classes.class_of(item) for item in data.pictures(PICTURES)}
    expected = {
        "grinning face": "face", "red heart": "heart", "pizza": "food", "dog face": "animal",
        "rocket": "vehicle", "cactus": "plant", "star": "sky", "key": "object",
    }  # fmt: skip
    assert expected.items() <= found.items()
    assert set(found.values()) <= set(classes.CLASSES)


def test_training_goes_on_from_a_pipeline(script, monkeypatch, tmp_path):
    train_vae, train_unet = script("train_vae"), script("train_unet")
    train_vae.build().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(train_unet, "PROMPTS", ["pizza"])
    flags = ("--data", PICTURES, "--vae", tmp_path / "vae", "--batch-size", 2, "--steps", 1)
    run(train_unet, monkeypatch, *flags, "--output", tmp_path / "first")
    first = tmp_path / "first" / "pipeline"
    no_step = ("--init", first, "--learning-rate", 0, "--output", tmp_path / "second")
    run(train_unet, monkeypatch, *flags, *no_step)
    for part in ("text_encoder/model", "unet/diffusion_pytorch_model"):
        one, two = (load_file(tmp_path / x / "pipeline" / f"{part}.safetensors")
                    for x in ("first", "second"))  # fmt: skip
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_t5_tokenizer_splits_and_joins_any_text(script):
    data, text = script("data"), script("text")
    tokenizer = text.build_t5_tokenizer(c for i in data.pictures(PICTURES) for c in i.captions)
    for prompt in ("a red apple", "purple zebra"):
        ids = tokenizer(prompt).input_ids
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == prompt
    padded = tokenizer("heart", padding="max_length").input_ids
    assert len(padded) == text.T5_LENGTH and padded[-1] == tokenizer.pad_token_id


def test_a_stopped_flow_training_goes_on_to_the_same_weights(script, monkeypatch, tmp_path):
    train_vae, train_flux = script("train_vae"), script("train_flux")
    train_vae.build().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr(train_flux, "PROMPTS", ["pizza"])
    flags = ("--data", PICTURES, "--vae", tmp_path / "vae", "--size", 32, "--batch-size", 2)
    flags += ("--steps", 2, "--checkpoint-every", 1)
    run(train_flux, monkeypatch, *flags, "--output", tmp_path / "whole")
    flags += ("--init", tmp_path / "whole" / "start", "--output", tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after_first_checkpoint(train_flux, patch)
        with pytest.raises(StoppedError):
            run(train_flux, patch, *flags)
    run(train_flux, monkeypatch, *flags)
    for part in ("transformer/diffusion_pytorch_model", "text_encoder_2/model"):
        whole, stopped = (load_file(tmp_path / run / "pipeline" / f"{part}.safetensors")
                          for run in ("whole", "stopped"))  # fmt: skip
        assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_latents_of_the_flow_model_are_standardised_as_its_pipeline_undoes(script):
    """FluxPipeline decodes latents / scaling_factor + shift_factor."""
    train_vae, train_flux = script("train_vae"), script("train_flux")
    vae = train_vae.build()
    latents = 3 + 2 * torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    standard = train_flux.standardised(vae, latents)
    assert abs(standard.mean()) < 1e-5 and abs(standard.std() - 1) < 1e-5
    undone = standard / vae.config.scaling_factor + vae.config.shift_factor
    torch.testing.assert_close(undone, latents)
