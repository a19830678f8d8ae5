"""The Fluent emoji as vectors: single ones and scenes of several, with captions, at any size.

The drawings are the npm package `@iconify-json/fluent-emoji` (MIT); `@resvg/resvg-js`, also of npm,
turns them into pixels, so node has to be there. What is held out is decided by names alone, so that
no size and no run ever trains on it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

PACKAGE = "@iconify-json/fluent-emoji"
RENDERER = "@resvg/resvg-js"
BOX = 32  # of every drawing, in its own units
_TONES = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")
_UNCOUNTED = re.compile(
    r"(^|-)(man|woman|men|women|person|people|couple|family|kiss|face|hand|hands|button|sign|symbol"
    r"|keycap|arrow|clock|oclock|thirty|square|circle|mark|\w+ing|\w+ed)(-|$)"
)
_COUNTS = ("", "a", "two", "three", "four", "five", "six")
_HELD_OUT = 20  # one name in so many
_BATCH = 64  # pictures that node makes at a time


@dataclass(frozen=True)
class Placed:
    """A drawing on the canvas: its middle and side, as shares of the canvas."""

    name: str
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """What is drawn, back to front, and the caption that says so."""

    things: tuple[Placed, ...]
    caption: str


def drawings(folder: str | Path | None = None) -> dict[str, str]:
    """SVG bodies by name, copies in other skin tones left out.

    Args:
        folder: with the `icons.json` of the npm package; None fetches that once into ~/.cache.

    Raises:
        ValueError: no such file, or it is cut off or of another form.
        RuntimeError: no npm to fetch it with.
    """
    file = (Path(folder) if folder else installed() / "node_modules" / PACKAGE) / "icons.json"
    if not file.is_file():
        raise ValueError(f"folder: expected icons.json of {PACKAGE}, found none in {file.parent}")
    try:
        icons = json.loads(file.read_text(encoding="utf-8"))["icons"]
        found = {name: icon["body"] for name, icon in icons.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"folder: {file} is cut off or no icon set ({error})") from None
    return {name: body for name, body in found.items() if not _TONES.search(name)}


def installed() -> Path:
    """Folder with both npm packages, installed once.

    Raises:
        RuntimeError: there is no node or npm.
    """
    target = Path.home() / ".cache" / "linfusion" / "vectors"
    if not (target / "done").is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                f"node and npm are not installed: they fetch {PACKAGE} and draw it with {RENDERER};"
                " a folder with its icons.json saves the first, not the second"
            )
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "install", "--silent", "--no-save", "--prefix", target, PACKAGE, RENDERER],
            check=True,
        )
        (target / "done").touch()
    return target


def caption_of(name: str) -> str:
    """`red-apple` -> "red apple"."""
    return name.replace("-", " ")


def things(names: Iterable[str]) -> list[str]:
    """Those that can be counted in a scene: no people at work, faces, signs or buttons."""
    return [name for name in names if not _UNCOUNTED.search(name)]


def is_held_out(name: str) -> bool:
    """Whether an emoji or a scene of that name or caption is kept from training."""
    return hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT == 0


def single(name: str) -> Scene:
    """One emoji that fills the canvas."""
    return Scene((Placed(name, 0.5, 0.5, 1.0),), caption_of(name))


def scene(names: Sequence[str], count: int, seed: int) -> Scene:
    """Emoji beside each other, some of them several times, with a caption that counts them.

    They lie on a grid that is shaken, larger ones to the back, so that all can be seen.

    Args:
        names: to choose from.
        count: emoji on the canvas, 2 to 144.
        seed: of all choices.

    Raises:
        ValueError: a count out of range.
    """
    if not 2 <= count <= 144:
        raise ValueError(f"count: got {count}, expected 2 to 144 emoji in a scene")
    draw = random.Random(f"{count} {seed}")
    kinds: dict[str, int] = {}
    left = count
    while left:
        many = min(draw.choice((1, 1, 1, 2, 2, 3, 4, 5, 6)), left)
        name = draw.choice(names)
        if kinds.get(name, 0) + many < len(_COUNTS):
            kinds[name] = kinds.get(name, 0) + many
            left -= many
    things = [name for name, many in kinds.items() for _ in range(many)]
    draw.shuffle(things)
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    placed = []
    for i, name in enumerate(things):
        row, column = divmod(i, columns)
        in_row = min(columns, count - row * columns)
        cell = 1 / max(columns, rows)
        side = cell * draw.uniform(0.75, 1.05)
        shake = 0.12 * cell
        x = (column + 0.5) / in_row + draw.uniform(-shake, shake)
        y = (row + 0.5) / rows + draw.uniform(-shake, shake)
        x, y = (min(max(at, side / 2), 1 - side / 2) for at in (x, y))
        placed.append(Placed(name, x, y, side))
    placed.sort(key=lambda thing: -thing.side)
    return Scene(tuple(placed), _listed([_counted(name, many) for name, many in kinds.items()]))


def svg(what: Scene, bodies: Mapping[str, str]) -> str:
    """One document, white behind."""
    inside = "".join(
        f'<svg x="{BOX * (t.x - t.side / 2):.4f}" y="{BOX * (t.y - t.side / 2):.4f}"'
        f' width="{BOX * t.side:.4f}" height="{BOX * t.side:.4f}" viewBox="0 0 {BOX} {BOX}">'
        f"{bodies[t.name]}</svg>"
        for t in what.things
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="0 0 {BOX} {BOX}"><rect width="{BOX}" height="{BOX}" fill="white"/>'
        f"{inside}</svg>"
    )


def render(documents: Sequence[str], size: int) -> tuple[torch.Tensor, list[int]]:
    """Documents as pictures, `size` pixels a side.

    Returns:
        uint8 [n, 3, size, size] of those in which there is something, and their places in
        `documents`: what renders empty is left out.

    Raises:
        RuntimeError: no node, or it fails.
    """
    node = shutil.which("node")
    if node is None:
        raise RuntimeError(f"node is not installed: it draws {PACKAGE} with {RENDERER}")
    script, packages = Path(__file__).with_name("render.mjs"), installed()
    pictures, places = [], []
    for start in range(0, len(documents), _BATCH):
        batch = list(documents[start : start + _BATCH])
        done = subprocess.run(
            [node, script, packages],
            input=json.dumps({"width": size, "svgs": batch}).encode(),
            capture_output=True,
        )
        if done.returncode:
            raise RuntimeError(f"node: {done.stderr.decode(errors='replace').strip()[-500:]}")
        pixels = np.frombuffer(done.stdout, np.uint8).reshape(len(batch), size, size, 4)[..., :3]
        for i, picture in enumerate(pixels):
            if picture.min() < 255:
                pictures.append(picture)
                places.append(start + i)
    if not pictures:
        return torch.empty(0, 3, size, size, dtype=torch.uint8), []
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), places


def _counted(name: str, many: int) -> str:
    """("pine-tree", 2) -> "two pine trees"."""
    words = caption_of(name)
    if many > 1:
        return f"{_COUNTS[many]} {_plural(words)}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(words: str) -> str:
    """Regular plural of the noun, which stands before "with", "of" or "in" where there is one."""
    head, found, tail = words, "", ""
    if cut := re.search(r" (with|of|in|on|over|without|from) ", words):
        head, found, tail = words[: cut.start()], cut.group(), words[cut.end() :]
    if re.search(r"[^s]s$", head):  # briefs, scissors
        return words
    if re.search(r"(ss|x|z|ch|sh)$", head):
        head += "es"
    elif re.search(r"[^aeiou]y$", head):
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + found + tail


def _listed(parts: Sequence[str]) -> str:
    """ "a castle, two pine trees and a sun"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
