"""`linfusion video`, on a tiny pipeline with random weights."""

from __future__ import annotations

import json
import signal

import av
import numpy as np
import pytest
import torch
from PIL import Image

from linfusion import zoo
from linfusion.cli import main
from linfusion.files.picture_reader import read
from linfusion.files.video_reader import count_frames, read_video
from linfusion.files.video_writer import open_video
from linfusion.pipelines.lingen.pipeline import LinGenPipeline
from linfusion.pipelines.lingen.streaming_vae import StreamingVAEDecoder
from linfusion.pipelines.load import load as load_pipeline
from tests.tiny import tiny_image, tiny_sd_pipeline
from tests.tiny_video import tiny_lingen, tiny_wan

PROMPT = "a waving hand"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "emoji-video"
    tiny_lingen().save_pretrained(folder)
    return folder


@pytest.fixture
def video(model, capsys):
    """Call `linfusion video` on the tiny pipeline; gives exit code, stdout and stderr."""

    def call(*arguments: object, prompts=(PROMPT,)) -> tuple[int, str, str]:
        capsys.readouterr()
        common = ["video", *prompts, "-m", model, "--steps", 1, "--seconds", 1]
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in [*common, *arguments]])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def frames_of(folder):
    return np.stack([read(file) for file in sorted(folder.iterdir())])


def test_a_video_is_written_and_told(video, tmp_path):
    file = tmp_path / "new" / "x.mp4"
    code, out, err = video("--seed", 3, "--fps", 10, "-o", file)
    assert (code, out) == (0, f"{file}\n"), err
    with av.open(str(file)) as made:
        stream = made.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (16, 16, 10)
        assert len(list(made.decode(video=0))) == 10
    assert "10 frames of 16x16 in" in err and "of memory" in err


def test_the_frames_are_those_of_the_pipeline(video, model, tmp_path):
    code, out, err = video("--seed", 3, "--size", "16x8", "-o", tmp_path / "x", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert (told["frames"], told["seed"], told["fps"]) == (12, 3, 12)
    assert told["peak_rss"] > 2**20 and 0 < told["first_seconds"] <= told["seconds"]
    pipe = LinGenPipeline.from_pretrained(model)
    frames = pipe(PROMPT, generator=torch.Generator().manual_seed(3), **told["call"]).frames[0]
    assert np.array_equal(frames_of(tmp_path / "x"), np.round(frames * 255).astype(np.uint8))


def test_prompts_take_turns(video, tmp_path):
    two = {"prompts": ("a hand", "a face")}
    assert video("--seed", 3, "--start", 6, "-o", tmp_path / "two", **two)[0] == 0
    assert video("--seed", 3, "-o", tmp_path / "one", prompts=("a hand",))[0] == 0
    one, two = frames_of(tmp_path / "one"), frames_of(tmp_path / "two")
    assert np.array_equal(one[:6], two[:6]) and not np.array_equal(one[6:], two[6:])


@pytest.mark.parametrize("kind", ["--image", "--continue"])
def test_what_is_given_decides(video, tmp_path, kind):
    picture, clip = tmp_path / "start.png", tmp_path / "clip.mp4"
    tiny_image(size=16).save(picture)
    with open_video(clip, 12, (16, 16)) as out:
        out.write(np.stack([np.asarray(tiny_image(i, 16)) for i in range(4)]))
    given = (kind, picture if kind == "--image" else clip)
    for name, more in (("plain", ()), ("given", given)):
        code, _, err = video("--seed", 3, "-o", tmp_path / name, *more)
        assert code == 0, err
    assert not np.array_equal(frames_of(tmp_path / "plain"), frames_of(tmp_path / "given"))


def test_a_clip_that_does_not_fit_loses_its_beginning(tmp_path, capsys):
    folder = tmp_path / "model"
    tiny_lingen(make_vae=tiny_wan).save_pretrained(folder)
    with open_video(tmp_path / "clip.gif", 12, (32, 32)) as out:
        out.write(np.stack([np.asarray(tiny_image(i, 32)) for i in range(7)]))
    call = ["video", PROMPT, "-m", folder, "--steps", 1, "--continue", tmp_path / "clip.gif"]
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in [*call, "--seconds", "0.75", "-o", tmp_path / "x"]])
    err = capsys.readouterr().err
    assert not stop.value.code, err
    assert "continue: the first 2 of 7 frames do not fit" in err
    assert len(frames_of(tmp_path / "x")) == 9


