"""Run stock denoisers and ControlNets in the memory there is: `bounded` on, and off again."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import linfusion.bands.rules  # noqa: F401  fills the table of rules
from linfusion.attention.grids.local import SHARED
from linfusion.attention.linfusion.processor import FUSED
from linfusion.bands.around import around, eager
from linfusion.bands.blocks import call_in_blocks
from linfusion.bands.budget import BANDS_AT_ONCE, Ledger, share_of, weight_bytes
from linfusion.bands.hollow import hollow
from linfusion.bands.hosts import TRANSFORMERS, unwrapped
from linfusion.bands.rows import Engine, Node, Rows
from linfusion.bands.store import Store

_PICTURES = ("sample", "controlnet_cond")  # the inputs whose rows everything else follows
_WHOLE = ("img_ids", "txt_ids")  # of tokens, not of the pictures of a batch


@contextlib.contextmanager
def bounded(
    target: Any,
    memory_budget: int | str | None = None,
    *,
    scratch: str | Path | None = None,
    dry: bool = False,
    in_bands: bool = True,
) -> Iterator[Ledger]:
    """Within, the denoiser and ControlNets of `target` run in bands of rows, one picture at a time.

    Results equal those outside within rounding: convolutions read the rows they need beyond a
    band, group norms use the moments of the whole picture, linear attention merges the states of
    bands, softmax attention reads all keys. FLUX and Stable Diffusion 3 run each block in bands of
    tokens; CLEAR's windows take whole queries, keys and values. The modules' own forwards run,
    those that were compiled as Python has them; in other threads, and on leaving, the models are as
    they were. Inference only.

    Args:
        target: a diffusers pipeline, a UNet, a ControlNet of one, or a transformer of FLUX or
            Stable Diffusion 3.
        memory_budget: bytes, or text like "12GB", for the models' weights and all they hold
            between layers, on the device they are on; None takes what the smallest plan without
            files needs.
        scratch: folder for skip tensors and others that do not fit; without it a budget that is
            too small is an error.
        dry: compute nothing, and return zeros; the ledger says what it would have taken.
        in_bands: False has a dry run count what the models take as they are, without bands.

    Yields:
        The `Ledger`, up to date after each call.

    Raises:
        ValueError: no model to bound, a budget that is none, or one below the weights; before a
            forward, one below what it needs, naming the smallest that would do.
    """
    models = _models(target)
    weights = sum(weight_bytes(m) for m in models)
    band_bytes, limit = share_of(memory_budget, weights)
    folder = None if scratch is None else Path(scratch)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"scratch: there is no folder {folder}")
    ledger = Ledger(weights_bytes=weights, in_bands=in_bands)

    def engine(*, dry: bool, limit: int | None = limit) -> Engine:
        return Engine(Store(limit, folder, dry=dry), band_bytes=band_bytes, dry=dry)

    with contextlib.ExitStack() as stack:
        for called in _called(target):
            model = unwrapped(called)
            stack.enter_context(parts_uncompiled(model))
            stack.enter_context(around(called, _banded(model, engine, ledger, dry)))
        yield ledger


@contextlib.contextmanager
def parts_uncompiled(model: nn.Module) -> Iterator[None]:
    """Within, what was compiled of a model's parts runs as Python has it."""
    with contextlib.ExitStack() as stack:
        for part in model.modules():
            if part is not model and part.__dict__.get("_compiled_call_impl") is not None:
                stack.enter_context(around(part, functools.partial(_uncompiled, part)))
        yield


@contextlib.contextmanager
def fused_on_whole_tokens(model: nn.Module) -> Iterator[None]:
    """Within, the layers that `fuse` made get whole tokens, not Rows."""
    with contextlib.ExitStack() as stack:
        for attn in model.modules():
            if (fused := getattr(attn, "_modules", {}).get(FUSED)) is not None:
                stack.enter_context(around(fused, _on_whole_tokens))
        yield


