"""Sources of pictures and captions, the cache, and the order of batches."""

import io
import json
import sys
import tarfile

import pytest
import torch
from PIL import Image

from linfusion.training import TrainConfig
from linfusion.training.data import cache
from linfusion.training.data.pictures import (
    datasets_set,
    fit,
    image_folder,
    read_prompts,
    rgb,
)
from linfusion.training.data.shards import webdataset_shards
from linfusion.training.roles import load_examples
from linfusion.training.teachers.images import NoiseTeacher
from tests.tiny import tiny_image, tiny_sd_pipeline


def pictures(folder, n=3, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        tiny_image(i, size).save(folder / f"{i}.png")
    return folder


def with_metadata(folder, n=3):
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(n)]
    (pictures(folder, n) / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def write_shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(seed):
    buffer = io.BytesIO()
    tiny_image(seed, 24).save(buffer, "PNG")
    return buffer.getvalue()


def test_captions_come_from_jsonl(tmp_path):
    found = image_folder(with_metadata(tmp_path))
    assert [e.caption for e in found] == ["picture 0", "picture 1", "picture 2"]
    assert found[1].open().tobytes() == tiny_image(1, 40).tobytes()


def test_captions_come_from_csv(tmp_path):
    (pictures(tmp_path / "train", 2) / "metadata.csv").write_text(
        'file_name,label\n1.png,"one, red"\n0.png,zero\n'
    )
    assert [e.caption for e in image_folder(tmp_path, caption_column="label")] == [
        "one, red",
        "zero",
    ]


def test_captions_come_from_text_files(tmp_path):
    for i in range(3):
        (pictures(tmp_path) / f"{i}.txt").write_text(f"number {i}\n")
    assert [e.caption for e in image_folder(tmp_path)] == ["number 0", "number 1", "number 2"]


def test_a_picture_without_caption_is_named(tmp_path):
    (pictures(tmp_path) / "0.txt").write_text("zero")
    with pytest.raises(ValueError, match=r"train_data_dir: .*1\.png has no caption"):
        image_folder(tmp_path)


@pytest.mark.parametrize(
    "row, said",
    [
        (
            {"file_name": "0.png"},
            r"caption_column: .*line 1 has file_name; needed are .* 'text'",
        ),
        ({"file_name": "9.png", "text": "x"}, "train_data_dir: .* names 9.png, which is not there"),
    ],
)
def test_unfit_metadata_is_refused(tmp_path, row, said):
    (pictures(tmp_path) / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=said):
        image_folder(tmp_path)


def test_a_folder_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(ValueError, match="train_data_dir: there is no folder"):
        image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="train_data_dir: no pictures"):
        image_folder(tmp_path)


def test_shards_are_read_in_order(tmp_path):
    for shard in range(2):
        write_shard(
            tmp_path / f"s-{shard:02d}.tar",
            [
                (f"a/{shard}.png", png(shard)),
                (f"a/{shard}.json", json.dumps({"text": f"json {shard}"}).encode()),
                (f"b/{shard}.seg.txt", b"no caption of ours"),
                (f"b/{shard}.png", png(9)),
                (f"b/{shard}.txt", f"text {shard}".encode()),
            ],
        )
    found = webdataset_shards(str(tmp_path / "s-{00..01}.tar"))
    assert [e.caption for e in found] == ["json 0", "text 0", "json 1", "text 1"]
    assert found[2].open().tobytes() == tiny_image(1, 24).tobytes()
    assert found == sorted(found, key=lambda e: e.caption[-1])
    again = webdataset_shards(str(tmp_path / "s-*.tar"))
    assert [e.digest for e in again] == [e.digest for e in found]


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("https://example.org/{0..9}.tar", "accepted are paths on this machine"),
        ("pipe:cat x.tar", "accepted are paths on this machine"),
        ("nowhere-{0..1}.tar", "there is no file nowhere-0.tar"),
        ("nowhere-*.tar", r"there is no file nowhere-\*.tar"),
    ],
)
def test_shards_that_are_not_there_are_named(pattern, said):
    with pytest.raises(ValueError, match=f"train_shards_path_or_url: .*{said}"):
        webdataset_shards(pattern)


def test_a_caption_that_a_shard_lacks_is_named(tmp_path):
    write_shard(tmp_path / "s.tar", [("7.png", png(0)), ("7.json", b'{"label": "x"}')])
    with pytest.raises(ValueError, match="caption_column: 'text' is no text in sample 7 of"):
        webdataset_shards(str(tmp_path / "s.tar"))


def test_a_sample_without_caption_is_named(tmp_path):
    write_shard(tmp_path / "s.tar", [("7.png", png(0))])
    with pytest.raises(ValueError, match=r"sample 7 of .* has .png; needed are a picture and"):
        webdataset_shards(str(tmp_path / "s.tar"))


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(ValueError, match=r"is no plain \.tar file"):
        webdataset_shards(str(tmp_path / "s.tar"))


def test_missing_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"linfusion\[train\]"):
        datasets_set("some/set")


