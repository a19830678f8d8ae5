"""Models saved linearized with diffusers' own save_pretrained, and what is read back of them."""

from __future__ import annotations

import copy
import re
from pickle import dumps, loads

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from huggingface_hub import constants

import linfusion
from linfusion.students.saving import learned
from linfusion.students.student import LinFusion
from tests.student_files import student_for
from tests.tiny import denoise, tiny_motion_unet, tiny_sd_pipeline, tiny_unet


def student(seed):
    return linfusion.linearize(tiny_unet(), weights=student_for(tiny_unet(), seed=seed))


def close(one, other):
    return torch.allclose(denoise(one), denoise(other), atol=1e-5)


@pytest.mark.parametrize(
    "save, load",
    [
        ({}, {"subfolder": "unet"}),
        ({"variant": "ema"}, {"variant": "ema"}),
        ({"max_shard_size": "60KB"}, {}),
    ],
    ids=["subfolder", "variant", "shards"],
)
def test_what_is_read_back_is_what_diffusers_loaded(save, load, tmp_path):
    unet = student(1)
    unet.save_pretrained(tmp_path / load.get("subfolder", "."), **save)
    if "max_shard_size" in save:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = UNet2DConditionModel.from_pretrained(tmp_path, **load)
    assert close(linfusion.linearize(again), unet)


def test_a_model_loaded_by_its_hub_name_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--me--student"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("1" * 40)
    unet = student(1)
    unet.save_pretrained(home / "snapshots" / ("1" * 40))
    again = UNet2DConditionModel.from_pretrained("me/student", cache_dir=tmp_path)
    assert close(linfusion.linearize(again), unet)


def test_variants_of_other_hosts_are_told_apart(tmp_path):
    for seed, variant in ((1, None), (2, "other")):
        side = student_for(tiny_unet(), seed=seed)
        unet = linfusion.linearize(tiny_unet(seed), weights=side)
        unet.save_pretrained(tmp_path, variant=variant)
    again = UNet2DConditionModel.from_pretrained(tmp_path, variant="other")
    assert close(linfusion.linearize(again), unet)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    expected = linfusion.linearize(tiny_unet(1), weights=student_for(tiny_unet(), seed=1))
    assert close(linfusion.linearize(again), expected)


def test_two_students_of_one_host_are_never_confused(tmp_path):
    default, other = student(1), student(2)
    default.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="other")
    again = UNet2DConditionModel.from_pretrained(tmp_path, variant="other")
    with pytest.raises(ValueError, match="there are 2 students") as error:
        linfusion.linearize(again)
    files = re.findall(r"\S+\.safetensors", str(error.value))
    assert len(files) == 2 and not hasattr(again, "_linfusion_record")
    file = next(f for f in files if "other" in f)
    assert close(linfusion.linearize(again, weights=file), other)


def test_a_half_precision_variant_of_one_student_is_that_student(tmp_path):
    unet = student(1)
    unet.save_pretrained(tmp_path)
    student(1).half().save_pretrained(tmp_path, variant="fp16")
    again = UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16")
    assert torch.allclose(denoise(linfusion.linearize(again)), denoise(unet), atol=1e-2)


def test_a_model_saved_again_without_its_student_says_so_and_can_be_plain(tmp_path):
    student(1).save_pretrained(tmp_path / "once")
    UNet2DConditionModel.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "twice")
    with pytest.raises(ValueError, match=r"saved once more without linfusion.linearize\?"):
        linfusion.linearize(again)
    linfusion.restore(again)
    assert "_linfusion" not in again.config and close(again, tiny_unet())
    linfusion.linearize(again, weights=student_for(tiny_unet(), seed=1))
    assert close(again, student(1))


def test_pickled_weights_are_named(tmp_path):
    unet = student(1)
    unet.save_config(tmp_path)
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pickled \(safe_serialization=False\), which is never"):
        linfusion.linearize(again)


@pytest.mark.parametrize("copied", [lambda x: x, copy.deepcopy, lambda x: loads(dumps(x))])
def test_a_student_is_never_pickled_into_a_model(copied, tmp_path):
    unet = copied(student(1))
    for save in (unet.save_pretrained, torch.compile(unet).save_pretrained):
        with pytest.raises(ValueError, match="safe_serialization: got False; a linearized model"):
            save(tmp_path, safe_serialization=False)
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.safetensors")]
    unet.save_pretrained(tmp_path, safe_serialization=True)
    linfusion.restore(unet).save_pretrained(tmp_path / "plain", safe_serialization=False)
    assert (tmp_path / "plain" / "diffusion_pytorch_model.bin").is_file()


def test_a_pipeline_saved_pickled_is_refused_for_its_linear_part(tmp_path):
    pipe = linfusion.linearize(tiny_sd_pipeline(), weights=student_for(tiny_unet(), seed=1))
    with pytest.raises(ValueError, match="safe_serialization: got False; a linearized model"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)


@pytest.mark.filterwarnings("ignore:.*linearized without weights")
def test_a_model_made_from_a_linear_config_is_linearized_afresh_or_plain():
    config = student(1).config
    fresh = UNet2DConditionModel.from_config(config)
    linfusion.linearize(fresh)
    assert len(learned(fresh).entries) == 7
    plain = linfusion.restore(UNet2DConditionModel.from_config(config))
    assert "_linfusion" not in plain.config


def test_what_copies_a_part_of_a_linear_model_is_refused_by_name():
    unet = student(1)
    for make in (
        lambda: ControlNetModel.from_unet(unet, conditioning_channels=3),
        lambda: type(tiny_motion_unet()).from_unet2d(unet, None),
    ):
        with pytest.raises(ValueError, match=r"part of a linearized model.*restore first"):
            make()
    assert len(unet.state_dict()) > len(tiny_unet().state_dict())
    linfusion.restore(unet)
    ControlNetModel.from_unet(unet, conditioning_channels=3)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c"])
def test_a_folder_that_is_missing_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match=f"weights: cannot read {name}: there is no such folder"):
        linfusion.linearize(tiny_sd_pipeline(), weights=name)


def test_a_lone_file_for_a_unet_says_what_a_student_is(tmp_path):
    student(1).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match="student of method 'linfusion' is a folder or hub name"):
        linfusion.linearize(tiny_unet(), weights=file)


def test_an_average_of_the_student_is_saved_as_the_docs_say(tmp_path):
    unet = student(1)
    side = learned(unet)
    average = EMAModel(side.parameters(), model_cls=LinFusion, model_config=side.config)
    average.save_pretrained(tmp_path)
    again = linfusion.linearize(tiny_unet(), weights=tmp_path)
    assert close(again, unet)