def _uncompiled(module: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows are not what compiled code was made for."""
    return eager(module)(*args, **kwargs)


def _banded(
    model: Any, new_engine: Callable[..., Engine], ledger: Ledger, dry: bool
) -> Callable[..., Any]:
    signature = inspect.signature(type(model).forward)
    main = "sample" if hasattr(model, "down_blocks") else "hidden_states"
    fitting: set[tuple[tuple[int, ...], ...]] = set()  # inputs that the budget is known to hold

    def run(_: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                "bounded: gradients are enabled; it is for inference, use torch.no_grad()"
            )
        given = signature.bind(model, *args, **kwargs).arguments
        given.pop(next(iter(signature.parameters)))
        extra = given.pop("kwargs", {})
        inputs = {**given, **extra}
        batch = inputs[main].shape[0]
        call: Callable[..., Any] = functools.partial(_call, model)
        if main != "sample":
            call = functools.partial(call_in_blocks, model, eager(model))
        together = any("PAG" in type(p).__name__ for p in model.attn_processors.values())
        turns = [inputs] if together else [_take(inputs, i, batch) for i in range(batch)]
        shapes = tuple(tuple(inputs[name].shape) for name in (main, _PICTURES[1]) if name in inputs)
        if new_engine(dry=True).store.limit is not None and shapes not in fitting:
            _refuse_if_too_small(call, turns[0], shapes[0], new_engine, ledger)
            fitting.add(shapes)
        outputs = []
        for turn in turns:
            engine = new_engine(dry=dry)
            out = call(turn, engine)
            outputs.append(tree_map(functools.partial(_plain, engine), out))
            ledger.add(engine)
        return _joined(outputs)

    return run


def _call(model: Any, inputs: dict[str, Any], engine: Engine) -> Any:
    wrapped = {
        name: engine.wrap(value) if name in _PICTURES else value for name, value in inputs.items()
    }
    # Of a dry run, Rows make nothing large, and asking modes for each of their operations is slow.
    asked = _disable_current_modes() if engine.dry else contextlib.nullcontext()
    with fused_on_whole_tokens(model), asked:
        return eager(model)(**wrapped)


def _on_whole_tokens(call: Callable[..., Any], x: Any, *rest: Any) -> Any:
    """A fused layer: one function of all tokens, of which queries and the result are whole."""
    if not isinstance(x, Rows):
        return call(x, *rest)
    node, engine = x.node, x.node.engine
    tokens = engine.whole(x)
    with engine.store.beside(tokens.nbytes):
        out = call(tokens, *rest) if not engine.dry else hollow(node.shape, node.dtype, node.device)
        engine.flops += 2 * tokens.numel() * 4 * tokens.shape[-1]  # queries, keys, values, output
        return Rows(Node.leaf(engine, engine.store.adopt(out, node.axis, node.line)))


def _refuse_if_too_small(
    call: Callable[..., Any],
    inputs: dict[str, Any],
    shape: tuple[int, ...],
    new_engine: Callable[..., Engine],
    ledger: Ledger,
) -> None:
    """A dry run with the limit; where that overflows, one without tells what would do."""
    trial = new_engine(dry=True)
    tree_map(functools.partial(_plain, trial), call(inputs, trial))
    limit = trial.store.limit
    assert limit is not None
    if trial.store.peak > limit:
        fixed = ledger.weights_bytes + BANDS_AT_ONCE * trial.band_bytes
        raise ValueError(
            f"memory_budget: got {limit + fixed:,} bytes; {shape} needs"
            f" {trial.store.peak + fixed:,}"
            + ("" if trial.store.scratch else ", or less with scratch=a folder for what lies idle")
        )


def _plain(engine: Engine, value: Any) -> Any:
    if not isinstance(value, Rows):
        return value
    whole = engine.whole(value)
    return hollow(whole.shape, whole.dtype, value.node.device) if whole.is_meta else whole


def _take(inputs: dict[str, Any], index: int, batch: int) -> dict[str, Any]:
    """The share of one picture of the batch in every input that has one."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
            return value.narrow(0, index, 1)
        return value

    return {
        name: value if name in _WHOLE else tree_map(take, value) for name, value in inputs.items()
    }


def _joined(outputs: list[Any]) -> Any:
    if len(outputs) == 1:
        return outputs[0]
    leaves, trees = zip(*(tree_flatten(out) for out in outputs), strict=True)
    joined = [
        torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, trees[0])


def _called(target: Any) -> list[Any]:
    """What a pipeline calls: denoiser and ControlNets, compiled or not."""
    if isinstance(target, nn.Module):
        return [target]
    parts = [getattr(target, name, None) for name in ("unet", "transformer", "controlnet")]
    return [m for part in parts if part is not None for m in getattr(part, "nets", [part])]


def _models(target: Any) -> list[Any]:
    parts = [unwrapped(part) for part in _called(target)]
    known = [
        m
        for m in parts
        if (hasattr(m, "attn_processors") and hasattr(m, "down_blocks"))
        or type(m).__name__ in TRANSFORMERS
    ]
    if not known or len(known) < len(parts):
        raise ValueError(
            f"target: got {type(target).__name__}; accepted is a pipeline with a UNet or with the"
            " transformer of FLUX or Stable Diffusion 3, one of these, or a ControlNet of a UNet"
        )
    for model in known:
        _refuse_unbandable(model)
    return known


def _refuse_unbandable(model: Any) -> None:
    """What moves, skips or changes in place what rows still need.

    Raises:
        ValueError: the model has it, by name, with what takes it off.
    """
    if hasattr(model, SHARED) and not hasattr(model, "down_blocks"):
        raise ValueError(
            f"target: this {type(model).__name__} is shared among ranks by its tokens, which bands"
            " do not know; accepted are UNets that are shared, or unparallelize first"
        )
    for name, part in model.named_modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", None)
        if name and (hooks or hasattr(part, "_hf_hook")):
            raise ValueError(
                f"target: the layer {name} of {type(model).__name__} has a hook of sequential"
                " or group offloading, layerwise casting or a cache, which moves or skips what"
                " rows still need; accepted are models without, or with model offloading"
            )
        if getattr(part, "b1", None) is not None and getattr(part, "s1", None) is not None:
            raise ValueError(
                f"target: {type(model).__name__} has FreeU on, which needs whole feature maps; a"
                " run without a budget takes it, a plan or a budget after disable_freeu()"
            )
    for name, processor in model.attn_processors.items():
        if "Sliced" in type(processor).__name__:
            raise ValueError(
                f"target: {name} of {type(model).__name__} is a {type(processor).__name__}; bands"
                " bound attention already: call disable_attention_slicing() first"
            )
