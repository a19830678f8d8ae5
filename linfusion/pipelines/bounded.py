"""Run stock UNets, ControlNets and VAEs in the memory there is: `bounded` on, and off again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import linfusion.pipelines.rules  # noqa: F401  fills the table of rules
from linfusion.pipelines.rows import BAND_BYTES, Engine, Node, Rows
from linfusion.pipelines.store import Policy, Store

_PICTURES = ("sample", "controlnet_cond")  # the inputs whose rows everything else follows
_BANDS_AT_ONCE = 8  # tensors of `band_bytes` that one band holds, roughly
_UNITS = {"": 1, "b": 1}
_UNITS |= {p + "b": 1000 ** (i + 1) for i, p in enumerate("kmgt")}
_UNITS |= {p + "ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


@dataclass
class Ledger:
    """What the calls inside `bounded` took, or in a dry run would take.

    Attributes:
        weights_bytes: of the models that are bounded.
        peak_bytes: the most that was held at once: weights, whole tensors and a band.
        peak_on_disk: the most that lay in the scratch folder.
        flops: of products and convolutions.
        calls: forwards, one a picture of the batch.
        unbanded: functions that have no rule for bands and ran on whole tensors.
    """

    weights_bytes: int = 0
    peak_bytes: int = 0
    peak_on_disk: int = 0
    flops: int = 0
    calls: int = 0
    unbanded: set[str] = field(default_factory=set)

    def add(self, engine: Engine) -> None:
        """Enter a finished call."""
        held = self.weights_bytes + engine.store.peak + _BANDS_AT_ONCE * engine.band_bytes
        self.peak_bytes = max(self.peak_bytes, held)
        self.peak_on_disk = max(self.peak_on_disk, engine.store.peak_on_disk)
        self.flops += engine.flops
        self.calls += 1
        self.unbanded |= engine.unbanded


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


@contextlib.contextmanager
def bounded(
    target: Any,
    memory_budget: int | str | None = None,
    *,
    scratch: str | Path | None = None,
    dry: bool = False,
) -> Iterator[Ledger]:
    """Within, the UNet and the ControlNets of `target` run in bands of rows, one picture at a time.

    Results equal those outside within rounding: convolutions read the rows they need beyond a
    band, group norms use the moments of the whole picture, linear attention merges the states of
    bands, softmax attention reads all keys. The modules' own forwards run; on leaving, everything
    is as it was. Inference only.

    Args:
        target: a diffusers pipeline, a UNet or a ControlNet.
        memory_budget: bytes, or text like "12GB", for the models' weights and all they hold
            between layers, on the device they are on; None takes what the smallest plan without
            files needs.
        scratch: folder for skip tensors and others that do not fit; without it a budget that is
            too small is an error.
        dry: compute nothing, and return zeros; the ledger says what it would have taken.

    Yields:
        The `Ledger`, up to date after each call.

    Raises:
        ValueError: no model to bound, a budget that is none, or one below the weights; before a
            forward, one below what it needs, naming the smallest that would do.
    """
    models = _models(target)
    weights = sum(_nbytes(m) for m in models)
    band_bytes, limit = _share(memory_budget, weights)
    folder = None if scratch is None else Path(scratch)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"scratch: there is no folder {folder}")
    ledger = Ledger(weights_bytes=weights)

    def engine(*, dry: bool, limit: int | None = limit) -> Engine:
        return Engine(Store(limit, folder, dry=dry), band_bytes=band_bytes, dry=dry)

    with contextlib.ExitStack() as undo:
        for model in models:
            undo.callback(_put_forward, model, model.__dict__.get("forward"))
            model.forward = _banded(model, model.forward, engine, ledger, dry)
        yield ledger


def decode_rows(
    vae: Any,
    latents: Tensor,
    *,
    memory_budget: int | str | None = None,
    ledger: Ledger | None = None,
    dry: bool = False,
) -> Iterator[np.ndarray]:
    """Decode a picture of any size, a band of rows at a time from top to bottom.

    There are no tiles: convolutions read beyond the band and group norms use the moments of the
    whole picture. What the budget cannot keep is computed again instead.

    Args:
        vae: an AutoencoderKL.
        latents: [1, C, H/8, W/8], as a pipeline returns them (times the scaling factor).
        memory_budget: bytes, or text like "12GB"; None keeps all that is wanted again.
        ledger: to enter what it took into.
        dry: yield nothing; only fill the ledger.

    Yields:
        uint8 [rows, W, 3].
    """
    config = vae.config
    latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    def decoded(engine: Engine) -> Node:
        return vae.decode(engine.wrap(latents.to(vae.dtype)), return_dict=False)[0].node

    with torch.no_grad(), _without_tiling(vae):
        engine = _vae_engine(vae, decoded, memory_budget, dry)
        node = decoded(engine)
    bands = engine.passes(node)
    while True:
        with torch.no_grad():  # not while the caller holds the band
            found = next(bands, None)
        if found is None:
            break
        _, _, (band,) = found
        pixels = (band[0].float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        yield pixels.permute(1, 2, 0).cpu().numpy()
    if ledger is not None:
        ledger.add(engine)


def encode_rows(
    vae: Any,
    picture: np.ndarray,
    *,
    memory_budget: int | str | None = None,
    generator: torch.Generator | None = None,
    ledger: Ledger | None = None,
    dry: bool = False,
) -> Tensor:
    """Encode a picture of any size, a band of rows at a time.

    Args:
        vae: an AutoencoderKL.
        picture: uint8 [H, W, 3], H and W multiples of the VAE's factor; may be a memory map.
        memory_budget: as for `decode_rows`.
        generator: to draw the latents with; None takes their mean.
        ledger, dry: as for `decode_rows`.

    Returns:
        [1, C, H/8, W/8] times the scaling factor, in the VAE's dtype.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"picture: got {picture.dtype} {picture.shape}, accepted is uint8 [H, W, 3]"
        )
    config = vae.config

    def pixels(start: int, stop: int, bands: list[Tensor]) -> Tensor:
        band = torch.from_numpy(np.ascontiguousarray(picture[start:stop]))
        band = band.to(vae.device).permute(2, 0, 1)[None]
        return (band.float() / 127.5 - 1).to(vae.dtype)

    def encoded(engine: Engine, generator: torch.Generator | None = None) -> Node:
        shape = (1, 3, *picture.shape[:2])
        source = Node(engine, shape, vae.dtype, vae.device, axis=2, line=1, compute=pixels)
        found = vae.encode(Rows(source), return_dict=False)[0]
        return (found.mode() if generator is None else found.sample(generator)).node

    with torch.no_grad(), _without_tiling(vae):
        engine = _vae_engine(vae, encoded, memory_budget, dry)
        latents = engine.whole(Rows(encoded(engine, None if dry else generator)))
    if ledger is not None:
        ledger.add(engine)
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents - shift) * config.scaling_factor


