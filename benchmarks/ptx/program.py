"""Statements -> basic blocks of functions, with what a warp spends in each."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from benchmarks.ptx.instructions import build
from benchmarks.ptx.numbers import TYPES
from benchmarks.ptx.operands import Registers, Step
from benchmarks.ptx.parse import Statement, parse

_JUMPS = ("bra", "ret")


class Jump(NamedTuple):
    """The end of a block: where CTAs go whose `predicate` holds, or does not if `negated`; None is
    the end."""

    statement: Statement
    predicate: int | None
    negated: bool
    target: int | None


class Block(NamedTuple):
    """Statements without a branch among them.

    Attributes:
        steps: what executes each, and the statement.
        jump: None where the next block follows.
        costs: of one warp that goes through: see `costs`.
    """

    steps: list[tuple[Step, Statement]]
    jump: Jump | None
    costs: Counter[str]


class Program:
    """A kernel, ready to run.

    Args:
        ptx: what was compiled.

    Raises:
        NotImplementedError: an instruction that is not known; the message has it.
    """

    def __init__(self, ptx: str):
        module = parse(ptx)
        self.name, self.parameters = module.name, module.parameters
        self.registers = Registers()
        statements, end = module.statements, len(module.statements)
        after_jumps = {i + 1 for i, s in enumerate(statements) if s.kind in _JUMPS}
        starts = sorted(x for x in {0, *module.labels.values(), *after_jumps} if x < end)
        number = {start: i for i, start in enumerate(starts)}
        self.blocks = [
            self._block(statements[start:stop], number, module.labels)
            for start, stop in zip(starts, [*starts[1:], end], strict=True)
        ]
        self.hazards = wgmma_registers(statements, set(starts))

    def _block(
        self, statements: list[Statement], number: dict[int, int], labels: dict[str, int]
    ) -> Block:
        last, jump = statements[-1], None
        if last.kind in _JUMPS:
            place = None if last.predicate is None else self.registers.place(last.predicate)
            target = None if last.kind == "ret" else number[labels[last.operands[0]]]
            jump = Jump(last, place, last.negated, target)
        plain = statements[:-1] if jump else statements
        steps = [(build(s, self.registers), s) for s in plain]
        return Block(steps, jump, costs(statements))


def costs(statements: list[Statement]) -> Counter[str]:
    """What one warp asks of the units that may bound a kernel.

    "instructions", "barriers", "products" (multiply-adds of tensor cores), "shared bytes" (of
    ldmatrix, stmatrix, ld and st: all threads of the warp).
    """
    found: Counter[str] = Counter(instructions=len(statements))
    for s in statements:
        if shape := re.search(r"\.m(\d+)n(\d+)k(\d+)\b", s.text):
            m, n, k = map(int, shape.groups())
            found["products"] += m * n * k // (4 if s.kind == "wgmma" else 1)  # of four warps
        elif s.kind in ("ldmatrix", "stmatrix"):
            found["shared bytes"] += 128 * int(re.search(r"\.x(\d)", s.text)[1])  # type: ignore[index]
        elif s.kind in ("ld", "st") and s.modifiers[0].startswith("shared"):
            vector = re.search(r"\.v(\d)", s.text)
            size = TYPES[s.modifiers[-1]].bits // 8
            found["shared bytes"] += 32 * size * int(vector[1] if vector else 1)
        elif s.kind == "bar" and "warp" not in s.modifiers:
            found["barriers"] += 1
    return found


def wgmma_registers(statements: list[Statement], starts: set[int]) -> list[Statement]:
    """Statements that touch a register of a wgmma before the wait that retires it.

    Followed within a basic block only: `starts` are where those begin.
    """
    found: list[Statement] = []
    started: set[str] = set()
    committed: list[set[str]] = []
    for i, s in enumerate(statements):
        if i in starts:
            started, committed = set(), []
        if s.kind == "wgmma":
            match s.modifiers[0]:
                case "mma_async":
                    started |= set(re.findall(r"%\w+", s.operands[0]))
                case "commit_group":
                    committed.append(started)
                    started = set()
                case "wait_group":
                    left = int(s.operands[0], 0)
                    committed = committed[len(committed) - left :] if left else []
        elif started.union(*committed) & set(re.findall(r"%\w+", s.text)):
            found.append(s)
    return found
