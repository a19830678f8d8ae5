"""The static time shift of a flow's later stages.

With a shift s a scheduler moves its noise levels, evenly spaced in [0, 1], to

    σ' = s σ / (1 + (s - 1) σ)    (Esser et al. 2024, arXiv:2403.03206, eq. 23)

so that more steps are spent at much noise, of which large pictures need more. CLEAR's notebook sets
a `time_shift` of 10 that no scheduler reads; what its pictures were made with is the 3 of
FLUX.1-dev's own configuration with `use_dynamic_shifting` off.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from linfusion.pipelines.highres.hosts import SHIFT, is_transformer

_NAMES = ("shift", "flow_shift")  # of flow matching schedulers, of solvers that also do flows


def stage_shift(pipe: Any, given: float | None) -> float | None:
    """The shift of the later stages; None where the scheduler has none.

    Raises:
        ValueError: no number above 0, or one for a pipeline or scheduler that has no shift.
    """
    if not is_transformer(pipe) or _name(pipe.scheduler) is None:
        if given is not None:
            what = pipe.scheduler if is_transformer(pipe) else pipe
            raise ValueError(
                f"shift: got {given!r}, but {type(what).__name__} has none; accepted is None"
            )
        return None
    if given is None:
        return SHIFT
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or not 0 < given < math.inf:
        raise ValueError(f"shift: got {given!r}; accepted are numbers above 0")
    return float(given)


@contextlib.contextmanager
def shifted(pipe: Any, sibling: Any, shift: float | None) -> Iterator[None]:
    """Within, `sibling` has the scheduler of `pipe` with this shift, whatever the size."""
    if shift is None:
        yield
        return
    scheduler, before = pipe.scheduler, sibling.scheduler
    changes: dict[str, Any] = {str(_name(scheduler)): shift}
    if "use_dynamic_shifting" in scheduler.config:
        changes["use_dynamic_shifting"] = False
    sibling.scheduler = type(scheduler).from_config(scheduler.config, **changes)
    try:
        yield
    finally:
        sibling.scheduler = before


def _name(scheduler: Any) -> str | None:
    return next((name for name in _NAMES if name in scheduler.config), None)
