"""Share a model's work among processes, and stop doing so."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from linfusion.attention.grids.local import SHARED
from linfusion.layers.record import record_of
from linfusion.parallel import pictures
from linfusion.parallel.agree import agree, check_inputs
from linfusion.parallel.mesh import Mesh, mesh_of, together
from linfusion.parallel.shard import Shard
from linfusion.parallel.transformers.hosts import own_shard
from linfusion.parallel.transformers.share import check_transformer, share_transformer

# Whether a pipeline's call, whose arguments were compared, is what calls a model.
_AGREED: ContextVar[bool] = ContextVar("agreed", default=False)
_WHOLE = ("img_ids", "txt_ids")  # of tokens, not of the pictures of a batch


@dataclass
class Parallel:
    """What hangs on a model or pipeline that was parallelized.

    Attributes:
        mesh: its ranks.
        shard: that a model of our own asks for, of the grid of a call.
        undo: takes everything off; None on the models of a pipeline, which has it.
    """

    mesh: Mesh
    shard: Callable[[tuple[int, ...]], Shard] | None = None
    undo: contextlib.ExitStack | None = None


def parallelize(
    model_or_pipe: Any, *, sp: int | None = None, cfg: int = 1, mesh: Any = None
) -> Any:
    """Share every forward of a linear model among processes, in place and exactly.

    Each rank computes whole rows of the picture (of every frame of a video) and exchanges what its
    attention needs: one state a layer for linear attention, a few rows of keys and values for
    windows (LASP-2, Sun et al. 2025, arXiv:2502.07563). Inputs and results are whole on all ranks;
    results are those of one process within rounding. Gradients are those of the sum of all ranks'
    losses, so averaging them over ranks, as FSDP and DDP do, gives those of one process.

    Call it on every rank, after `linearize` and LoRA and before `torch.compile`.

    Args:
        model_or_pipe: a pipeline (its UNet or transformer, ControlNets of a UNet and picture VAE
            are shared), or a model: a UNet, a ControlNet of one, FLUX or Stable Diffusion 3 with
            "clear", DiT or PixArt with "lit", Wan, SANA-Video or CogVideoX with "mate", or a
            `LinGenTransformer3DModel`.
        sp: ranks that share rows; None is all there are, by `cfg`.
        cfg: 2 computes the two halves of classifier-free guidance on two groups of ranks.
        mesh: `DeviceMesh` with an axis "sp", and "cfg" if any; None makes one of all processes.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it is not linearized or is parallelized already, cannot be shared, or is
            offloaded; there is no process group, or sizes do not make up its ranks. Nothing has
            changed then. In a call: ranks that were called differently, or more of them than rows.
    """
    models = _models(model_or_pipe)
    for model in models:
        _check(model)
    if SHARED in getattr(model_or_pipe, "__dict__", {}):
        raise ValueError("parallelize: the pipeline is parallelized already")
    device = next((p.device.type for m in models for p in m.parameters()), "cpu")
    found = mesh_of(device, sp, cfg, mesh)
    done = contextlib.ExitStack()
    with done:
        for model in models:
            _share(model, found, done)
        if not isinstance(model_or_pipe, nn.Module):
            _share_pipeline(model_or_pipe, found, done)
        kept = done.pop_all()
    owner = models[0] if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    getattr(owner, SHARED).undo = kept
    return model_or_pipe


def unparallelize(model_or_pipe: Any) -> Any:
    """Undo `parallelize`: everything is as it was.

    Args:
        model_or_pipe: what was given to `parallelize`.

    Returns:
        `model_or_pipe`.

    Raises:
        ValueError: it was not parallelized.
    """
    target = getattr(model_or_pipe, "_orig_mod", model_or_pipe)
    parallel = target.__dict__.get(SHARED)
    if parallel is None or parallel.undo is None:
        raise ValueError(
            f"unparallelize: this {type(target).__name__} was not given to linfusion.parallelize"
        )
    parallel.undo.close()
    return model_or_pipe


def _models(model_or_pipe: Any) -> list[Any]:
    """The denoiser, and what of a pipeline's ControlNets shares rows with it."""
    if isinstance(model_or_pipe, nn.Module):
        return [getattr(model_or_pipe, "_orig_mod", model_or_pipe)]
    parts = [getattr(model_or_pipe, name, None) for name in ("unet", "transformer")]
    found = [getattr(part, "_orig_mod", part) for part in parts if isinstance(part, nn.Module)]
    if not found:
        raise ValueError(
            f"model_or_pipe: got {type(model_or_pipe).__name__}, expected a torch module or a"
            " pipeline with a unet or a transformer"
        )
    second: Any = getattr(model_or_pipe, "transformer_2", None)  # of Wan 2.2
    if isinstance(second, nn.Module) and record_of(second) is not None:
        found.append(second)
    nets = getattr(model_or_pipe, "controlnet", None)
    nets = [] if nets is None else list(getattr(nets, "nets", [nets]))
    return found + [net for net in nets if pictures.is_picture_model(net)]


