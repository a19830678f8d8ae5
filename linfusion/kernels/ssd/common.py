"""What every implementation means by a chunk, and which states it keeps for its backward."""

from __future__ import annotations

from typing import NamedTuple

# The blocked form keeps one state for so many tokens, and computes those between them again.
RUN = 512
# It takes no longer chunks, whatever it is asked for: the work within a chunk grows with its
# square, and its products are fast from here on.
LONGEST = 64
# The shortest and the longest chunk of the Triton form: the shortest that a matrix product takes,
# and the longest for which a sum over a chunk fits in the registers of one program.
TRITON_CHUNKS = (16, 256)


class Choices(NamedTuple):
    """How a scan runs: in chunks of so many tokens, and from the last token to the first or not."""

    chunk_size: int
    reverse: bool


def chunk_of(chunk_size: int) -> int:
    """The chunk that the blocked form takes for one of `chunk_size`."""
    return min(chunk_size, LONGEST)


def chunks_of_a_run(chunk: int) -> int:
    """How many whole chunks the blocked form takes at once."""
    return max(1, RUN // chunk)


def triton_chunk_of(chunk_size: int) -> int:
    """The chunk that the Triton form takes for one of `chunk_size`: a power of two that covers it,
    within `TRITON_CHUNKS`."""
    chunk, longest = TRITON_CHUNKS
    while chunk < min(chunk_size, longest):
        chunk *= 2
    return chunk


def kept_states(tokens: int, chunk_size: int, impl: str) -> int:
    """How many states are kept: "blocked" keeps one before every run of whole chunks and one before
    the ragged chunk at the end, "triton" one before every chunk; `tokens` may be symbolic."""
    if impl == "triton":
        return -(-tokens // triton_chunk_of(chunk_size))
    chunk = chunk_of(chunk_size)
    whole, ragged = tokens // chunk, tokens % chunk
    return -(-whole // chunks_of_a_run(chunk)) - (-ragged // chunk)
