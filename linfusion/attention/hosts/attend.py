"""One attention call of a host, with windows for its pixels.

A query of a picture sees the picture as the layer's form has it, and all other tokens exactly:
text, other pictures, padding that no mask hides. Every other query sees what it saw before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linfusion.attention.hosts.host import Grid
from linfusion.attention.hosts.layout import Layout

Pair = tuple[Tensor, Tensor]
Rest = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Picture(NamedTuple):
    """Where a picture lies among the keys and among the queries."""

    keys: int
    queries: int
    grid: Grid

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)


class Kept(NamedTuple):
    """Samples that a mask treats alike, and the keys it leaves them; None is all."""

    samples: tuple[int, ...]
    keys: tuple[bool, ...] | None


class _Tokens(NamedTuple):
    """Queries, keys and values; the last two with as many heads as the queries."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_all: Tensor
    v_all: Tensor


def attend(
    form: Any,
    layout: Layout,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    rest: Rest,
) -> Tensor | None:
    """Attention of text and pixels, or None: a call that is not over the picture.

    Args:
        form: the layer's, (q, k, v, grid=, context=, scale=) -> o.
        layout: of the call.
        q: [B, N, H, D].
        k, v: [B, M, G, D], where G divides H.
        mask: as `scaled_dot_product_attention` takes it.
        scale: of the scores; None is D^-½.
        rest: (q, k, v, mask) -> o, the attention there was, for queries that are no pixels.

    Raises:
        ValueError: tokens that are not those of the layout, or a mask that is none over keys.
    """
    batch, nq, nk = q.shape[0], q.shape[1], k.shape[1]
    count = max(len(layout.samples), len(layout.text_lengths or ()), 1)
    places = [_places(layout, i, nq, nk) for i in range(count)]
    if any(place is None for place in places):
        return None
    if len(set(map(tuple, places))) == 1:  # type: ignore[arg-type]
        places = places[:1]
    if len(places) > 1 and len(places) != batch:
        raise ValueError(
            f"query: got a batch of {batch}, but the model was called with {len(places)} samples"
            " that differ"
        )
    groups = [Kept(tuple(range(batch)), None)]
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask
        groups = _kept(layout, mask, batch, nk)
    if len(places) > 1:
        groups = [Kept((i,), group.keys) for group in groups for i in group.samples]
    if k.shape[2] != q.shape[2]:
        k_all, v_all = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    else:
        k_all, v_all = k, v
    outs = []
    for group in groups:
        place = places[group.samples[0] if len(places) > 1 else 0]
        assert place is not None
        alone = len(groups) == 1
        index = None if alone else torch.tensor(group.samples, device=q.device)
        tokens = _Tokens(*[x if index is None else x[index] for x in (q, k, v, k_all, v_all)])
        own = mask if mask is None or index is None or len(mask) == 1 else mask[index]
        outs.append(_windowed(form, layout, place, tokens, own, group.keys, scale, rest))
    if len(outs) == 1:
        return outs[0]
    order = [i for group in groups for i in group.samples]
    back = torch.tensor(sorted(range(batch), key=order.__getitem__), device=q.device)
    return torch.cat(outs)[back]


def _places(layout: Layout, sample: int, nq: int, nk: int) -> list[Picture] | None:
    if layout.levels:
        grid = next((g for g in layout.levels if math.prod(g) == nk == nq), None)
        if grid is None:
            raise ValueError(
                f"key: got {nq} queries and {nk} keys, expected the tokens of one of the levels"
                f" {list(layout.levels)} of this UNet"
            )
        return [Picture(0, 0, grid)]
    pieces = layout.samples[sample % len(layout.samples)]
    sizes = [p if isinstance(p, int) else math.prod(p) for p in pieces]
    lengths = layout.text_lengths
    if nk < sum(sizes):  # a layer over the first pictures alone
        ends = [i for i in range(len(sizes)) if sum(sizes[: i + 1]) == nk]
        pieces = pieces[: ends[0] + 1] if ends else ()
        sizes = sizes[: len(pieces)]
    total = sum(sizes)
    start = 0
    if layout.text_first and nk > total:
        start = nk - total if lengths is None else lengths[sample % len(lengths)]
    if layout.other_calls and (not pieces or nk != start + total):
        return None
    # Queries are all tokens, or those at the end of them, or the pixels alone.
    shift = nk - nq if layout.text_first else 0
    if not pieces or start + total > nk or (not layout.text_first and nq < total):
        raise ValueError(
            f"key: got {nq} queries and {nk} keys, which are not the tokens of the pictures"
            f" {list(layout.samples[sample % len(layout.samples)])} that the model was called with"
        )
    found = []
    for piece, size in zip(pieces, sizes, strict=True):
        if not isinstance(piece, int) and start >= shift:
            grid = piece[1:] if len(piece) == 3 and piece[0] == 1 else piece
            found.append(Picture(start, start - shift, grid))
        start += size
    return found


