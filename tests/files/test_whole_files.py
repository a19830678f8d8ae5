"""Files that are written are whole, files that are read are unharmed, and a folder has one run."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from linfusion.files.whole_files import (
    Lock,
    check,
    filling,
    load_tensors,
    read_json,
    remove_leftovers,
    save_tensors,
    write_json,
    writing,
)

TENSORS = {"x": torch.arange(5.0), "y": torch.ones(2, 3, dtype=torch.bfloat16)}
ROOT = Path(__file__).parents[2]


def names(folder):
    return {path.name for path in folder.iterdir()}


def in_another_process(code, *arguments):
    """Start Python code that prints a line once it is where it is to be looked at."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "there\n"
    return process


def test_what_was_written_is_read(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, {"about": '{"checksum": "sha256:0"}'})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert metadata["about"] == '{"checksum": "sha256:0"}'
    write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None]}
    assert names(tmp_path) == {"a.safetensors", "a.json"}


@pytest.mark.parametrize("name", ["a.safetensors", "a.json"])
def test_a_flipped_bit_of_any_byte_is_noticed(tmp_path, name):
    file = tmp_path / name
    if name.endswith("json"):
        write_json(file, {"seed": 1, "prompt": "a pear"})
    else:
        save_tensors(file, TENSORS, {"about": "{}"})
    whole = file.read_bytes()
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=rf"{name} (is damaged|holds)"):
            check(file)
    file.write_bytes(whole)
    check(file)


@pytest.mark.parametrize("spoil, said", [
    (lambda whole: b"", "is empty"),
    (lambda whole: bytes(len(whole)), "holds zeros alone"),
    (lambda whole: whole[:-1], "is damaged"),
    (lambda whole: whole[:20], "is damaged"),
    (lambda whole: whole + b"\0", "is damaged"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.safetensors", "a.json"])
def test_a_file_that_is_not_whole_is_named(tmp_path, name, spoil, said):
    file = tmp_path / name
    (write_json if name.endswith("json") else save_tensors)(file, {} if "json" in name else TENSORS)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{name} {said}"):
        (read_json if name.endswith("json") else load_tensors)(file)


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "before" and names(tmp_path) == {"a"}


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"bytes could be written to .*a\.json \(No space left"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 1} and names(tmp_path) == {"a.json"}


def test_bytes_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: (done.append(n), f(*a))[1])
    write_json(tmp_path / "a.json", {})
    assert done == ["fsync", "replace", "fsync"]  # the last one is the folder's


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", TENSORS)
        with filling(tmp_path) as folder:
            (folder / "b").touch(0o600)
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_a_link_that_somebody_planted_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 16)
    (home / f".a.{'0' * 16}.part").symlink_to(victim)
    (home / ".lock").symlink_to(victim)
    with pytest.raises(FileExistsError), writing(home / "a") as file:
        file.write(b"theirs")
    with pytest.raises(OSError):
        Lock(home, "state")
    remove_leftovers(home)
    assert victim.read_text() == "mine"


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    code = """
        import sys
        from linfusion.files.whole_files import Part, filling
        from pathlib import Path
        part = Part(Path(sys.argv[1]) / "a")
        with filling(sys.argv[1]) as folder:
            (folder / "x").touch()
            print("there", flush=True)
            sys.stdin.read()
    """
    process = in_another_process(code, tmp_path)
    (tmp_path / ".mine.part").touch()
    found = names(tmp_path)
    assert len(found) == 3
    remove_leftovers(tmp_path)
    assert names(tmp_path) == found
    process.kill()
    process.wait()
    remove_leftovers(tmp_path, "b")
    assert names(tmp_path) == found
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {".mine.part"}


def test_a_folder_that_another_process_is_in_is_refused_until_it_ends(tmp_path):
    code = """
        import sys
        from linfusion.files.whole_files import Lock
        lock = Lock(sys.argv[1], "state")
        print("there", flush=True)
        sys.stdin.read()
    """
    process = in_another_process(code, tmp_path)
    said = rf"state: .* is in use by another run \(process {process.pid}\)"
    with pytest.raises(ValueError, match=said):
        Lock(tmp_path, "state")
    process.kill()
    process.wait()
    with Lock(tmp_path, "state"), pytest.raises(ValueError, match="in use by another run"):
        Lock(tmp_path, "state")
    with Lock(tmp_path, "state"):
        pass
    assert names(tmp_path) == set()


def test_two_processes_that_write_one_file_never_tear_it(tmp_path):
    code = """
        import sys
        from linfusion.files.whole_files import write_json
        print("there", flush=True)
        for i in range(60):
            write_json(sys.argv[1], {"x": [i] * 20_000})
    """
    file = tmp_path / "a.json"
    write_json(file, {"x": [0]})
    writers = [in_another_process(code, file) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        assert len(set(read_json(file)["x"])) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert names(tmp_path) == {"a.json"}


def test_long_names_have_room_for_a_temporary_one(tmp_path):
    name = "ü" * 127
    with writing(tmp_path / name) as file:
        file.write(b"x")
    assert names(tmp_path) == {name}
