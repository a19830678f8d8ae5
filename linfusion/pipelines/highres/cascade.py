"""Full attention for the base picture of FLUX and Stable Diffusion 3, CLEAR's for what follows.

The cascade of CLEAR (Liu et al. 2024, arXiv:2412.16112): at the size a model was made for, full
attention is as fast and better; above it, image-to-image stages run with local windows.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from linfusion.layers.find import candidates
from linfusion.layers.record import MARKER, record_of
from linfusion.layers.twin import can_have_a_twin, twin
from linfusion.linearize import as_softmax, linearize, restore
from linfusion.pipelines.highres.hosts import called, denoiser, is_transformer, window_options
from linfusion.pipelines.highres.stages import Job, Stage

Clear = Mapping[str, Any] | bool

_LOCK = threading.Lock()
_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # a lock for each transformer


def check_clear(pipe: Any, clear: Clear) -> None:
    """Refuse what this pipeline cannot do.

    Raises:
        ValueError: settings for a UNet, or for a transformer that has its own.
    """
    if not isinstance(clear, bool) and not isinstance(clear, Mapping):
        raise ValueError(
            f"clear: got {clear!r}; accepted are True, False, or options of"
            ' linfusion.linearize(pipe, "clear", ...) by name'
        )
    if clear is True:
        return
    if not is_transformer(pipe):
        raise ValueError(
            f"clear: got {clear!r}; {type(pipe).__name__} has a UNet, which runs as it is at every"
            " stage; accepted is True"
        )
    if clear is not False and record_of(denoiser(pipe)) is not None:
        raise ValueError(
            f"clear: got {dict(clear)!r}, but the pipeline is linearized already; accepted are"
            " True, for later stages as it is, or linfusion.restore(pipe) first"
        )


@contextlib.contextmanager
def with_windows(pipe: Any, sibling: Any, clear: Clear) -> Iterator[tuple[Any, Any]]:
    """Within, two pipelines whose transformer attends as in the later stages.

    They are others over the same weights, so that whoever calls the transformer meanwhile finds it
    as it is. Where those cannot be had (it is compiled, or hooks of diffusers are on it), its own
    layers are other ones for that time, and runs that share it wait for one another.
    """
    if not is_transformer(pipe) or clear is False:
        yield pipe, sibling
        return
    model = denoiser(pipe)
    if called(pipe) is model and can_have_a_twin(model):
        record = record_of(model)
        other = twin(model, record.layers if record else candidates(model, "clear"))
        pipe, sibling = (_with_transformer(one, other) for one in (pipe, sibling))
        _put_on(pipe, clear)
        yield pipe, sibling
        return
    with _turn_of(model):
        ours = _put_on(pipe, clear)
        try:
            yield pipe, sibling
        finally:
            if ours:
                restore(pipe)


def _with_transformer(pipe: Any, transformer: nn.Module) -> Any:
    """The same pipeline around another transformer; `pipe` is as it was."""
    other = copy.copy(pipe)
    other.__dict__["transformer"] = transformer  # past what a pipeline writes into its config
    return other


def _put_on(pipe: Any, clear: Clear) -> bool:
    """Give a transformer that is not linear yet its windows; whether it was not."""
    if record_of(denoiser(pipe)) is not None:
        return False
    given = dict(clear) if isinstance(clear, Mapping) else {}
    trained = "weights" in given or MARKER in denoiser(pipe).config
    linearize(pipe, "clear", **(window_options(pipe, trained=trained) | given))
    return True


def _turn_of(model: nn.Module) -> Any:
    with _LOCK:
        return _TURNS.setdefault(model, threading.RLock())


@contextlib.contextmanager
def as_drawn(pipe: Any, job: Job, stage: Stage) -> Iterator[None]:
    """Within `with_windows`, the denoiser attends as in this stage."""
    softmax = job.softmax_base and stage.strength is None
    with as_softmax(pipe) if softmax else contextlib.nullcontext():
        yield


def laid_aside(pipe: Any) -> int:
    """Bytes of weights that a student replaces, which stay in memory for the base stage."""
    record = record_of(denoiser(pipe))
    layers = [] if record is None else record.layers.values()
    return sum(t.nbytes for layer in layers for t in layer.base_weights.values())


def pooled_by(pipe: Any) -> int:
    """Tokens a side that the layers pool into one."""
    record = record_of(denoiser(pipe))
    settings = {} if record is None else record.settings
    found = [s.get("down_factor", 1) for s in settings.values() if isinstance(s, dict)]
    return max(found, default=1)
