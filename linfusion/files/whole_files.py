"""Files that appear whole, are known to be unharmed when they are read, and have one run at a time.

A file is written under a name of its own, `.NAME.<16 hex digits>.part`, flushed to the disk and
renamed, so what has its name is whole, and two writers replace each other's file instead of mixing
them. The name is new (O_EXCL) and no link (O_NOFOLLOW); while its writer lives it is locked, so
what a killed run left can be told from what is being written, and the next run removes it.

A *sealed* file also holds the SHA-256 of its own bytes, taken with the 64 digits of the checksum as
zeros: any byte that differs is noticed when it is read.

Windows has no `flock`: there nothing keeps a second run out, and only leftovers older than a day
are removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

BLANK = "sha256:" + "0" * 64
# Quotes inside of JSON strings are escaped, so this is found only where it is a key.
_SEAL = re.compile(rb'"checksum": ?"sha256:([0-9a-f]{64})"')
_PART = re.compile(r"\..*\.[0-9a-f]{16}\.part", re.DOTALL)
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_STALE = 86_400  # seconds after which a leftover is one where locks cannot tell
_UNLOCKABLE = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class Part:
    """A file under its temporary name.

    Args:
        final: the name it will have.

    Attributes:
        file: open for reading and writing; its mode is what the umask leaves of 0666.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        while True:
            self.path = _own_name(final)
            number = os.open(self.path, _OPEN | os.O_EXCL, 0o666)
            _lock(number)
            if os.path.exists(self.path):  # nobody took it for a leftover before it was locked
                break
            os.close(number)
        # By its path, not by its number: tifffile asks the file for its name.
        self.file: IO[bytes] = open(self.path, "w+b", opener=lambda *_: number)  # noqa: SIM115

    def flush(self) -> None:
        """All that was written is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def publish(self) -> None:
        """Flush it and give it its name, in place of what had it before."""
        self.flush()
        if fcntl is None:
            self.file.close()  # Windows renames no open file
        os.replace(self.path, self.final)  # locked until it has its name
        self.file.close()
        _flush_folder(self.final.parent)

    def discard(self) -> None:
        """Remove it."""
        # What a full disk did not take is still buffered, and closing fails over it again.
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to be written whole: it has its name once the block ends, an exception removes it."""
    part = Part(Path(path))
    try:
        yield part.file
        part.publish()
    except BaseException:
        part.discard()
        raise