def _banded(
    model: Any,
    forward: Callable[..., Any],
    new_engine: Callable[..., Engine],
    ledger: Ledger,
    dry: bool,
) -> Callable[..., Any]:
    signature = inspect.signature(type(model).forward)
    fitting: set[tuple[tuple[int, ...], ...]] = set()  # inputs that the budget is known to hold

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise ValueError(
                "bounded: gradients are enabled; it is for inference, use torch.no_grad()"
            )
        given = signature.bind(model, *args, **kwargs).arguments
        given.pop(next(iter(signature.parameters)))
        extra = given.pop("kwargs", {})
        inputs = {**given, **extra}
        batch = inputs["sample"].shape[0]
        together = any("PAG" in type(p).__name__ for p in model.attn_processors.values())
        turns = [inputs] if together else [_take(inputs, i, batch) for i in range(batch)]
        shapes = tuple(tuple(inputs[name].shape) for name in _PICTURES if name in inputs)
        if new_engine(dry=True).store.limit is not None and shapes not in fitting:
            _refuse_if_too_small(forward, turns[0], new_engine, ledger)
            fitting.add(shapes)
        outputs = []
        for turn in turns:
            engine = new_engine(dry=dry)
            out = _call(forward, turn, engine)
            outputs.append(tree_map(functools.partial(_plain, engine), out))
            ledger.add(engine)
        return _joined(outputs)

    return run


def _call(forward: Callable[..., Any], inputs: dict[str, Any], engine: Engine) -> Any:
    wrapped = {
        name: engine.wrap(value) if name in _PICTURES else value for name, value in inputs.items()
    }
    return forward(**wrapped)


def _refuse_if_too_small(
    forward: Callable[..., Any],
    inputs: dict[str, Any],
    new_engine: Callable[..., Engine],
    ledger: Ledger,
) -> None:
    """A dry run with the limit; where that overflows, one without tells what would do."""
    trial = new_engine(dry=True)
    tree_map(functools.partial(_plain, trial), _call(forward, inputs, trial))
    limit = trial.store.limit
    assert limit is not None
    if trial.store.peak > limit:
        fixed = ledger.weights_bytes + _BANDS_AT_ONCE * trial.band_bytes
        raise ValueError(
            f"memory_budget: got {limit + fixed:,} bytes; {tuple(inputs['sample'].shape)} needs"
            f" {trial.store.peak + fixed:,}"
            + ("" if trial.store.scratch else ", or less with scratch=a folder for what lies idle")
        )


