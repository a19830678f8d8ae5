"""A streamed video that goes on where it was: to the same bits, and not where it does not fit."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from linfusion.files.whole_files import load_tensors, save_tensors
from tests.pipelines.lingen.killed_stream import DEATHS
from tests.pipelines.lingen.test_pipeline import CALL, PROMPT, VAES, seeded
from tests.tiny import tiny_image
from tests.tiny_video import tiny_lingen, tiny_transformer, tiny_wan


def stream(pipe, folder, prompt=PROMPT, **options):
    frames = 8 * pipe.vae_scale_factor_temporal + 1  # three blocks of latent frames
    options = {**CALL, "num_frames": frames, "generator": seeded(), "state": folder, **options}
    return pipe.stream(prompt, **options)


def begin(pipe, folder, blocks, **options):
    """The frames of the first blocks of a stream that is then closed."""
    running = stream(pipe, folder, **options)
    parts = [next(running) for _ in range(blocks)]
    running.close()
    return parts


@pytest.mark.parametrize("make", VAES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_stream_that_goes_on_gives_the_bits_of_one_left_alone(make, blocks, tmp_path):
    whole = np.concatenate(list(stream(tiny_lingen(make_vae=make), None)))
    parts = begin(tiny_lingen(make_vae=make), tmp_path / "run", blocks)
    rest = stream(tiny_lingen(make_vae=make), tmp_path / "run", resume=True, generator=None)
    parts += list(rest)
    assert len(parts) > blocks
    assert np.array_equal(np.concatenate(parts), whole)


def test_everything_that_decides_goes_on_too(tmp_path):
    """Prompts that switch, a clip to begin with, no guidance, a scheduler with a memory."""

    def pipe():
        scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        return tiny_lingen(make_vae=tiny_wan, scheduler=scheduler)

    options = {
        "prompt": [(0, "a hand"), (13, "a face"), (40, "a star")],
        "video": [tiny_image(i) for i in range(9)],
        "num_frames": 57,
        "guidance_scale": 1.0,
    }
    whole = np.concatenate(list(stream(pipe(), None, **options)))
    for blocks in (1, 2, 3, 4):
        folder = tmp_path / str(blocks)
        parts = begin(pipe(), folder, blocks, **options)
        parts += list(stream(pipe(), folder, resume=True, **options))
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("make", VAES)
def test_a_replay_begins_at_the_start(make, tmp_path):
    pipe = tiny_lingen(make_vae=make)
    whole = np.concatenate(list(stream(pipe, None)))
    begin(pipe, tmp_path / "run", 2)
    replayed = list(stream(pipe, tmp_path / "run", resume=True, replay=True))
    assert np.array_equal(np.concatenate(replayed), whole)
    again = list(stream(pipe, tmp_path / "run", resume=True, replay=True))  # it is finished now
    assert np.array_equal(np.concatenate(again), whole)
    assert list(stream(pipe, tmp_path / "run", resume=True)) == []


def test_a_folder_without_a_video_begins_one(tmp_path):
    pipe = tiny_lingen()
    parts = list(stream(pipe, tmp_path / "new" / "run", resume=True))
    assert np.array_equal(np.concatenate(parts), np.concatenate(list(stream(pipe, None))))


def test_a_block_that_was_interrupted_is_drawn_again(tmp_path):
    pipe = tiny_lingen()
    whole = np.concatenate(list(stream(pipe, None)))
    steps = []

    def stop(of, i, t, tensors):
        steps.append(i)
        of._interrupt = len(steps) == 5  # in the third block
        return tensors

    parts = list(stream(pipe, tmp_path, callback_on_step_end=stop))
    assert [len(part) for part in parts] == [3, 3]
    parts += list(stream(pipe, tmp_path, resume=True))
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_killed_process_leaves_whole_files(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "tests.pipelines.lingen.killed_stream", str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[3],
    )
    expected = np.concatenate(list(stream(tiny_lingen(), None, num_frames=9)))
    for death in DEATHS:
        options = {"num_frames": 9, "resume": True, "replay": True}
        frames = list(stream(tiny_lingen(), tmp_path / str(death), **options))
        assert np.array_equal(np.concatenate(frames), expected)


# Refused


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a stream of which two blocks are done."""
    folder = tmp_path_factory.mktemp("session") / "run"
    begin(tiny_lingen(), folder, 2)
    return folder


