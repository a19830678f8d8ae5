"""LinGen trained on clips and pictures by the common trainer."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from linfusion.models import LinGenTransformer3DModel
from linfusion.training import TrainConfig, distill
from linfusion.training.data.films import FilmSet, film_folder
from linfusion.training.data.schedule import ClipOptions, Stage
from linfusion.training.objectives.from_data import FromData
from linfusion.training.teachers.lingen import LinGenHost, noise_levels
from tests.tiny_video import tiny_lingen, tiny_wan

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """Two animations of 8 frames, one of them 10, and a picture."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name, shades in (("a", range(0, 160, 20)), ("b", range(200, 0, -20)), ("c", [0])):
        grey = [Image.fromarray(np.full((20, 20, 3), shade, np.uint8)) for shade in shades]
        grey[0].save(folder / f"{name}.webp", save_all=True, append_images=grey[1:], lossless=True)
        (folder / f"{name}.txt").write_text(f"caption {name}")
    return folder


def settings(folder, **changes):
    return TrainConfig.of(
        **{
            "method": "lingen",
            "train_data_dir": str(folder),
            "output_dir": str(folder.parent / "out"),
            "cache_dir": str(folder.parent / "cache"),
            "clip_schedule": "2,3,16;2,7,8",
            "proportion_stills": 0.3,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "ema_decay": 0.5,
            **changes,
        }
    )


def film_set(folder, pipe=None, **changes):
    config = settings(folder, **changes)
    return FilmSet(config, LinGenHost(pipe or tiny_lingen()), film_folder(config))


def batch(data, number=0, seed=0):
    return data.batch(number, 0, torch.Generator().manual_seed(seed))


def test_a_run_gives_weights_that_moved_and_the_pipeline_as_it_was(folder):
    pipe = tiny_lingen()
    before = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    out = distill(settings(folder), pipeline=pipe)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    trained = LinGenTransformer3DModel.from_pretrained(out).state_dict()
    assert trained.keys() == before.keys()
    assert all(t.isfinite().all() for t in trained.values())
    moved = [name for name, t in before.items() if not torch.equal(trained[name], t)]
    assert len(moved) > 0.9 * len(before)


def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path):
    whole = distill(settings(folder, checkpointing_steps=2), pipeline=tiny_lingen())
    resumed = distill(
        settings(
            folder,
            checkpointing_steps=2,
            output_dir=str(tmp_path / "resumed"),
            resume_from_checkpoint=str(whole / "checkpoint-2"),
        ),
        pipeline=tiny_lingen(),
    )
    a, b = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_pipeline_in_a_folder_is_trained(folder, tmp_path):
    tiny_lingen().save_pretrained(tmp_path / "pipe")
    config = settings(
        folder,
        pretrained_model_name_or_path=str(tmp_path / "pipe"),
        max_train_steps=1,
        mixed_precision="bf16",
    )
    weights = load_file(distill(config) / WEIGHTS)
    assert {t.dtype for t in weights.values()} == {torch.float32}


def test_clips_grow_by_the_schedule_and_the_last_stage_goes_on(folder):
    data = film_set(folder, proportion_stills=0.0, gradient_accumulation_steps=2)
    shapes = [tuple(batch(data, n)["latents"].shape) for n in (0, 3, 4, 7, 100)]
    assert shapes == [(2, 4, 3, 8, 8)] * 2 + [(2, 4, 7, 4, 4)] * 3
    assert ClipOptions("2,3,16;2,7,8").stages == [Stage(2, 3, 16), Stage(2, 7, 8)]


def test_stills_are_of_the_pictures_and_as_often_as_asked(folder):
    data = film_set(folder, proportion_empty_prompts=0.0)
    lone = data._text[[data._row["caption c"]]]["states_0"]
    stills = [b for n in range(200) if (b := batch(data, n))["latents"].shape[2] == 1]
    assert 40 < len(stills) < 80
    assert all((b["states_0"] == lone).all() for b in stills)


