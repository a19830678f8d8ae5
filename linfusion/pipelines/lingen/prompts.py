"""Prompts that change while a video goes on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def split_prompt(prompt: Any) -> tuple[Any, list[int]]:
    """Prompts, and the frames from which on they hold.

    Args:
        prompt: a text, or a list of texts, one a video; or, for one video, a list of pairs
            (first frame, text).

    Returns:
        The text or list of texts, and the first frames: [0] where there are no pairs.

    Raises:
        ValueError: pairs among other things, or first frames that do not begin at 0 and rise.
    """
    if not isinstance(prompt, list) or not any(isinstance(p, tuple | list) for p in prompt):
        return prompt, [0]
    for pair in prompt:
        whole = isinstance(pair, tuple | list) and len(pair) == 2
        if not whole or type(pair[0]) is not int or not isinstance(pair[1], str):
            raise ValueError(
                f"prompt: got {pair!r} among pairs, expected (first frame, text) for each"
            )
    starts = [start for start, _ in prompt]
    if starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        raise ValueError(f"prompt: got first frames {starts}, expected 0 and then rising ones")
    return [text for _, text in prompt], starts


def prompt_of_each_block(starts: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Which prompt each block is drawn with: the one that holds at its first frame.

    Args:
        starts: the first frame of each prompt.
        blocks: the first frame of each block.

    Raises:
        ValueError: a prompt that no block would be drawn with.
    """
    found = [max(i for i, start in enumerate(starts) if start <= frame) for frame in blocks]
    unused = [start for i, start in enumerate(starts) if i not in found]
    if unused:
        raise ValueError(
            f"prompt: no block begins in the time of the one from frame {unused[0]} on;"
            f" blocks begin at {_brief(blocks)}"
        )
    return found


def _brief(frames: Sequence[int]) -> str:
    shown = [str(frame) for frame in frames]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])
