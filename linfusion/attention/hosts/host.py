"""What has to be known of a model to find the pixels among the tokens of its attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Arguments = Mapping[str, Any]
Grid = tuple[int, ...]  # (h, w) or (t, h, w), in tokens
Piece = Grid | int  # a picture or video, or a number of tokens that are none


class PerSample(tuple):
    """The pieces of each sample of a batch, where they differ."""


class Levels(tuple):
    """The grids that the levels of a UNet have; a layer is told by the number of its tokens."""


@dataclass(frozen=True)
class Host:
    """One row of the table of hosts.

    Attributes:
        layers: regular expression, matched in full, of the paths of the layers that attend from
            pixels to pixels. What is not named is left alone: text refiners, cross-attention,
            audio, attention over frames alone.
        grid: (arguments of the model's forward by name, its config) -> where the tokens of its
            pixels lie: one grid, (h, w) or (t, h, w) in tokens; or the pieces of the sequence in
            order, grids and numbers of tokens that are no picture; or `PerSample` of such pieces;
            or `Levels`.
        text_first: whether the other tokens of joint attention come before the pixels.
        text_lengths: arguments -> tokens before the pixels in each sample, where that is not what
            is left of the sequence; None if it is.
        other_calls: whether the layers also attend from something else than pixels, in calls of
            their own, which are left alone.
    """

    layers: str
    grid: Callable[[Arguments, Arguments], Any]
    text_first: bool = True
    text_lengths: Callable[[Arguments], list[int]] | None = None
    other_calls: bool = False


def samples_of(found: Any) -> tuple[tuple[Piece, ...], ...]:
    """What `Host.grid` gave, for each sample; one if all are alike.

    Raises:
        ValueError: it is none of the forms there are.
    """
    if isinstance(found, PerSample):
        samples = tuple(_pieces(one) for one in found)
        return samples[:1] if len(set(samples)) == 1 else samples
    return (_pieces(found),)


def _pieces(found: Any) -> tuple[Piece, ...]:
    pieces = (found,) if _is_grid(found) else found
    if not isinstance(pieces, list | tuple):
        pieces = ()
    made = tuple(tuple(p) if _is_grid(p) else p for p in pieces)
    if not any(map(_is_grid, made)) or not all(
        _is_grid(p) or (type(p) is int and p >= 0) for p in made
    ):
        raise ValueError(
            f"grid: the host's row gave {found!r}; expected (h, w) or (t, h, w) in tokens, or a"
            " list of such grids and numbers of other tokens"
        )
    return made


def _is_grid(value: Any) -> bool:
    whole = isinstance(value, list | tuple) and len(value) in (2, 3)
    return whole and all(type(n) is int and n >= 1 for n in value)