DIFFERENT = {
    "prompt": {"prompt": "a face"},
    "size": {"height": 12},
    "steps": {"num_inference_steps": 3},
    "guidance_scale": {"guidance_scale": 2.0},
    "seed": {"generator": seeded(4)},
    "blocks": {"num_frames": 12},
    "given": {"image": tiny_image()},
    "negative_prompt": {"negative_prompt": "a face"},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_state_of_another_video_is_refused(begun, name):
    said = rf"other parameters: .*{name} \(there"
    if name == "blocks":  # a length is said in frames
        said = r"another video: its blocks make 9 frames, these 12"
    with pytest.raises(ValueError, match=rf"^state: .* {said}"):
        stream(tiny_lingen(), begun, resume=True, **DIFFERENT[name])


def test_a_state_of_another_model_is_refused(begun):
    model = tiny_transformer()
    with torch.no_grad():
        model.proj_out.weight.mul_(2)
    with pytest.raises(ValueError, match=r"other parameters: model\.transformer \(there"):
        stream(tiny_lingen(transformer=model), begun, resume=True)
    with pytest.raises(ValueError, match=r"model\.vae \(there"):
        stream(tiny_lingen(make_vae=tiny_wan), begun, resume=True, height=16, width=16)


def test_a_state_is_not_begun_again_unasked(begun):
    with pytest.raises(ValueError, match=r"holds a run; pass resume=True"):
        stream(tiny_lingen(), begun)


def _rewrite(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors, metadata = load_tensors(copy / "session.safetensors")
    about = json.loads(metadata["about"])
    change(tensors, about)
    save_tensors(copy / "session.safetensors", tensors, {"about": json.dumps(about)})
    return copy


POSITIONS = [
    (lambda t, a: a.update(done=99), "state: 99 blocks are done, but this video has 3"),
    (lambda t, a: a.update(done=1), "state: the decoder is at latent frame 6; 1 blocks end at 3"),
    (
        lambda t, a: t["unwanted.frames"][0].fill_(5),
        "state: the state of what is unwanted is at latent frame 5; 2 blocks end at 6",
    ),
    (lambda t, a: t.pop("wanted.frames"), "state: misses frames"),
    (lambda t, a: t.update({"wanted.x": t["wanted.frames"].clone()}), "state: unexpected x"),
]


@pytest.mark.parametrize("change, message", POSITIONS, ids=range(len(POSITIONS)))
def test_a_state_at_another_position_is_refused(begun, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        stream(tiny_lingen(), _rewrite(begun, tmp_path, change), resume=True)


def test_a_file_that_is_no_state_is_refused(begun, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    (copy / "session.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"session\.safetensors is damaged"):
        stream(tiny_lingen(), copy, resume=True)


def test_a_replay_without_its_latents_is_refused(begun, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(begun, copy)
    (copy / "block-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"state: block-00001\.safetensors is not there"):
        list(stream(tiny_lingen(), copy, resume=True, replay=True))


def test_a_state_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="state: cannot write to"):
        stream(tiny_lingen(), tmp_path / "file" / "run")


def test_the_past_is_frozen_while_a_block_is_denoised():
    pipe, model_calls = tiny_lingen(), []

    def write(_, args, kwargs):
        state = args[4] if len(args) > 4 else kwargs["state"]
        committing = (args[5] if len(args) > 5 else kwargs.get("commit")) or False
        model_calls.append(committing)
        if not committing:
            with pytest.raises(RuntimeError, match="the state is frozen"):
                state.reset()

    pipe.transformer.register_forward_pre_hook(write, with_kwargs=True)
    list(stream(pipe, None, num_frames=6))
    assert model_calls == [False] * 4 + [True] * 2 + [False] * 4  # the last block is not committed


def test_a_model_without_blocks_keeps_no_state(tmp_path):
    with pytest.raises(ValueError, match="state: got a folder, expected None"):
        stream(tiny_lingen(causal=False), tmp_path)


# Memory


def live_bytes():
    """Of all tensors that came after `gc.freeze()`, views counted once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("make", VAES)
def test_forty_blocks_take_the_memory_of_four(make, tmp_path):
    pipe, peaks, now = tiny_lingen(make_vae=make), {3: 0, 39: 0}, 0
    frames = (3 * 41 - 1) * pipe.vae_scale_factor_temporal + 1

    def look(*_):
        if now in peaks:
            peaks[now] = max(peaks[now], live_bytes())

    for part in (*pipe.transformer.transformer_blocks, pipe.vae.decoder.conv_out):
        part.register_forward_hook(look)
    options = {"num_frames": frames, "num_inference_steps": 1}
    running = stream(pipe, tmp_path / "run", **options)
    gc.collect()
    gc.freeze()
    try:
        for index, _ in enumerate(running):
            now = index + 1
    finally:
        gc.unfreeze()
    assert 0 < peaks[39] <= 1.01 * peaks[3]