def _windowed(
    form: Any,
    layout: Layout,
    places: list[Picture],
    tokens: _Tokens,
    mask: Tensor | None,
    keep: tuple[bool, ...] | None,
    scale: float | None,
    rest: Rest,
) -> Tensor:
    """Samples that are alike."""
    q, k, v, k_all, v_all = tokens
    out: list[Tensor] = []
    end = 0

    def others(start: int, stop: int) -> None:
        if stop > start:
            rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, start:stop]
            out.append(rest(q[:, start:stop], k, v, rows))

    for place in places:
        others(end, place.queries)
        end = place.queries + place.tokens
        last = place.keys + place.tokens
        if keep is not None and not all(keep[place.keys : last]):
            raise ValueError(
                f"attn_mask: it hides tokens {place.keys} to {last - 1}, which are those of a"
                f" picture of {place.grid}; a window cannot leave out pixels"
            )
        context = [_seen(layout, x, place.keys, last, keep) for x in (k_all, v_all)]
        out.append(
            form(
                q[:, place.queries : end],
                k_all[:, place.keys : last],
                v_all[:, place.keys : last],
                grid=place.grid,
                context=None if context[0] is None else tuple(context),
                scale=scale,
            )
        )
    others(end, q.shape[1])
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _seen(
    layout: Layout, x: Tensor, start: int, end: int, keep: tuple[bool, ...] | None
) -> Tensor | None:
    """The tokens of `x` outside start to end that no mask hides, or None."""
    if keep is None:
        parts = [part for part in (x[:, :start], x[:, end:]) if part.shape[1]]
        if not parts:
            return None
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    # The layout holds `keep`, and so its id; layers share what was copied to the device.
    place = (id(keep), start, end, x.device)
    if place not in layout.masks:
        left = [i for i, kept in enumerate(keep) if kept and not start <= i < end]
        layout.masks[place] = torch.tensor(left, dtype=torch.long, device=x.device)
    index = layout.masks[place]
    return x[:, index] if len(index) else None


@torch.compiler.disable
def _kept(layout: Layout, mask: Tensor, batch: int, nk: int) -> list[Kept]:
    """Samples by the keys that a mask leaves them; read from the device once a call."""
    known = layout.masks.get(id(mask))
    if known is None:
        known = layout.masks[id(mask)] = (mask, _read(mask, batch, nk))  # held, so is its id
    return known[1]


def _read(mask: Tensor, batch: int, nk: int) -> list[Kept]:
    if mask.ndim != 4 or mask.shape[3] != nk:
        raise ValueError(
            f"attn_mask: got shape {tuple(mask.shape)}, expected [B, 1, 1, {nk}] or what spreads"
            " to it"
        )
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask <= -1e4)).all()):
            raise ValueError(
                "attn_mask: got a bias that is no mask; windows honour masks that hide keys, with"
                " 0 and -10,000 or below"
            )
        mask = mask == 0
    keys, rows = mask.any(2).any(1), mask.any(3, keepdim=True)
    if not torch.equal(mask, (keys[:, None, None] & rows).expand_as(mask)):
        raise ValueError(
            "attn_mask: it tells queries or heads apart; windows honour masks that hide keys from"
            " all of them"
        )
    found: dict[tuple[bool, ...], list[int]] = {}
    for i, row in enumerate(keys.expand(batch, nk).tolist()):
        found.setdefault(tuple(row), []).append(i)
    return [Kept(tuple(i), None if all(row) else row) for row, i in found.items()]