@contextlib.contextmanager
def filling(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder for files that others write; they are moved to `folder` once the block ends.

    Each is flushed and has the mode of the umask; what had its name is replaced. config.json comes
    last: a folder with one has its tensors. An exception removes what was written.
    """
    folder = Path(folder)
    remove_leftovers(folder)
    home = _own_name(folder / "saving")
    home.mkdir()
    number = None
    with contextlib.suppress(OSError):  # Windows opens no folders
        number = os.open(home, os.O_RDONLY)
        _lock(number)
    try:
        yield home
        settle(home)
        for file in sorted(home.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        _flush_folder(folder)
    finally:
        shutil.rmtree(home, ignore_errors=True)
        if number is not None:
            os.close(number)


def settle(folder: Path) -> None:
    """Files that others wrote into a folder, flushed to the disk and with the mode of the umask."""
    probe = Part(folder / "mode")
    mode = stat.S_IMODE(os.fstat(probe.file.fileno()).st_mode)
    probe.discard()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)  # safetensors makes files that nobody else may read
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())


def write_json(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """A sealed JSON object."""
    text = json.dumps({**values, "checksum": BLANK}, indent=2)
    _write_sealed(Path(path), text.encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        ValueError: the file is not as it was written.
    """
    check(path)
    values: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
    del values["checksum"]
    return values


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A sealed safetensors file; tensors that share memory are written as if they did not."""
    import safetensors.torch

    plain = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    data = safetensors.torch.save(plain)
    # The metadata are put in here: safetensors writes them in an order that changes.
    start = 8 + int.from_bytes(data[:8], "little")
    about = {"format": "pt", "checksum": BLANK, **(metadata or {})}
    header = json.dumps(
        {"__metadata__": about} | json.loads(data[8:start]), separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    _write_sealed(Path(path), len(header).to_bytes(8, "little") + header + data[start:])


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote: tensors and metadata.

    Raises:
        ValueError: the file is not as it was written.
    """
    import safetensors

    check(path)
    with safetensors.safe_open(path, "pt") as file:
        # Clones: sums differ in the last bit where memory is not aligned, as in a file.
        names = file.keys()
        return {name: file.get_tensor(name).clone() for name in names}, file.metadata()


def check(path: str | os.PathLike[str]) -> None:
    """Refuse a sealed file that is not as it was written.

    Raises:
        ValueError: it is not; the message names it.
        OSError: it is not there or may not be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors":  # the header, after its length in 8 bytes
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), length))
        else:
            start = file.read()
        seal = _SEAL.search(start)
        if seal is None:
            empty = not start.strip(b"\0")
            reason = "is damaged, or of an older version: it holds no checksum"
            reason = "is empty" if not length else "holds zeros alone" if empty else reason
            raise ValueError(f"{path} {reason}")
        digest = hashlib.sha256(start[: seal.start(1)] + b"0" * 64 + start[seal.end(1) :])
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest().encode() != seal[1]:
        raise ValueError(f"{path} is damaged: its content is not that of its checksum")


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file that others write."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """One run at a time in a folder; held until `release`, the end of the process, or forgotten.

    Args:
        folder: where `.lock` is made; or a file, whose lock lies beside it.
        argument: what an error calls it.

    Raises:
        ValueError: another run has it, of this process or of another.
        OSError: the file cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], argument: str) -> None:
        folder = Path(folder)
        self._path = (
            folder / ".lock" if folder.is_dir() else folder.with_name(f".{folder.name}.lock")
        )
        while True:
            number = os.open(self._path, _OPEN, 0o666)
            self._file: IO[bytes] = os.fdopen(number, "r+b")
            if not _lock(number, patient=False):
                holder = self._file.read(80).decode("utf-8", "replace").strip()
                self._file.close()
                raise ValueError(
                    f"{argument}: {folder} is in use by another run"
                    f"{f' ({holder})' if holder else ''}; wait for it to end, or give another one"
                )
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(number), os.lstat(self._path)):
                    break
            self._file.close()  # the one before removed it just now
        self._file.truncate()
        self._file.write(f"process {os.getpid()}\n".encode())
        self._file.flush()

    def release(self) -> None:
        """Let others in. Twice does nothing more."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if fcntl is not None:
                self._path.unlink(missing_ok=True)
                fcntl.flock(self._file, fcntl.LOCK_UN)  # forks have the same file open
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove what killed runs were writing in a folder, or of the file `name` there alone."""
    start = "." if name is None else _beginning(name)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in list(entries):
            if not (entry.name.startswith(start) and _PART.fullmatch(entry.name)):
                continue
            with contextlib.suppress(OSError):
                if entry.is_symlink() or not _is_abandoned(entry):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)


def writable_folder(argument: str, folder: str | os.PathLike[str]) -> Path:
    """The folder, made if missing; a file can be written there.

    Raises:
        ValueError: it cannot; the message blames `argument`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Part(folder / "probe").discard()
    except OSError as error:
        raise ValueError(
            f"{argument}: cannot write to {str(folder)!r} ({error.strerror})"
        ) from error
    return folder


def _beginning(name: str) -> str:
    # A name may have 255 bytes, and so may the temporary one.
    return f".{name.encode('utf-8', 'surrogateescape')[:200].decode('utf-8', 'ignore')}."


def _own_name(final: Path) -> Path:
    return final.with_name(f"{_beginning(final.name)}{secrets.token_hex(8)}.part")


def _write_sealed(path: Path, data: bytes) -> None:
    seal = _SEAL.search(data)
    assert seal is not None  # its two callers put one in
    try:
        with writing(path) as file:
            file.write(memoryview(data)[: seal.start(1)])
            file.write(hashlib.sha256(data).hexdigest().encode())
            file.write(memoryview(data)[seal.end(1) :])
    except OSError as error:
        raise OSError(
            error.errno,
            f"no {len(data):,} bytes could be written to {path} ({error.strerror}); what was there"
            " is intact",
        ) from error


def _flush_folder(folder: Path) -> None:
    """The new name is on the disk, too."""
    if fcntl is None:
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _lock(number: int, *, patient: bool = True) -> bool:
    """Lock an open file; False where another one holds it and we are not to wait for it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | (0 if patient else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in _UNLOCKABLE:
            raise
        if not patient:
            warnings.warn(
                f"the file system of this folder has no locks ({error.strerror}): nothing keeps a"
                " second run out of it",
                stacklevel=4,
            )
    return True


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    """Whether nobody is writing it any more."""
    if fcntl is None:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE
    number = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE
        return error.errno in _UNLOCKABLE and old
    finally:
        os.close(number)
    return True
