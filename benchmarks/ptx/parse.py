"""PTX text -> statements.

What is read is what Triton emits: one kernel a module, no calls. Directives are skipped but for the
parameters and the lines of the source that statements come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Statement(NamedTuple):
    """`@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd3+16];`

    Attributes:
        text: as it stands, without the semicolon.
        kind: "ld".
        modifiers: ("global", "v2", "b32").
        operands: ("{%r1, %r2}", "[%rd3+16]").
        predicate: "%p1", or None.
        negated: whether it is executed where the predicate does not hold.
        source: file and line of the kernel, "triton_forward.py:86", or "?".
    """

    text: str
    kind: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    source: str


class Module(NamedTuple):
    """A kernel: its name, its parameters in order, its statements, and where the labels stand."""

    name: str
    parameters: list[str]
    statements: list[Statement]
    labels: dict[str, int]


def parse(ptx: str) -> Module:
    """Read a module.

    Raises:
        ValueError: there is no kernel in it, or no end to a statement.
    """
    if not (entry := re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", ptx, re.S)):
        raise ValueError("ptx: no .entry in it")
    parameters = [line.split()[-1] for line in entry[2].split(",") if line.strip()]
    files = {n: path.rpartition("/")[2] for n, path in _FILE.findall(ptx)}
    body = ptx[ptx.index("{", entry.end()) + 1 :]
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    pending, source = "", "?"
    for line in _lines(body):
        if place := _PLACE.match(line):
            source = f"{files.get(place[1], '?')}:{place[2]}"
        elif not pending and (label := _LABEL.match(line)):
            labels[label[1]] = len(statements)
        elif pending or not line.startswith((".", "{", "}")):
            pending = f"{pending} {line}".strip()
            while ";" in pending:
                text, _, pending = pending.partition(";")
                pending = pending.strip()
                statements.append(_statement(text.strip(), source))
    if pending:
        raise ValueError(f"ptx: a statement without an end: {pending[:200]}")
    return Module(entry[1], parameters, statements, labels)


_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_PLACE = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_LABEL = re.compile(r"([$\w]+):$")
_PREDICATED = re.compile(r"@(!?)(%\w+)\s+(.*)", re.S)


def _lines(body: str) -> Iterator[str]:
    """Lines up to the end of the kernel, without comments; a brace alone opens a scope."""
    depth = 1
    for line in body.splitlines():
        text = line.partition("//")[0].strip()
        if text in ("{", "}"):
            depth += 1 if text == "{" else -1
            if not depth:
                return
        elif text:
            yield text


def _statement(text: str, source: str) -> Statement:
    found = _PREDICATED.match(text)
    opcode, *rest = (found[3] if found else text).split(None, 1)
    kind, *modifiers = opcode.split(".")
    return Statement(
        text,
        kind,
        tuple(modifiers),
        _operands(rest[0]) if rest else (),
        found[2] if found else None,
        bool(found and found[1]),
        source,
    )


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return (*parts, text[start:].strip())
