"""A LinFusion layer for inference: one GEMM over x, and on a CPU W_O folded into the state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linfusion.attention.linfusion.feature_map import ResidualMLP
from linfusion.kernels import LinearState, linear_attention, linear_read, linear_state
from linfusion.kernels.library import autocasts, without_autocast
from linfusion.kernels.linear_attention import blocked_bf16
from linfusion.kernels.linear_attention.common import Choices

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

    from linfusion.attention.linfusion.feature_map import FeatureMap

_EPS = 1e-4
_READ = Choices("elu1", "mean", _EPS)
# Tokens at a time of a picture in float32, and twice as many in half of it: what is between x and
# the output then stays in a CPU's cache.
_BLOCK = 1024


class FoldedOut(nn.Linear):
    """W_O, applied to tokens or to a state.

    A Linear, so that offloading and casting treat it as one.
    """

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """o [B, N, H·E] -> [B, N, C]; S [B, H, D, E] -> (G [B, H·D, C], bias), G_h = S_h W_O,h."""
        if x.ndim == 3:
            return super().forward(x)
        weight = self.weight.to(x.dtype).view(-1, x.shape[1], x.shape[3])  # [C, H, E]
        with without_autocast(x.device):  # a state is float32
            g = torch.einsum("bhde,che->bhdc", x, weight).flatten(1, 2)
        return g.to(self.weight.dtype), self.bias


class AddedLinear(nn.Linear):
    """onto + W x, over `onto` where no gradient is wanted; a Linear so as to be offloaded."""

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:  # type: ignore[override]
        """[T, m], [T, C] -> [T, C]."""
        # Autocast casts for the first, and not for the second.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return torch.addmm(onto, x, self.weight.t())
        return onto.addmm_(x, self.weight.t())


class FusedLayer(nn.Module):
    """What `fuse` makes of an attention layer and its learned map; equal within rounding.

    With q = W_q(x + W₃a + b₃) = W_q x + (W_q W₃)a + W_q b₃, where a = lrelu(LN(W₀x + b₀)), all of
    W_q, W_k, W_v and both W₀ read x at once, and W_q W₃ is multiplied ahead of time. The output is
    out_i = Σ_h φ(q_ih)/z_ih · (S_h W_O,h) + b, so that o is never written; on a GPU, where that
    would be more passes over memory, it is W_O o_i + b.

    Args:
        attn: the layer, with plain nn.Linear projections.
        child: its `FeatureMap`, or None.
        dtype: what the model computes in.
    """

    def __init__(self, attn: Attention, child: FeatureMap | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = attn.heads
        device = attn.to_q.weight.device
        with torch.no_grad():
            q = _Affine(attn.to_q, None if child is None else child.map_q)
            k = _Affine(attn.to_k, None if child is None else child.map_k)
            v = _Affine(attn.to_v, None)
            parts = [q.direct, k.direct, v.direct, *q.hidden, *k.hidden]
            self.widths = [len(weight) for weight, _ in parts]
            self.read_x = _linear(parts)
            if child is not None and q.last is not None and k.last is not None:
                self.norm_q = copy.deepcopy(child.map_q.norm)
                self.norm_k = copy.deepcopy(child.map_k.norm)
                self.last_q, self.last_k = _added(q.last), _added(k.last)
            out: Any = attn.to_out[0]
            self.out = FoldedOut(out.in_features, out.out_features)
            self.out.weight.copy_(out.weight)
            self.out.bias.copy_(torch.zeros_like(self.out.bias) if out.bias is None else out.bias)
        self.to(device, dtype).requires_grad_(False).eval()
        self._made_of = {name: _seen(p) for name, p in _sources(attn)}

    def is_stale(self, attn: Attention, *, look: bool = False) -> bool:
        """Whether the layer's own weights are no longer those this was made of.

        Args:
            attn: the layer.
            look: at the numbers, too; else only where autograd counted a change.
        """
        for name, parameter in _sources(attn):
            version, dtype, total = self._made_of[name]
            if parameter.is_meta or (not look and _version(parameter) == version):
                continue  # offloaded, it waits elsewhere
            now = _seen(parameter)
            if now[1:] != (dtype, total):
                return True
            self._made_of[name] = now
        return False

    def forward(self, x: Tensor, key_weight: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, N, C], the output projection and its bias included."""
        if autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not _is_cpu(x):
            # No cache to stay in, and folding W_O would move more bytes than it saves.
            q, k, v = (self._split(t) for t in self._project(x))
            o = linear_attention(q, k, v, eps=_EPS, key_weight=key_weight)
            return self.out(o.flatten(2))
        batch, tokens, channels = x.shape
        block = max(64, _BLOCK * 4 // x.element_size() // batch)
        if torch.compiler.is_compiling():
            block = tokens  # a loop would be unrolled, once for every length
        pieces = [slice(i, min(i + block, tokens)) for i in range(0, tokens, block)]
        narrow = _narrow(x, key_weight)
        # Queries, then the output written over them, where the two have one width.
        queries = x.new_empty(batch, tokens, self.widths[0])
        state: LinearState | None = None
        for piece in pieces:
            q, k, v = self._project(x[:, piece])
            queries[:, piece] = q
            k, v = self._split(k), self._split(v)
            if narrow:
                part = blocked_bf16.state_forward(k, v, _READ.feature_map)
            else:
                weight = None if key_weight is None else key_weight[:, piece]
                part = linear_state(k, v, key_weight=weight)
            state = part if state is None else state.merge(part)
        assert state is not None
        if not narrow and tokens < channels:  # folding costs as much as `channels` tokens do
            return self.out(linear_read(self._split(queries), state, eps=_EPS).flatten(2))
        read = self._reader(state, narrow)
        same = self.out.out_features == queries.shape[-1] and not torch.is_grad_enabled()
        out = queries if same else x.new_empty(batch, tokens, self.out.out_features)
        for piece in pieces:
            out[:, piece] = read(self._split(queries[:, piece]))
        return out

    def _reader(self, state: LinearState, narrow: bool) -> Callable[[Tensor], Tensor]:
        """What queries [B, N, H, D] give: [B, N, C], the output projection included."""
        if narrow:
            return lambda q: self.out(blocked_bf16.read_forward(q, state, _READ).flatten(2))
        g, bias = self.out(state.kv)
        return lambda q: torch.baddbmm(bias, _normalized(q, state.k_mean).flatten(2).to(g.dtype), g)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # All parts are views of one product.
        q, k, v, *hidden = self.read_x(x.flatten(0, 1)).split(self.widths, dim=-1)
        if hidden:
            q = self.last_q(ResidualMLP.activated(hidden[0], self.norm_q), q)
            k = self.last_k(ResidualMLP.activated(hidden[1], self.norm_k), k)
        return q.unflatten(0, x.shape[:2]), k.unflatten(0, x.shape[:2]), v.unflatten(0, x.shape[:2])

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.heads, -1))


