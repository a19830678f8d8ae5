"""Students as they lie on disk: configs that claim anything, modes, leftovers."""

from __future__ import annotations

import json
import os
import resource
import stat

import pytest
import torch

import linfusion
from linfusion.files.whole_files import check
from linfusion.students.saving import save
from linfusion.students.student import LinFusion
from tests.student_files import student_for
from tests.tiny import tiny_unet


@pytest.fixture
def folder(tmp_path):
    student_for(tiny_unet()).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def little_memory():
    """4 GB more than now, so that what claims terabytes cannot be had."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "true", "{}", "{", ""])
def test_a_config_that_is_no_object_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    for read in (lambda: LinFusion.from_pretrained(folder),
                 lambda: linfusion.linearize(tiny_unet(), weights=folder)):  # fmt: skip
        with pytest.raises(ValueError, match=r"weights: |modules_list: "):
            read()


@pytest.mark.parametrize("name, value", [
    ("dim_n", 10**6), ("dim_n", 2**40), ("inner_dim", 10**6), ("projection_mid_dim", 10**6),
    ("dim_n", 0), ("dim_n", -1), ("dim_n", True), ("inner_dim", None), ("heads", -1),
    ("module_name", ""), ("module_name", "a..b"), ("module_name", "."), ("module_name", "x"),
    ("projection_mid_dim", "7"), ("projection_mid_dim", 1.5), ("bias", "no"),
])  # fmt: skip
def test_a_config_that_claims_another_layer_is_refused_before_memory_is_taken(
    folder, name, value, little_memory
):
    config = json.loads((folder / "config.json").read_text())
    config["modules_list"][0][name] = value
    config["attention_weights"] = name == "inner_dim"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights: |modules_list: |projection_mid_dim: "):
        LinFusion.from_pretrained(folder)


@pytest.mark.parametrize("name, value", [
    ("method", []), ("method", "magic"), ("layout", 7), ("modules_list", {"a": 1}),
    ("modules_list", [None]), ("modules_list", [[]]), ("rank", 10**9), ("rank", "x"),
])  # fmt: skip
def test_a_config_of_other_types_is_refused(folder, name, value):
    config = json.loads((folder / "config.json").read_text()) | {"attention_weights": True}
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=r"weights: |modules_list: |method: |layout: "):
        LinFusion.from_pretrained(folder)


def test_what_is_loaded_is_what_was_saved_and_nothing_is_left_without_memory(folder):
    side = LinFusion.from_pretrained(folder)
    assert not any(t.is_meta for t in [*side.parameters(), *side.buffers()])


def test_a_flipped_bit_in_the_tensors_of_a_student_is_noticed_and_the_file_is_named(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    ours = whole.index(b'"checksum":') + 20  # a damaged name of the checksum changes no tensor
    for at in [*range(ours, size, 997), *range(size, len(whole), len(whole) // 29), len(whole) - 1]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"safetensors is damaged|weights: "):
            LinFusion.from_pretrained(folder)
    file.write_bytes(whole)
    again = LinFusion.from_pretrained(folder).state_dict()
    want = student_for(tiny_unet()).state_dict()
    assert all(torch.equal(again[name], want[name]) for name in want)


def test_a_student_without_a_checksum_is_read_and_every_shard_has_one(tmp_path):
    side = student_for(tiny_unet())
    super(LinFusion, side).save_pretrained(tmp_path / "plain")
    side.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        check(shard)
    for name in ("plain", "shards"):
        again = LinFusion.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(again[n], t) for n, t in side.state_dict().items())


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_student_has_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(linfusion.linearize(tiny_unet()), tmp_path / "student")
    finally:
        os.umask(before)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "student").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_the_next_save_removes_what_a_killed_one_left(folder):
    for name in (".saving.0123456789abcdef.part", ".config.json.0123456789abcdef.part"):
        (folder / name).mkdir()
        (folder / name / "x").touch()
    save(linfusion.linearize(tiny_unet()), folder)
    assert {f.name for f in folder.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(source):
    with pytest.raises(ValueError, match=r"weights: cannot read .*: there is no such folder"):
        linfusion.linearize(tiny_unet(), weights=source)