def test_a_clip_begins_anywhere_unless_the_vae_has_seen_more(folder):
    image = film_set(folder, proportion_stills=0.0, clip_schedule="2,3,16")
    first = [float(batch(image, 0, seed)["latents"][0].mean()) for seed in range(12)]
    assert len(set(first)) > 4
    wan = film_set(folder, tiny_lingen(make_vae=tiny_wan), proportion_stills=0.0,
                   clip_schedule="2,5,16")  # fmt: skip
    found = [batch(wan, 0, seed)["latents"] for seed in range(12)]
    assert found[0].shape == (2, 4, 2, 4, 4)
    assert len({float(x[i].mean()) for x in found for i in (0, 1)}) == 2  # one of each clip


def test_a_stride_leaves_frames_out(folder):
    films = film_folder(settings(folder, clip_stride=3))
    assert [film.frames for film in films] == [3, 4, 1]
    shades = [np.asarray(picture.convert("L"))[0, 0] for picture in films[1].pictures(3)]
    assert shades == [200, 140, 80, 20]


def test_a_video_is_a_clip(folder):
    with av.open(str(folder / "d.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for i in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 25 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / "d.txt").write_text("caption d")
    film = film_folder(settings(folder))[-1]
    assert (film.caption, film.frames) == ("caption d", 9)
    shades = [np.asarray(picture).mean() for picture in film.pictures(1)]
    np.testing.assert_allclose(shades, np.arange(9) * 25, atol=6)


def test_every_block_has_one_noise_level_and_the_history_little():
    t = noise_levels(4000, (6, 4, 4, 4), 2.0, torch.Generator().manual_seed(0))
    blocks = t.split([6, 4, 4, 4], 1)
    assert all((block == block[:, :1]).all() for block in blocks)
    levels = torch.stack([block[:, 0] for block in blocks], 1)
    assert ((levels >= 0) & (levels < 1)).all()
    # a block is in the past of the drawn one with chance 3/4, 2/4, 1/4, 0, and half of those clean
    clean = (levels == 0).float().mean(0)
    torch.testing.assert_close(clean, torch.tensor([3, 2, 1, 0]) / 8, atol=0.03, rtol=0)
    assert not (noise_levels(4000, (1,), 2.0) == 0).any()
    assert abs(levels[:, 3].median() - 2 / 3) < 0.02  # the shift moves 1/2 there


def test_frames_without_noise_have_no_loss():
    host = LinGenHost(tiny_lingen())
    pair = FromData(host)

    def student(hidden_states, timestep, return_dict):
        clean = (timestep == 0)[:, None, :, None, None]
        return (torch.where(clean, torch.nan, 2.0).expand_as(hidden_states),)

    inputs = {"hidden_states": torch.zeros(1, 4, 4, 2, 2), "timestep": torch.tensor([[0, 0, 5, 5]])}
    losses = pair.losses(student, inputs, torch.zeros(1, 4, 4, 2, 2))
    pair.close()
    assert losses["simple"] == 4.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"clip_schedule": None}, "clip_schedule: got '', accepted is steps"),
        ({"clip_schedule": "3,16"}, "clip_schedule: got '3,16', accepted is steps,frames,size"),
        ({"proportion_stills": 1.5}, "proportion_stills: got 1.5"),
        ({"clip_stride": 0}, "clip_stride: got 0"),
        ({"validation_steps": 1, "validation_prompts": ("a",)}, "validation_steps: given"),
        ({"method": "linfusion"}, "clip_schedule: given, but only method 'lingen' has it"),
    ],
)
def test_a_bad_setting_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(folder, **changes)


@pytest.mark.parametrize(
    "schedule, message",
    [
        ("2,3,15", "clip_schedule: 2,3,15: the size is no multiple of 4"),
        ("2,3,16;2,9,16", r"clip_schedule: 2,9,16: .*a\.webp has only 8 frames"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused_before_anything_is_written(
    folder, schedule, message
):
    with pytest.raises(ValueError, match=message):
        distill(settings(folder, clip_schedule=schedule), pipeline=tiny_lingen())
    assert not (folder.parent / "out").exists()


def test_a_folder_without_clips_is_refused(folder):
    for name in "ab":
        (folder / f"{name}.webp").unlink()
    with pytest.raises(ValueError, match=r"train_data_dir: .* has pictures alone, no clip"):
        distill(settings(folder), pipeline=tiny_lingen())
