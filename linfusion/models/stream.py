"""What a video model carries from block to block, and how a clip is cut into blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from linfusion.attention.mate.layer import LayerState

_TENSORS = ("conv", "ssm", "halo", "review")


def split_blocks(frames: int, block: int) -> tuple[int, ...]:
    """Frames of each block of a clip; what does not divide is added to the first one.

    As LongSANA does it. A clip shorter than a block is one block.

    Raises:
        ValueError: either is below 1.
    """
    for name, value in (("frames", frames), ("block", block)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive whole number")
    count, left = divmod(frames, block)
    return (block + left, *[block] * (count - 1)) if count else (frames,)


class StreamState:
    """The past of a video, one `LayerState` a layer: its size does not depend on its length.

    A model reads it while a block is denoised and writes it once, when the block is clean. There is
    one for each prompt that runs beside another: two under classifier-free guidance.
    """

    def __init__(self) -> None:
        self._layers: tuple[LayerState, ...] = ()
        self._frozen = False

    @property
    def frames(self) -> int:
        """Frames of the past, in tokens of time."""
        return self._layers[0].frames if self._layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (t for layer in self._layers for t in _tensors(layer).values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def read(self) -> tuple[LayerState, ...]:
        """The state of every layer; none before the first block."""
        return self._layers

    def commit(self, layers: Sequence[LayerState]) -> None:
        """Take over the states after a block, all or none.

        Views are copied, so that no block stays alive behind one. Gradients, where they are on,
        go through.

        Raises:
            RuntimeError: the state is frozen.
            ValueError: another number of layers.
        """
        self._check_writable()
        if self._layers and len(layers) != len(self._layers):
            raise ValueError(f"layers: got {len(layers)}, expected {len(self._layers)}")
        self._layers = tuple(owned(layer) for layer in layers)

    @contextmanager
    def frozen(self) -> Iterator[StreamState]:
        """Within, whatever would write raises: for the noisy steps of a block."""
        before, self._frozen = self._frozen, True
        try:
            yield self
        finally:
            self._frozen = before

    def reset(self) -> None:
        """Forget the past.

        Raises:
            RuntimeError: the state is frozen.
        """
        self._check_writable()
        self._layers = ()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StreamState:
        """Move all tensors, in place; the dtype is not that of the scan's state, a float32 sum.

        Raises:
            RuntimeError: the state is frozen.
        """
        self._check_writable()

        def moved(name: str, t: Tensor) -> Tensor:
            return t.to(device=device, dtype=None if name == "ssm" else dtype)

        self._layers = tuple(_changed(layer, moved) for layer in self._layers)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name, as safetensors takes them."""
        flat = {
            f"layers.{i}.{name}": t
            for i, layer in enumerate(self._layers)
            for name, t in _tensors(layer).items()
        }
        return flat | {"frames": torch.tensor([self.frames, len(self._layers)])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; nothing changes on an error.

        Raises:
            RuntimeError: the state is frozen.
            ValueError: a name is missing or there is one too many.
        """
        self._check_writable()
        if "frames" not in state:
            raise ValueError(f"state: misses frames, it has {sorted(state)}")
        frames, count = (int(n) for n in state["frames"])
        known = {f"layers.{i}.{name}" for i in range(count) for name in _TENSORS} | {"frames"}
        unknown = sorted(set(state) - known)
        if unknown:
            raise ValueError(f"state: unexpected {', '.join(unknown)}; it has {count} layers")
        present = [
            {name for name in _TENSORS if f"layers.{i}.{name}" in state} for i in range(count)
        ]
        lacking = [i for i in range(count) if present[i] != set().union(*present)]
        if lacking:
            raise ValueError(f"state: layers {lacking} miss tensors that others have")
        self._layers = tuple(
            LayerState(frames, *(state.get(f"layers.{i}.{name}") for name in _TENSORS))
            for i in range(count)
        )

    def _check_writable(self) -> None:
        if self._frozen:
            raise RuntimeError("the state is frozen: a block is being denoised, commit it after")


def _tensors(layer: LayerState) -> dict[str, Tensor]:
    return {name: t for name in _TENSORS if (t := getattr(layer, name)) is not None}


def owned(layer: LayerState) -> LayerState:
    """A state that keeps alive no more than its own numbers; where it is none yet, copied."""

    def copied(name: str, t: Tensor) -> Tensor:
        alone = t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes
        return t if alone else t.clone(memory_format=torch.contiguous_format)

    return _changed(layer, copied)


def _changed(layer: LayerState, change: Callable[[str, Tensor], Tensor]) -> LayerState:
    tensors = _tensors(layer)
    kept = (change(name, tensors[name]) if name in tensors else None for name in _TENSORS)
    return LayerState(layer.frames, *kept)