def test_a_video_that_goes_on_is_the_same_file(video, tmp_path):
    common = ("--state", tmp_path / "run", "--resume")
    assert video(*common, "--seed", 3, "-o", tmp_path / "a.mp4")[0] == 0
    assert video(*common, "-o", tmp_path / "b.mp4")[0] == 0  # without a seed: that of the run
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C while the third block is decoded."""
    frames, calls = StreamingVAEDecoder.frames, []

    def decode(self, latents):
        calls.append(latents)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return frames(self, latents)

    monkeypatch.setattr(StreamingVAEDecoder, "frames", decode)
    # A shell lets what it starts in the background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_video_plays_and_goes_on(video, tmp_path, interrupted):
    common = ("--seed", 3, "--state", tmp_path / "run", "--resume")
    code, out, err = video(*common, "-o", tmp_path / "a.mp4")
    assert (code, out) == (130, "")
    last = err.strip().splitlines()[-1]
    assert last == (
        f"linfusion: interrupted; 6 frames are in {tmp_path / 'a.mp4'}; what is done is in"
        f" {tmp_path / 'run'}: the same command with --resume goes on"
    )
    assert len(read_video(tmp_path / "a.mp4")) == 6
    assert video(*common, "-o", tmp_path / "a.mp4")[0] == 0
    assert video("--seed", 3, "-o", tmp_path / "b.mp4")[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


WRONG = {
    "empty": ([], {"prompts": (" ",)}, "prompt: ' ' is empty"),
    "long": ([], {"prompts": ("apple " * 100,)}, "prompt: 600 characters are 500 tokens"),
    "starts": (["--start", 5], {}, "start: got 1 for 1 prompts"),
    "no start": ([], {"prompts": ("a", "b")}, "start: got 0 for 2 prompts"),
    "late": (["--start", 11], {"prompts": ("a", "b")}, "prompt: no block begins in the time"),
    "length": (["--seconds", "nan"], {}, "seconds: nan; accepted are numbers above 0"),
    "too long": (["--seconds", 60], {}, "num_frames: got 720, the positions of this model"),
    "fps": (["--fps", 0], {}, "fps: 0.0; accepted"),
    "grid": (["--height", 12, "--width", 20], {}, "height: 12 px; accepted are multiples of 8"),
    "suffix": (["-o", "x.avi"], {}, "path: suffix '.avi'"),
    "folder": (["-o", "/dev/null/x.mp4"], {}, "output: cannot write to '/dev/null'"),
    "codec": (["--codec", "magic"], {}, "codec: 'magic' is not one that this PyAV has"),
    "resume": (["--resume"], {}, "resume: needs --state"),
    "state": (["--state", "/dev/null/run"], {}, "state: cannot write to '/dev/null/run'"),
    "image": (["--image", "nowhere.png"], {}, "image: there is no file 'nowhere.png'"),
    "device": (["--device", "foo"], {}, "device: 'foo' is none; accepted are cuda, cuda:1"),
    "clip": (["--continue", "nowhere.mp4"], {}, "continue: there is no video 'nowhere.mp4'"),
    "both": (["--image", "a.png", "--continue", "b.mp4"], {}, "image: got one beside --continue"),
    "model": (["-m", "zoo:cats"], {}, "no model 'cats' in the zoo"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_ends_with_2_and_one_line(video, tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    arguments, more, reason = WRONG[wrong]
    code, out, err = video(*arguments, **more)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("linfusion: ") and reason in last
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_of_pictures_is_refused(video, tmp_path):
    tiny_sd_pipeline(image_encoder=None).save_pretrained(tmp_path / "sd")
    code, _, err = video("-m", tmp_path / "sd", "-o", tmp_path / "x.mp4")
    assert code == 2 and "is a StableDiffusionPipeline, which draws no videos" in err


def test_generate_points_a_video_model_to_video(model, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["generate", PROMPT, "-m", str(model), "-o", str(tmp_path)])
    assert stop.value.code == 2
    assert "draws videos; use linfusion video" in capsys.readouterr().err


def test_a_video_pipeline_of_the_zoo_is_found(video, model, monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "_ROOT", model.parent)
    assert video("-m", "zoo:emoji-video", "-o", tmp_path / "x.mp4")[0] == 0
    assert isinstance(zoo.load("emoji-video"), LinGenPipeline)
    assert isinstance(load_pipeline(str(model)), LinGenPipeline)
    with pytest.raises(ValueError, match="linear: got False, but emoji-video is linear itself"):
        zoo.load("emoji-video", linear=False)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_a_written_video_is_read(name, tmp_path):
    frames = np.repeat(np.arange(10, 250, 40, np.uint8), 16 * 16 * 3).reshape(6, 16, 16, 3)
    with open_video(tmp_path / name, 10, (16, 16)) as out:
        out.write(frames)
    assert np.abs(read_video(tmp_path / name).astype(int) - frames).max() <= 3
    assert np.abs(read_video(tmp_path / name, 2).astype(int) - frames[-2:]).max() <= 3


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="video: cannot read"):
        read_video(tmp_path / "x.mp4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no frames"):
        read_video(tmp_path / "empty")


def test_what_is_transparent_in_an_animation_is_on_white(tmp_path):
    clear = [Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("RGBA", (8, 8), (0, 0, 255, 255))]
    clear[0].save(tmp_path / "a.webp", save_all=True, append_images=clear[1:], lossless=True)
    frames = read_video(tmp_path / "a.webp")
    assert frames.shape == (2, 8, 8, 3) and (frames[0] == 255).all()
    assert (frames[1] == [0, 0, 255]).all()
    assert count_frames(tmp_path / "a.webp") == 2


def test_an_upright_first_frame_is_what_a_phone_shows(video, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    half = Image.fromarray(np.repeat(np.uint8([[[0] * 3], [[250] * 3]]), 16, 1).repeat(8, 0))
    half.save(tmp_path / "a.jpg", exif=turned, quality=100)
    half.rotate(180).save(tmp_path / "b.jpg", quality=100)
    for name in "ab":
        code, _, err = video("--image", tmp_path / f"{name}.jpg", "-o", tmp_path / name)
        assert code == 0, err
    first = [np.asarray(Image.open(tmp_path / name / "000000.png")).astype(int) for name in "ab"]
    assert np.abs(first[0] - first[1]).max() <= 2


def test_a_second_video_in_one_file_is_refused_while_it_is_written(tmp_path):
    with open_video(tmp_path / "a.mp4", 10, (16, 16)) as out:
        out.write(np.zeros((1, 16, 16, 3), np.uint8))
        with pytest.raises(ValueError, match=r"path: .*a\.mp4 is in use by another run"):
            open_video(tmp_path / "a.mp4", 10, (16, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_longer_video_cannot_go_on_with_a_state_and_is_told_in_frames(video, tmp_path):
    state = ("--state", tmp_path / "run", "--seed", 1)
    assert video(*state, "-o", tmp_path / "a.mp4")[0] == 0
    code, _, err = video(*state, "-o", tmp_path / "a.mp4")
    assert code == 2 and "holds a video; --resume goes on with it" in err
    code, _, err = video(*state, "--resume", "--seconds", 1.25, "-o", tmp_path / "a.mp4")
    assert code == 2 and "its blocks make" in err and "--continue" in err
    code, _, err = video("--continue", tmp_path / "a.mp4", "-o", tmp_path / "b.mp4")
    assert code == 2 and "--seconds is the length of both and has to be longer" in err
