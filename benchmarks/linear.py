"""Linear attention at C = 320 and 8 heads against the LinFusion authors' eager formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Row, compare, in_turns
from linfusion.kernels import linear_attention

HEADS, CHANNELS = 8, 320
TOKENS = (1024, 4096, 16384, 65536)
DTYPES = (torch.float32, torch.bfloat16)


def authors_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Steps 2 to 7 of the authors' forward in the working dtype, on projections [B, N, C]."""
    b, n, c = q.shape

    def split(x: Tensor) -> Tensor:  # diffusers' head_to_batch_dim
        x = x.reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3)
        return x.reshape(b * HEADS, n, c // HEADS)

    q, k, v = split(q), split(k), split(v)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-4
    s = (k.transpose(-2, -1) * n**-0.5) @ (v * n**-0.5)
    o = q @ s / z
    return o.reshape(b, HEADS, n, c // HEADS).permute(0, 2, 1, 3).reshape(b, n, c)


def our_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same through `linear_attention`."""
    heads = (x.unflatten(-1, (HEADS, -1)) for x in (q, k, v))
    return linear_attention(*heads).flatten(2)


class AuthorsLayer(nn.Module):
    """The authors' whole attention layer: projections, both MLPs and their eager formula."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def mlp() -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(channels, channels),
                nn.LayerNorm(channels),
                nn.LeakyReLU(inplace=True),
                nn.Linear(channels, channels),
            )

        self.to_q_, self.to_k_ = mlp(), mlp()
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(channels, channels, bias=False) for _ in range(3)
        )
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        q, k = self.to_q(x + self.to_q_(x)), self.to_k(x + self.to_k_(x))
        return self.to_out(authors_core(q, k, self.to_v(x)))


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    """The authors' layer, ours with the same weights, and ours fused."""
    from diffusers.models.attention_processor import Attention

    from linfusion.attention.linfusion.feature_map import FeatureMap
    from linfusion.attention.linfusion.fused import FusedLayer
    from linfusion.attention.linfusion.processor import LinFusionProcessor

    torch.manual_seed(0)
    authors = AuthorsLayer(CHANNELS)
    attn = Attention(CHANNELS, heads=HEADS, dim_head=CHANNELS // HEADS)
    attn.set_processor(LinFusionProcessor())
    child = FeatureMap(CHANNELS)
    for name in ("to_q", "to_k", "to_v"):
        getattr(attn, name).load_state_dict(getattr(authors, name).state_dict())
    attn.to_out[0].load_state_dict(authors.to_out.state_dict())
    for ours, theirs in ((child.map_q, authors.to_q_), (child.map_k, authors.to_k_)):
        for part, index in (("first", 0), ("norm", 1), ("last", 3)):
            getattr(ours, part).load_state_dict(theirs[index].state_dict())
    attn.linfusion = child
    fused = FusedLayer(attn, child, dtype)
    return {"authors": authors.to(dtype), "linfusion": attn.to(dtype), "linfusion+fuse": fused}


def _error(x: Tensor, truth: Tensor) -> float:
    return ((x.double() - truth).norm() / truth.norm()).item()


def core() -> Iterator[list[Row]]:
    """The attention alone, projections given."""
    for dtype in DTYPES:
        for tokens in TOKENS:
            torch.manual_seed(0)
            x = torch.randn(3, 1, tokens, CHANNELS).to(dtype)
            rivals = {"authors": authors_core, "blocked": our_core}
            truth = authors_core(*x.double())
            errors = {name: _error(f(*x), truth) for name, f in rivals.items()}
            runs = {name: lambda f=f, x=x: f(*x) for name, f in rivals.items()}
            turns = 25 if tokens <= 4096 else 9
            yield compare("core", tokens, dtype, runs, runs=turns, errors=errors)


def layer() -> Iterator[list[Row]]:
    """The whole layer: projections, learned map, attention."""
    for dtype in DTYPES:
        modules = layers(dtype)
        for tokens in TOKENS:
            torch.manual_seed(0)
            x = torch.randn(1, tokens, CHANNELS).to(dtype)
            runs = {name: lambda m=m, x=x: m(x) for name, m in modules.items()}
            yield compare("layer", tokens, dtype, runs, runs=15 if tokens <= 4096 else 7)


def scaling() -> Iterator[list[Row]]:
    """Time per token as tokens grow: `speedup` is against the per-token time of the shortest.

    The lengths run in turns, so that a machine that slows down slows all of them.
    """
    for dtype in DTYPES:
        runs: dict[int, Callable[[], object]] = {}
        for tokens in (16384, 65536, 262144):
            torch.manual_seed(0)
            x = torch.randn(3, 1, tokens, CHANNELS).to(dtype)
            runs[tokens] = partial(our_core, *x)
        rows = in_turns("scaling", dtype, "blocked", runs, runs=9)
        per_token = [row.ms / row.size for row in rows]
        for row, cost in zip(rows, per_token, strict=True):
            row.speedup = round(per_token[0] / cost, 2)
        yield rows
