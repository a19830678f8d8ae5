"""Pictures, captions and caches as they lie on disk: converted, damaged, hostile, shared."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from linfusion.files.picture_reader import open_picture
from linfusion.training.data import cache
from linfusion.training.data.pictures import image_folder
from linfusion.training.data.shards import webdataset_shards
from linfusion.training.roles import load_examples
from linfusion.training.teachers.images import NoiseTeacher
from tests.tiny import tiny_image, tiny_sd_pipeline
from tests.training.data.test_pictures import (
    config,
    draws,
    png,
    training_set,
    with_metadata,
    write_shard,
)


def saved_with(folder, name, image, **options):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text("a caption")
    return folder


def test_pictures_come_in_one_way(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64), (32, 1)).astype(np.uint16)
    saved_with(tmp_path, "depth.png", Image.fromarray(ramp))
    turned = Image.Exif()
    turned[0x0112] = 6
    phone = Image.new("RGB", (64, 32), "red")
    saved_with(tmp_path, "phone.jpg", phone, exif=turned, quality=95)
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    saved_with(tmp_path, "sticker.png", clear)
    examples = image_folder(tmp_path)
    with pytest.warns(UserWarning, match="of some pictures, (16 bits|transparency)"):
        seen = [np.asarray(example.open()) for example in examples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example, name, pixels in zip(examples, ("depth.png", "phone.jpg", "sticker.png"), seen,
                                         strict=True):  # fmt: skip
            assert np.array_equal(pixels, open_picture(tmp_path / name))
            assert example.size() == (pixels.shape[1], pixels.shape[0])
    assert seen[0][0, 0, 0] == 0 and seen[0][0, -1, 0] == 255
    assert seen[1].shape == (64, 32, 3) and (seen[2] == 255).all()


def test_an_upright_picture_chooses_the_bucket(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    saved_with(tmp_path / "pictures", "a.jpg", Image.new("RGB", (64, 32)), exif=turned)
    settings = config(tmp_path, use_aspect_ratio_buckets=True, aspect_ratio_buckets="32,64;64,32")
    examples = image_folder(tmp_path / "pictures")
    [item] = cache.plan_items(settings, examples, cache.plan_sizes(settings, 8))
    assert (item.height, item.width) == (64, 32)


HOSTILE = {
    '{"file_name": "../a.png", "text": "x"}': r"line 1 names ../a.png, which is outside",
    '{"file_name": "/etc/hostname", "text": "x"}': r"line 1 names /etc/hostname, which is outside",
    '{"file_name": "b/../../a.png", "text": "x"}': r"line 1 names .*, which is outside",
    '{"file_name": "0.png", "text": "x"}\n\n{"file': r"line 3, is no JSON",
    '{"file_name": "0.png", "text": "x"}\n[]': r"line 2, is no JSON object",
    '{"file_name": 3, "text": "x"}': r"line 1 has file_name, text; needed are",
    '{"file_name": "0.png", "text": []}': r"line 1 has file_name, text; needed are",
    '{"file_name": "a\\u0000.png", "text": "x"}': r"line 1 names .*, which is not there",
    '{"file_name": ".", "text": "x"}': r"line 1 names ., which is not there",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_metadata_that_leave_their_folder_or_are_broken_name_the_line(tmp_path, text):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place in (folder / "0.png", tmp_path / "a.png"):
        tiny_image(0, 32).save(place)
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"metadata.jsonl, {HOSTILE[text]}"):
        image_folder(folder)


def test_metadata_name_files_outside_where_that_is_asked_for(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    tiny_image(0, 32).save(tmp_path / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "../a.png", "text": "x"}')
    settings = config(tmp_path, metadata_anywhere=True)
    assert [example.caption for example in load_examples(settings)] == ["x"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.txt"])
def test_text_that_is_not_utf8_names_file_and_line(tmp_path, name):
    tiny_image(0, 32).save(tmp_path / "0.png")
    (tmp_path / name).write_bytes(b"\n\xff")
    with pytest.raises(ValueError, match=rf"train_data_dir: .*{name} is not in UTF-8: .* line 2"):
        image_folder(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    write_shard(tmp_path / "s.tar", [("0.png", png(0)), ("0.txt", b"x"), ("1.png", png(1))])
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"train_shards_path_or_url: .*s\.tar"):
        webdataset_shards(str(tmp_path / "s.tar"))


def test_a_truncated_picture_of_a_shard_is_named(tmp_path):
    half = png(0)[: len(png(0)) // 2]
    write_shard(tmp_path / "s.tar", [("0.png", half), ("0.txt", b"x")])
    [example] = webdataset_shards(str(tmp_path / "s.tar"))
    with pytest.raises(ValueError, match=r"train_shards_path_or_url: sample 0 of .*truncated"):
        example.open()


def test_pictures_go_by_their_place_size_and_age_and_are_not_read_for_it(tmp_path, monkeypatch):
    folder = with_metadata(tmp_path)
    before = [example.digest for example in image_folder(folder)]
    monkeypatch.setattr("PIL.Image.open", None)
    (folder / "0.png").write_bytes(bytes((folder / "0.png").stat().st_size))
    after = [example.digest for example in image_folder(folder)]
    assert after[0] != before[0] and after[1:] == before[1:]


# What is cached


def again(tmp_path):
    """The set of `training_set`, of the pictures that are there."""
    teacher = NoiseTeacher(tiny_sd_pipeline())
    return cache.TrainingSet(config(tmp_path), teacher, image_folder(tmp_path / "pictures"))


def test_a_flipped_bit_in_a_cache_is_noticed_and_computed_anew(tmp_path):
    before = training_set(tmp_path).batch(0, 0, draws())
    for file in (tmp_path / "out/cache").rglob("*.safetensors"):
        spoilt = bytearray(file.read_bytes())
        spoilt[len(spoilt) // 2] ^= 1
        file.write_bytes(spoilt)
        with pytest.warns(UserWarning, match=rf"cache_dir: .*{file.name} is damaged.*anew"):
            after = again(tmp_path).batch(0, 0, draws())
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_a_killed_run_left_in_a_cache_is_removed(tmp_path):
    training_set(tmp_path)
    [folder] = (tmp_path / "out/cache").glob("latents-*")
    (folder / ".000000000.safetensors.0123456789abcdef.part").write_bytes(b"half")
    again(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["000000000.safetensors"]


FILL = """
import sys, time, torch
from pathlib import Path
from linfusion.training.data.rows import filled
torch.set_num_threads(1)
def compute(i):
    with open(sys.argv[1] + "/log", "a") as log:
        log.write(f"{i} {sys.argv[2]}\\n")
    time.sleep(0.1)
    return {"x": torch.full((3,), float(i))}
files = [Path(sys.argv[1]) / "c" / f"{i}.safetensors" for i in range(8)]
print("there", flush=True)
sys.stdin.readline()
filled(files, compute, description="x")
print("left", sum(file.exists() for file in files))
"""


def test_processes_share_what_is_to_be_computed_and_leave_together(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "there\n"
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    assert [rank.communicate()[0] for rank in ranks] == ["left 8\n"] * 2
    done = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(i) for i, _ in done) == list(range(8))  # each once
    assert {rank for _, rank in done} == {"0", "1"}
