"""Twelve classes of emoji by their code points and names, for the class-conditional DiT."""

from __future__ import annotations

import re

from data import Emoji

CLASSES = (
    "face", "person", "hand", "heart", "animal", "plant",
    "food", "sky", "place", "vehicle", "object", "sign",
)  # fmt: skip

_PERSON = re.compile(
    r"\b(man|men|woman|women|person|people|boy|girl|child|baby|adult|family|couple|kiss|prince\w*"
    r"|mrs|mother|santa|mx|bride|dancer|superhero|supervillain|ninja|merperson|mermaid|elf|genie"
    r"|zombie|troll|vampire|fairy|mage|angel|guard|detective|police|snowboarder|skier|busts?"
    r"|speaking head|footprints)\b"
)
_HAND = re.compile(r"\b(hands?|fist|finger|thumbs|palm|backhand|biceps|handshake|pinch\w*)\b")
# First code points, both ends included; what no line has is an object.
_RANGES = {
    "face": "1f600-1f644 1f648-1f64a 1f910-1f917 1f920-1f92f 1f970-1f97a 1f9d0 1fae0-1fae9"
    " 1f479-1f47b 1f47d-1f47f 1f480 1f916 1f31a-1f31e 2639 263a 2620",
    "animal": "1f400-1f43f 1f980-1f9ae 1fab0-1fab3 1fabc-1fabf 1face 1facf 1f577 1f54a",
    "plant": "1f331-1f344 1f490 1f3f5 1f940 1fab4 1fab7 1fab9 1faba 1fabb 1f4ae 2618",
    "food": "1f345-1f37f 1f32d-1f330 1f950-1f96f 1f9c0-1f9cb 1fad0-1fadf 1f382 2615 1f944",
    "sky": "1f300-1f321 1f324-1f32c 1f4a7 1f4ab 1f506 1fa90 2600-2604 2614 26a1 26c4 26c5 26c8"
    " 2744 2b50 1f525 1f4a5 2728 1f30d-1f311",
    "place": "1f3d4-1f3df 1f3e0-1f3f0 1f5fb-1f5ff 1f54b-1f54d 1f6d5-1f6d7 26e9-26ea 26f0-26f2 26fa"
    " 1f3a0-1f3a2 1f3aa 1f6d6 1f5fa 1f303-1f309 1f301 1f492 1f6d5",
    "vehicle": "1f680-1f6a4 1f6b2 1f6e5-1f6f3 1f6f4-1f6fc 1f3ce 1f3cd 2708 26f5 26f4 1f6a8 1f69f"
    " 1fa82 1f6de 1f6dd 1f9bc 1f9bd",
    "sign": "23-39 a9 ae 203c 2049 2122-21aa 231a-23fa 24c2 25aa-25fe 2648-2653 2660-2668 267b-267f"
    " 2692-269c 26a0 26a7 26aa 26ab 26ce 26d4 26ce 2611 2622-262f 2638 2640 2642 2705 2714-2721"
    " 2733 2734 2747-2757 2795-27bf 2934 2935 2b05-2b1c 2b55 3030-3299 1f004-1f251 1f4a0-1f4a2"
    " 1f4a4 1f4ac-1f4ad 1f4af 1f500-1f505 1f518 1f519-1f53d 1f549 1f54e 1f550-1f567 1f5e8 1f5ef"
    " 1f6ab 1f6ad-1f6b1 1f6b3 1f6b7-1f6b8 1f6b9-1f6bc 1f6be 1f6c2-1f6c5 1f6d0 1f6d1 1f7e0-1f7f0"
    " 1f6af 1f194-1f19a 1f3a6 1f4f4 1f4f3 1f4f5 1f4f6 1f51e 1faaf 1f5ef 1f6dc",
}


def _ranges(text: str) -> list[range]:
    ends = [[int(part, 16) for part in item.split("-")] for item in text.split()]
    return [range(pair[0], pair[-1] + 1) for pair in ends]


_POINTS = {name: _ranges(text) for name, text in _RANGES.items()}


def class_of(item: Emoji) -> str:
    """One of CLASSES."""
    name, point = item.captions[0], int(item.file.stem.split("-")[0], 16)
    for group in ("face", "animal"):
        if any(point in r for r in _POINTS[group]):
            return group
    if re.search(r"\bhearts?\b", name) and not re.search(r"hands|couple|suit", name):
        return "heart"
    if _PERSON.search(name) and not re.search(r"’s|bottle", name):
        return "person"
    if _HAND.search(name) and not re.search(r"tree|fan", name):
        return "hand"
    return next((g for g, rs in _POINTS.items() if any(point in r for r in rs)), "object")