class _Affine:
    """W(x + f(x)) as direct(x) + last·lrelu(LN(hidden(x))): (weight, bias), in float64."""

    def __init__(self, projection: nn.Linear, mlp: ResidualMLP | None) -> None:
        weight, bias = _double(projection)
        self.direct, self.hidden = (weight, bias), []
        self.last: Tensor | None = None
        if mlp is not None and mlp.mid == -1:  # x + x
            self.direct = (2 * weight, bias)
        elif mlp is not None:
            last, last_bias = _double(mlp.last)
            self.hidden = [_double(mlp.first)]
            self.last = weight @ last
            self.direct = (weight, bias + weight @ last_bias)


def _sources(attn: Attention) -> list[tuple[str, nn.Parameter]]:
    modules: list[Any] = [attn.to_q, attn.to_k, attn.to_v]
    if attn.to_out is not None:
        modules.append(attn.to_out[0])
    return [
        (f"{index}.{name}", parameter)
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _seen(parameter: Tensor) -> tuple[int, torch.dtype, float]:
    """The version of a parameter, its dtype, and a sum that changes when a number does."""
    return _version(parameter), parameter.dtype, float(parameter.detach().double().sum())


def _double(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """On the CPU: not every device has float64."""
    weight = linear.weight.cpu().double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.cpu().double()
    return weight, bias


def _linear(parts: list[tuple[Tensor, Tensor]]) -> nn.Linear:
    """One Linear for what reads one input."""
    weight, bias = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    linear = nn.Linear(weight.shape[1], len(weight), device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    return linear


def _added(weight: Tensor) -> AddedLinear:
    linear = AddedLinear(
        weight.shape[1], len(weight), bias=False, device=weight.device, dtype=weight.dtype
    )
    linear.weight.copy_(weight)
    return linear


def _narrow(x: Tensor, key_weight: Tensor | None) -> bool:
    """Whether the kernels of `blocked_bf16` serve; what they read is cheaper not folded."""
    return _plain(x, torch.bfloat16) and key_weight is None and blocked_bf16.BF16_PRODUCTS


def _is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _plain(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether x is of that dtype, on the CPU, and nothing differentiates or traces what is done."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype == dtype and not watched


def _normalized(q: Tensor, k_mean: Tensor) -> Tensor:
    """φ(q)/(φ(q)·m + ε): [B, N, H, D], float32."""
    q = q.to(k_mean.dtype)
    phi = q.clamp(max=0).exp_() + q.clamp(min=0)
    z = torch.einsum("bnhd,bhd->bnh", phi, k_mean)[..., None] + _EPS
    return phi / z
