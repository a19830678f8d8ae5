"""What a budget of memory leaves, and what the work within it took."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from linfusion.bands.rows import BAND_BYTES, Engine

BANDS_AT_ONCE = 8  # tensors of `band_bytes` that one band holds, roughly
AT_ONCE = 3  # of the widest tensors, where there are no bands, beside those that are kept
_UNITS = {"": 1, "b": 1}
_UNITS |= {p + "b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {p + "ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


@dataclass
class Ledger:
    """What the calls inside `bounded` took, or in a dry run would take.

    Attributes:
        weights_bytes: of the models that are bounded.
        in_bands: whether what lies between whole tensors is never larger than a band.
        peak_bytes: the most that was held at once: weights, whole tensors and a band.
        peak_on_disk: the most that lay in the scratch folder.
        flops: of products and convolutions.
        calls: forwards, one a picture of the batch.
        unbanded: functions that have no rule for bands and ran on whole tensors.
    """

    weights_bytes: int = 0
    in_bands: bool = True
    peak_bytes: int = 0
    peak_on_disk: int = 0
    flops: int = 0
    calls: int = 0
    unbanded: set[str] = field(default_factory=set)

    def add(self, engine: Engine) -> None:
        """Enter a finished call."""
        between = BANDS_AT_ONCE * engine.band_bytes if self.in_bands else AT_ONCE * engine.widest
        held = self.weights_bytes + engine.store.peak + between
        self.peak_bytes = max(self.peak_bytes, held)
        self.peak_on_disk = max(self.peak_on_disk, engine.store.peak_on_disk)
        self.flops += engine.flops
        self.calls += 1
        self.unbanded |= engine.unbanded


# accelerate's `convert_file_size_to_int` takes "800mb" for megabits, and no "2TB".
def parse_bytes(budget: int | str, argument: str = "memory_budget") -> int:
    """Bytes of 12_000_000_000, "12GB" (10⁹) or "12GiB" (2³⁰).

    Raises:
        ValueError: anything else, or not above 0.
    """
    value: float = -1
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([\d_]*\.?\d+)\s*([a-zA-Z]*)\s*", budget)
        if match and match[2].lower() in _UNITS:
            value = float(match[1]) * _UNITS[match[2].lower()]
    elif isinstance(budget, int) and not isinstance(budget, bool):
        value = budget
    if not value >= 1:
        raise ValueError(
            f'{argument}: got {budget!r}, accepted is a number of bytes or a text like "12GB" or'
            ' "12GiB"'
        )
    return int(value)


def share_of(memory_budget: int | str | None, weights: int) -> tuple[int, int | None]:
    """Bytes of the widest tensor of a band, and what the budget leaves for whole tensors."""
    if memory_budget is None:
        return BAND_BYTES, None
    budget = parse_bytes(memory_budget)
    band_bytes = min(BAND_BYTES, max(1 << 20, budget >> 7))
    limit = budget - weights - BANDS_AT_ONCE * band_bytes
    if limit <= 0:
        raise ValueError(
            f"memory_budget: got {budget:,} bytes; the weights take {weights:,} and one band of"
            f" rows {BANDS_AT_ONCE * band_bytes:,}"
        )
    return band_bytes, limit


def weight_bytes(module: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