def _plain(engine: Engine, value: Any) -> Any:
    if not isinstance(value, Rows):
        return value
    whole = engine.whole(value)
    return torch.zeros_like(whole, device=value.node.device) if whole.is_meta else whole


def _take(inputs: dict[str, Any], index: int, batch: int) -> dict[str, Any]:
    """The share of one picture of the batch in every input that has one."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
            return value.narrow(0, index, 1)
        return value

    return tree_map(take, inputs)


def _joined(outputs: list[Any]) -> Any:
    if len(outputs) == 1:
        return outputs[0]
    leaves, trees = zip(*(tree_flatten(out) for out in outputs), strict=True)
    joined = [
        torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*leaves, strict=True)
    ]
    return tree_unflatten(joined, trees[0])


def _vae_engine(
    vae: Any, build: Callable[[Engine], Node], memory_budget: int | str | None, dry: bool
) -> Engine:
    """The engine that does the least work within the budget, as far as dry runs find it.

    What is kept early leaves no room for what comes later: first the bound on the size of what is
    kept is chosen, then exceptions to it.
    """
    band_bytes, limit = _share(memory_budget, _nbytes(vae))

    def engine(policy: Policy | None, *, dry: bool) -> Engine:
        return Engine(Store(limit, policy=policy, dry=dry), band_bytes=band_bytes, dry=dry)

    @functools.cache
    def trial(policy: Policy | None) -> Engine:
        tried = engine(policy, dry=True)
        for _ in tried.passes(build(tried)):
            pass
        return tried

    def work(policy: Policy) -> int:
        return trial(policy).flops

    if limit is None:
        return engine(None, dry=dry)
    least = trial(None).flops  # with everything kept, whatever the budget
    sizes = sorted({0, *trial(Policy(largest=0)).store.asked}, reverse=True)
    found = []
    for best in [Policy(size) for size in sizes if size <= limit]:
        for index in range(len(trial(best).store.asked)):
            if work(best) == least:
                return engine(best, dry=dry)
            best = min(best, Policy(best.largest, best.exceptions | {index}), key=work)
        found.append(best)
    return engine(min(found, key=work), dry=dry)


def _share(memory_budget: int | str | None, weights: int) -> tuple[int, int | None]:
    """Bytes of the widest tensor of a band, and what the budget leaves for whole tensors."""
    if memory_budget is None:
        return BAND_BYTES, None
    budget = parse_bytes(memory_budget)
    band_bytes = min(BAND_BYTES, max(1 << 20, budget >> 7))
    limit = budget - weights - _BANDS_AT_ONCE * band_bytes
    if limit <= 0:
        raise ValueError(
            f"memory_budget: got {budget:,} bytes; the weights take {weights:,} and one band of"
            f" rows {_BANDS_AT_ONCE * band_bytes:,}"
        )
    return band_bytes, limit


@contextlib.contextmanager
def _without_tiling(vae: Any) -> Iterator[None]:
    before = vae.use_tiling, vae.use_slicing
    vae.use_tiling = vae.use_slicing = False
    try:
        yield
    finally:
        vae.use_tiling, vae.use_slicing = before


def _models(target: Any) -> list[Any]:
    parts: list[Any] = [target] if isinstance(target, nn.Module) else []
    if not parts:
        parts = [getattr(target, name, None) for name in ("unet", "controlnet")]
        parts = [m for part in parts if part is not None for m in getattr(part, "nets", [part])]
    known = [m for m in parts if hasattr(m, "attn_processors") and hasattr(m, "down_blocks")]
    if not known:
        raise ValueError(
            f"target: got {type(target).__name__}; accepted is a pipeline with a UNet, a UNet or a"
            " ControlNet"
        )
    for model in known:
        for name, part in model.named_modules():
            hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", None)
            if name and (hooks or hasattr(part, "_hf_hook")):
                raise ValueError(
                    f"target: the layer {name} of {type(model).__name__} has a hook of sequential"
                    " or group offloading, layerwise casting or a cache, which moves or skips what"
                    " rows still need; accepted are models without, or with model offloading"
                )
    return known


def _put_forward(model: nn.Module, forward: Any) -> None:
    if forward is None:
        del model.forward
    else:
        model.forward = forward


def _nbytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])
