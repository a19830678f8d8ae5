"""An error anywhere inside linearize, restore, fuse and the like: a model is fully on or off."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline

import linfusion
from linfusion.layers.record import record_of
from linfusion.linearize import as_softmax
from tests.student_files import student_for
from tests.tiny import tiny_sd_pipeline, tiny_unet
from tests.tiny_joint import tiny_flux, tiny_sd3

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(linfusion.__file__).parent
# Where something is changed; finding what to change is read only.
STEPS = {
    str(ROOT / name)
    for name in (
        "linearize.py",
        "fuse.py",
        "layers/switch.py",
        "layers/projections.py",
        "layers/record.py",
        "attention/grids/joint.py",
    )
}


class Stopped(BaseException):
    """As Ctrl-C or a full memory, at any line."""


def run(call: Callable[[], object], stop_at: int | None = None) -> list[tuple[str, int]]:
    """Run a call, raising before its `stop_at`-th line of ours; the lines that were reached."""
    reached: list[tuple[str, int]] = []

    def local(frame, event, arg):
        if event == "line":
            reached.append((frame.f_code.co_filename, frame.f_lineno))
            if len(reached) - 1 == stop_at:
                raise Stopped
        return local

    def trace(frame, event, arg):
        return local if frame.f_code.co_filename in STEPS else None

    sys.settrace(trace)
    try:
        call()
    except Stopped:
        pass
    finally:
        sys.settrace(None)
    return reached


def state(model) -> tuple:
    """Everything there is to be on or off, but for the bits of the tensors."""
    return (
        list(model.state_dict()),
        {path: type(processor).__name__ for path, processor in model.attn_processors.items()},
        {
            path: (len(module._forward_pre_hooks), len(module._forward_hooks))
            for path, module in model.named_modules()
        },
        dict(model.config),
        record_of(model) is not None,
    )


def tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def in_one_of(pipe, ends, stopped=None) -> int:
    """Which of the ends a model is in, to the bit."""
    model = getattr(pipe, "unet", pipe)
    for index, (parts, numbers) in enumerate(ends):
        if state(model) == parts:
            now = tensors(model)
            assert all(torch.equal(now[name], numbers[name]) for name in numbers)
            return index
    raise AssertionError(f"neither on nor off, stopped at {stopped}")


def softmax_for_a_while(pipe):
    with as_softmax(pipe):
        pass


SIDE = student_for(tiny_unet(), attention_weights=True)
PART = {"weights": SIDE, "layers": ["mid_block", "down_blocks.0"]}


def unet():
    return linfusion.linearize(tiny_unet(), **PART)


def guided():
    return tiny_sd_pipeline(StableDiffusionPAGPipeline, pag_applied_layers=["mid"])


# What it begins with, what is done, and what undoes that.
CALLS = {
    "linearize": (tiny_unet, lambda m: linfusion.linearize(m, **PART), linfusion.restore),
    "linearize with guidance": (guided, lambda m: linfusion.linearize(m, **PART), None),
    "clear": (tiny_flux, lambda m: linfusion.linearize(m, "clear", ntk=3.0), linfusion.restore),
    "clear on sd3": (
        tiny_sd3,
        lambda m: linfusion.linearize(m, "clear", layers=r"blocks\.0"),
        linfusion.restore,
    ),
    "restore": (unet, linfusion.restore, lambda m: linfusion.linearize(m, **PART)),
    "as_softmax": (unet, softmax_for_a_while, None),
    "fuse": (unet, linfusion.fuse, linfusion.unfuse),
    "unfuse": (lambda: linfusion.fuse(unet()), linfusion.unfuse, linfusion.fuse),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_stopped_anywhere_leaves_all_or_nothing(name):
    make, call, undo = CALLS[name]
    pipe = make()
    model = getattr(pipe, "unet", pipe)
    ends = [(state(model), tensors(model))]
    reached = run(partial(call, pipe))
    ends.append((state(model), tensors(model)))
    if name == "as_softmax":
        off = tiny_unet()
        ends.append((state(off), tensors(off)))
    every = range(len(reached))
    first = {reached[index]: index for index in reversed(every)}
    # At its end a `with` is reached once more, where only a signal could raise.
    last = {
        line: index
        for index in every
        if not linecache.getline(*(line := reached[index])).lstrip().startswith("with ")
    }
    stops = sorted({*first.values(), *last.values()})
    assert len(stops) > 10
    pipe = make()
    for stop in stops:
        run(partial(call, pipe), stop)
        end = in_one_of(pipe, ends, reached[stop])
        if end == 0:
            continue
        if end == 1 and undo is not None:
            undo(pipe)
        else:
            pipe = make()


@pytest.mark.parametrize(
    "call", [linfusion.restore, softmax_for_a_while], ids=["restore", "as_softmax"]
)
def test_of_two_models_that_are_stopped_anywhere_both_are_on_or_both_off(call):
    sides = PART | {"weights": {"transformer": SIDE, "transformer_2": SIDE}}

    def pair():
        return linfusion.linearize(
            SimpleNamespace(transformer=tiny_unet(), transformer_2=tiny_unet()), **sides
        )

    pipe = pair()
    models = pipe.transformer, pipe.transformer_2
    on, off = (state(models[0]), tensors(models[0])), (state(tiny_unet()), tensors(tiny_unet()))
    lines = run(partial(call, pipe))
    # Of every line the last time that it is reached: most in the second model.
    stops = sorted({line: index for index, line in enumerate(lines)}.values())[::3]
    assert len(stops) > 10
    seen = set()
    for stop in stops:
        pipe = pair()
        run(partial(call, pipe), stop)
        one, other = (in_one_of(m, [on, off], lines[stop]) for m in vars(pipe).values())
        assert one == other, lines[stop]
        seen.add(one)
    assert seen == {0, 1}


def test_a_full_memory_inside_linearize_leaves_the_model_softmax(monkeypatch):
    model = tiny_unet()
    before = state(model), tensors(model)
    real, calls = torch.Tensor.to, 0

    def to(self, *args, **kwargs):
        nonlocal calls
        calls += kwargs.get("copy", False)
        if calls == 9:
            calls += 1
            raise torch.OutOfMemoryError("as if")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        linfusion.linearize(model, weights=SIDE)
    monkeypatch.undo()
    assert in_one_of(model, [before]) == 0
    linfusion.linearize(model, weights=SIDE)