def _check(model: Any) -> None:
    """Refuse a model that cannot be shared, before anything changes."""
    kind = type(model).__name__
    if SHARED in model.__dict__:
        raise ValueError(f"parallelize: this {kind} is parallelized already")
    for name, part in model.named_modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", None)
        if hooks or hasattr(part, "_hf_hook"):
            raise ValueError(
                f"model_or_pipe: {name or kind} has a hook of offloading, a cache, layerwise"
                " casting or another parallelism; linfusion.parallelize takes models that stay on"
                " their device, so call it instead of those"
            )
    if pictures.is_picture_model(model):
        if record_of(model) is None and "ControlNet" not in kind:
            raise ValueError(_ORDER.format(kind))
        return
    check_transformer(model, _ORDER.format(kind))


_ORDER = (
    "parallelize: this {} is not linearized; call linfusion.linearize first, then load LoRAs, then"
    " linfusion.parallelize, then compile"
)


def _share(model: Any, mesh: Mesh, done: contextlib.ExitStack) -> None:
    parallel = Parallel(mesh, functools.partial(own_shard, model, mesh.sp))
    setattr(model, SHARED, parallel)
    done.callback(delattr, model, SHARED)
    around = functools.partial(_around, model, mesh)
    if pictures.is_picture_model(model):
        done.callback(pictures.share_model(model, mesh, around))
    else:
        done.callback(share_transformer(model, mesh, around))


def _around(
    model: Any,
    mesh: Mesh,
    run: Callable[..., Any],
    forward: Callable[..., Any],
    inputs: dict[str, Any],
) -> Any:
    """A call of a model: compared, in halves where guidance has two groups, and as one fate."""
    if _AGREED.get():
        return _in_halves(model, mesh, functools.partial(run, forward), inputs)
    with together(mesh):
        check_inputs(mesh, _tensors(inputs))
        return _in_halves(model, mesh, functools.partial(run, forward), inputs)


def _tensors(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What can be compared: no rows that are still to be computed."""
    return {name: value for name, value in inputs.items() if type(value) is Tensor}


def _in_halves(model: Any, mesh: Mesh, run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """`run(inputs)`, of which each of two groups of ranks computes half of the batch."""
    halves = mesh.cfg.world
    main = inputs["sample" if "sample" in inputs else "hidden_states"]
    batch = main.shape[0]
    if halves == 1 or ("ControlNet" in type(model).__name__ and batch % halves):
        return run(inputs)
    if batch % halves:
        raise ValueError(
            f"cfg: got {halves}, but {type(model).__name__} is called with a batch of {batch}:"
            " there are no two halves of guidance in it; use cfg=1"
        )
    size = batch // halves

    def half(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
            return value.narrow(0, size * mesh.cfg.rank, size)
        return value

    given = {k: v if k in _WHOLE else tree_map(half, v) for k, v in inputs.items()}
    leaves, tree = tree_flatten(run(given))
    joined = [
        mesh.cfg.gather(leaf).flatten(0, 1) if isinstance(leaf, Tensor) else leaf for leaf in leaves
    ]
    return tree_unflatten(joined, tree)


def _share_pipeline(pipe: Any, mesh: Mesh, done: contextlib.ExitStack) -> None:
    """Its VAE, if of pictures, and its calls: arguments are compared and a seed is agreed on."""
    vae: Any = getattr(pipe, "vae", None)
    if type(vae).__name__ == "AutoencoderKL" and not hasattr(vae, "_hf_hook"):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        done.callback(pictures.share_coder(vae.decoder, mesh.sp, 1))
        done.callback(pictures.share_coder(vae.encoder, mesh.sp, factor))
    cls: Any = type(pipe)
    calls: dict[str, Any] = {"__call__": _called(mesh, cls.__call__), "__module__": cls.__module__}
    if hasattr(cls, "stream"):
        calls["stream"] = _streamed(mesh, cls.stream)
    # A call is looked up on the class: this object gets one of its own, of the same name.
    agreeing = type(cls.__name__, (cls,), calls)
    agreeing.__qualname__ = cls.__qualname__
    pipe.__class__ = agreeing
    done.callback(setattr, pipe, "__class__", cls)
    setattr(pipe, SHARED, Parallel(mesh))
    done.callback(pipe.__dict__.pop, SHARED)


@contextlib.contextmanager
def _as_one(mesh: Mesh) -> Iterator[None]:
    """Within, models are called by what the ranks agreed upon, and fail together."""
    token = _AGREED.set(True)
    try:
        with together(mesh):
            yield
    finally:
        _AGREED.reset(token)


def _called(mesh: Mesh, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _as_one(mesh):
            return call(**agree(mesh, call, (self, *args), kwargs))

    return called


def _streamed(mesh: Mesh, stream: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(stream)
    def streamed(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with _as_one(mesh):
            found = stream(**agree(mesh, stream, (self, *args), kwargs))
        return _together_each(mesh, found)

    return streamed


def _together_each(mesh: Mesh, found: Iterator[Any]) -> Iterator[Any]:
    end = object()
    try:
        while True:
            with _as_one(mesh):
                item = next(found, end)
            if item is end:
                return
            yield item
    finally:
        if isinstance(found, Generator):
            found.close()  # not when it happens to be collected: it has a folder
