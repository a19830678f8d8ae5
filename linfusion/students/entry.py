"""One layer of a checkpoint: what its config says of it, and what holds its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from linfusion.attention.method import Method, channels_of, head_dim_of, heads_of
from linfusion.layers.difference import LowRank
from linfusion.layers.projections import projections


@dataclass(frozen=True)
class Entry:
    """One layer of a checkpoint's `modules_list`."""

    path: str
    dim: int
    heads: int
    setting: Any
    inner_dim: int
    bias: bool
    out: bool = True
    linears: dict[str, tuple[int, int, bool]] | None = None  # where they are not as above say

    @property
    def query_dim(self) -> int:
        """As an attention layer calls `dim`."""
        return self.dim

    @classmethod
    def read(cls, item: Mapping[str, Any] | Sequence[Any], setting_key: str) -> Entry:
        """From the published object form, or from the older list form [name, dim, heads]."""
        entry = None
        if isinstance(item, Mapping) and {"module_name", "dim_n", "heads"} <= set(item):
            dim = item["dim_n"]
            entry = cls(
                path=item["module_name"],
                dim=dim,
                heads=item["heads"],
                setting=item.get(setting_key),
                inner_dim=item.get("inner_dim", dim),
                bias=item.get("bias", False),
                out=item.get("out", True),
                linears=_shapes(item.get("projections")),
            )
        elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 3:
            path, dim, heads = item
            entry = cls(path, dim, heads, None, dim, False)
        if entry and entry.is_plausible:
            return entry
        raise ValueError(
            "modules_list: expected objects with module_name, dim_n and heads, or lists"
            f" [name, dim, heads]; got {item!r}"
        )

    @property
    def is_plausible(self) -> bool:
        """Whether it says of a layer what can be."""
        named = isinstance(self.path, str) and all(self.path.split("."))
        counts = (self.dim, self.heads, self.inner_dim)
        return (
            named
            and all(type(n) is int and n > 0 for n in counts)
            and {type(self.bias), type(self.out)} == {bool}
        )

    @classmethod
    def of(cls, path: str, attn: Any, setting: Any) -> Entry:
        """Of a layer of a model."""
        linears = projections(attn)
        heads = heads_of(attn)
        entry = cls(
            path=path,
            dim=channels_of(attn),
            heads=heads,
            setting=setting,
            inner_dim=heads * head_dim_of(attn),
            bias="to_q" in linears and linears["to_q"].bias is not None,
            out="to_out.0" in linears,
        )
        shapes = {
            name: (x.in_features, x.out_features, x.bias is not None) for name, x in linears.items()
        }
        return entry if shapes == entry.shapes else replace(entry, linears=shapes)

    @property
    def shapes(self) -> dict[str, tuple[int, int, bool]]:
        """Channels in and out of every projection, and whether it has a bias."""
        if self.linears is not None:
            return self.linears
        found = dict.fromkeys(("to_q", "to_k", "to_v"), (self.dim, self.inner_dim, self.bias))
        return found | ({"to_out.0": (self.inner_dim, self.dim, True)} if self.out else {})

    def to_dict(self, setting_key: str) -> dict[str, Any]:
        """The published form; our further keys only where they say something."""
        item: dict[str, Any] = {
            "dim_n": self.dim,
            "heads": self.heads,
            "module_name": self.path,
            setting_key: self.setting,
        }
        if self.inner_dim != self.dim:
            item["inner_dim"] = self.inner_dim
        if self.bias:
            item["bias"] = True
        if not self.out:
            item["out"] = False
        if self.linears is not None:
            item["projections"] = {name: list(shape) for name, shape in self.linears.items()}
        return item


def _shapes(stored: Any) -> dict[str, tuple[int, int, bool]] | None:
    if stored is None:
        return None
    return {name: (inputs, outputs, bias) for name, (inputs, outputs, bias) in stored.items()}


def holder(
    entry: Entry, mechanism: Method, *, attention_weights: bool, rank: int | None
) -> nn.Module:
    """A module with the tensors of one layer, under the names they have on a layer of ours."""
    layer = nn.Module()
    layer.add_module(mechanism.name, mechanism.child(entry, entry.setting))
    if attention_weights:
        linear: Any = nn.Linear if rank is None else partial(LowRank, rank=rank)
        for name, (inputs, outputs, bias) in entry.shapes.items():
            made = linear(inputs, outputs, bias=bias)
            if name == "to_out.0":
                layer.to_out = nn.ModuleList([made])
            else:
                layer.add_module(name, made)
    return layer


def place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` below `root` at a dotted path."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(name, module)