@pytest.fixture
def image_set(tmp_path, monkeypatch):
    """A `datasets` set of three captioned pictures in a folder; its cache stays in tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return str(with_metadata(tmp_path / "set"))


def test_a_datasets_set_gives_pictures_and_captions(image_set):
    found = datasets_set(image_set)
    assert [e.caption for e in found] == ["picture 0", "picture 1", "picture 2"]
    assert rgb(found[1].open()).tobytes() == tiny_image(1, 40).tobytes()
    assert len({e.digest for e in found}) == 3


@pytest.mark.parametrize("argument", ["image_column", "caption_column"])
def test_a_column_that_a_set_lacks_is_named(image_set, argument):
    with pytest.raises(ValueError, match=f"{argument}: 'none' is no column of .*, which has image"):
        datasets_set(image_set, **{argument: "none"})


def test_each_source_of_pictures_is_the_one_read(tmp_path, image_set):
    write_shard(tmp_path / "s.tar", [("a.png", png(0)), ("a.txt", b"from a shard")])
    (tmp_path / "p.txt").write_text("a")

    def captions(**source):
        examples = load_examples(TrainConfig(**source))
        return examples and [e.caption for e in examples]

    three = ["picture 0", "picture 1", "picture 2"]
    assert captions(train_data_dir=str(with_metadata(tmp_path / "pictures"))) == three
    assert captions(dataset_name=image_set) == three
    assert captions(train_shards_path_or_url=str(tmp_path / "s.tar")) == ["from a shard"]
    assert captions(train_prompts=str(tmp_path / "p.txt")) is None  # the teacher draws


def test_prompts_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("a\n\n  b c \n")
    assert read_prompts(tmp_path / "p.txt") == ["a", "b c"]


def test_an_empty_prompt_file_is_named(tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="train_prompts: no prompt in"):
        read_prompts(tmp_path / "p.txt")


def test_what_is_transparent_lies_on_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert rgb(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("size", [(30, 64), (64, 30), (7, 5), (48, 32)])
def test_fitting_covers_and_crops_the_centre(size):
    image = Image.new("RGB", size, "red")
    fitted = fit(image, 48, 32, "bilinear")
    assert fitted.size == (32, 48) and fitted.getcolors() == [(32 * 48, (255, 0, 0))]


def config(tmp_path, **changes):
    return TrainConfig.of(
        **{
            "train_data_dir": str(tmp_path / "pictures"),
            "output_dir": str(tmp_path / "out"),
            "resolution": 32,
            "train_batch_size": 4,
            **changes,
        }
    )


def training_set(tmp_path, n=6, **changes):
    settings = config(tmp_path, **changes)
    examples = image_folder(with_metadata(tmp_path / "pictures", n))
    return cache.TrainingSet(settings, NoiseTeacher(tiny_sd_pipeline()), examples)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_is_cached_is_not_computed_again(tmp_path, monkeypatch):
    before = training_set(tmp_path).batch(0, 0, draws())
    pipe = tiny_sd_pipeline()
    monkeypatch.setattr(pipe.vae, "encode", None)
    monkeypatch.setattr(pipe, "encode_prompt", None)
    again = cache.TrainingSet(
        config(tmp_path), NoiseTeacher(pipe), image_folder(tmp_path / "pictures")
    )
    after = again.batch(0, 0, draws())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_picture_of_the_same_name_is_encoded_anew(tmp_path):
    training_set(tmp_path)
    tiny_image(77, 40).save(tmp_path / "pictures" / "0.png")
    cache.TrainingSet(
        config(tmp_path), NoiseTeacher(tiny_sd_pipeline()), image_folder(tmp_path / "pictures")
    )
    assert len(list((tmp_path / "out/cache").glob("latents-*"))) == 2
    assert len(list((tmp_path / "out/cache").glob("text-*"))) == 1


def test_another_encoder_fills_another_cache(tmp_path):
    training_set(tmp_path)
    cache.TrainingSet(
        config(tmp_path),
        NoiseTeacher(tiny_sd_pipeline(seed=1)),
        image_folder(tmp_path / "pictures"),
    )
    assert len(list((tmp_path / "out/cache").glob("*-*"))) == 4


def test_cached_latents_are_those_of_the_vae(tmp_path):
    data, pipe = training_set(tmp_path), tiny_sd_pipeline()
    pixels = torch.frombuffer(
        bytearray(tiny_image(2, 40).resize((32, 32), 1).tobytes()), dtype=torch.uint8
    )
    pixels = pixels.view(1, 32, 32, 3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).latent_dist.mean[0] * pipe.vae.config.scaling_factor
    cached = data._latents[32, 32][[2]]["mean"][0].float()
    assert (cached - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_a_batch_is_a_function_of_its_number(tmp_path):
    data = training_set(tmp_path)
    forward = [data.batch(i, 0, draws(i))["states"] for i in range(7)]
    other = training_set(tmp_path)
    for i in (6, 2, 5):
        assert torch.equal(other.batch(i, 0, draws(i))["states"], forward[i])


def test_a_pass_sees_every_picture(tmp_path):
    data = training_set(tmp_path, proportion_empty_prompts=0.0)
    assert data.batches_per_epoch == 2
    states = torch.cat([data.batch(i, 0, draws())["states"] for i in range(2)])
    assert len(states) == 8 and len(states.flatten(1).unique(dim=0)) == 6


def test_processes_share_a_batch(tmp_path):
    with_metadata(tmp_path / "pictures", 6)
    examples = image_folder(tmp_path / "pictures")
    settings = config(tmp_path, train_batch_size=3, proportion_empty_prompts=0.0)
    data = cache.TrainingSet(settings, NoiseTeacher(tiny_sd_pipeline()), examples, processes=2)
    states = torch.cat([data.batch(0, process, draws())["states"] for process in range(2)])
    assert data.batches_per_epoch == 1 and len(states.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_captions_are_dropped_as_often_as_asked(tmp_path, share):
    data = training_set(tmp_path, proportion_empty_prompts=share)
    empty = data._text[[data._empty]]["states"]
    g = draws()
    dropped = [(data.batch(i, 0, g)["states"] == empty).all((1, 2)).tolist() for i in range(50)]
    assert abs(sum(map(sum, dropped)) / 200 - share) < 0.1


def test_mirrored_pictures_are_seen_too(tmp_path):
    assert training_set(tmp_path, random_flip=True).batches_per_epoch == 3
    assert training_set(tmp_path).batches_per_epoch == 2


def test_every_picture_is_seen_at_every_resolution(tmp_path):
    data = training_set(tmp_path, extra_resolutions=(48, 64), proportion_empty_prompts=0.0)
    seen = {}
    for i in range(data.batches_per_epoch):
        batch = data.batch(i, 0, draws())
        states = seen.setdefault(batch["latents"].shape[-1], [])
        states += batch["states"].flatten(1).unbind()
    assert {size: len(torch.stack(s).unique(dim=0)) for size, s in seen.items()} == {
        4: 6,
        6: 6,
        8: 6,
    }


def test_only_so_many_samples_are_used(tmp_path):
    data = training_set(tmp_path, max_train_samples=3, proportion_empty_prompts=0.0)
    states = torch.cat([data.batch(i, 0, draws())["states"] for i in range(3)])
    assert len(states.flatten(1).unique(dim=0)) == 3


def test_each_batch_is_of_one_bucket(tmp_path):
    folder = with_metadata(tmp_path / "pictures", 6)
    for i in range(3):
        tiny_image(i, 64).crop((0, 0, 64, 30)).save(folder / f"{i}.png")
    settings = config(
        tmp_path, use_aspect_ratio_buckets=True, aspect_ratio_buckets="32,32;32,64;64,32"
    )
    data = cache.TrainingSet(settings, NoiseTeacher(tiny_sd_pipeline()), image_folder(folder))
    shapes = {tuple(data.batch(i, 0, draws())["latents"].shape) for i in range(2)}
    assert shapes == {(4, 4, 4, 4), (4, 4, 4, 8)}


def test_a_resolution_the_vae_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resolution: got 33x33, accepted are multiples of 8"):
        training_set(tmp_path, resolution=33)


def test_the_teacher_draws_the_pictures(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    settings = TrainConfig(
        train_prompts=str(tmp_path / "p.txt"),
        num_teacher_images=3,
        teacher_steps=2,
        resolution=32,
        train_batch_size=3,
        output_dir=str(tmp_path / "out"),
    )
    pipe = tiny_sd_pipeline()
    data = cache.TrainingSet(settings, NoiseTeacher(pipe), None)
    drawn = pipe(
        "a", height=32, width=32, num_inference_steps=2, output_type="latent",
        generator=torch.Generator().manual_seed(2),
    ).images[0]  # fmt: skip
    cached = data._latents[32, 32][[2]]["mean"][0].float()
    assert (cached - drawn).abs().max() <= 2e-3 * drawn.abs().max()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train_data_dir": None}, "exactly one is needed, got none"),
        ({"dataset_name": "x"}, "exactly one is needed, got train_data_dir, dataset_name"),
        ({"mixed_precision": "fp8"}, "mixed_precision: got 'fp8', accepted are no, fp16, bf16"),
        ({"lr_scheduler": "wavy"}, "lr_scheduler: got 'wavy', accepted are linear"),
        ({"report_to": "paper"}, "report_to: got 'paper', accepted is None or tensorboard"),
        ({"image_interpolation_mode": "x"}, "image_interpolation_mode: got 'x'"),
        ({"train_batch_size": 0}, "train_batch_size: got 0, accepted is 1 or more"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan, accepted is a finite number"),
        ({"extra_resolutions": (0,)}, "extra_resolutions: got 0"),
        ({"proportion_empty_prompts": 1.5}, "proportion_empty_prompts: got 1.5, accepted is 0 to"),
        ({"max_grad_norm": 0}, "max_grad_norm: got 0, accepted is more than 0"),
        ({"aspect_ratio_buckets": "8,8"}, "aspect_ratio_buckets: given, but use_aspect_ratio_b"),
        ({"validation_steps": 5}, "validation_prompts: none given"),
        ({"train_data_dir": None, "train_prompts": "p", "random_flip": True}, "random_flip: "),
    ],
)
def test_an_unfit_setting_is_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **changes)
