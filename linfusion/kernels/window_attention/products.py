"""Attention of tiles by batched products, where that beats torch's flash kernel for CPUs.

That kernel multiplies one tile at a time through MKL, which on CPUs it was not made for has no
instructions for bfloat16 and slow ones for float32. Here as many tiles as fit the caches are one
product of oneDNN, and between the products are a few sweeps over their scores. No maximum is taken
off these, as those of trained models are small; whether they were is seen from their sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

AVX512_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
LN_2 = math.log(2)
SCORES = 1 << 21  # at a time, in bytes: what the caches of two cores hold beside their factors
LEAST = 12 << 20  # bytes of queries; with fewer, little is gained, and scratch outweighs the output
# Between which sums of 2^score have lost nothing. In bfloat16, where all scores that count are then
# below 32, what their rounding took is below 1/16, and its square is no more than another rounding.
SUMS = {torch.float32: (2.0**-60, 2.0**60), torch.bfloat16: (2.0**-24, 2.0**32)}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def applies(q: Tensor, dtype: torch.dtype) -> bool:
    """Whether products in that dtype are the faster way for queries q."""
    if q.device.type != "cpu" or not AVX512_BF16 or AMX or q.nbytes < LEAST:
        return False
    return dtype == torch.bfloat16


class Products:
    """Softmax attention, with scratch that is allocated once.

    What its methods return is float32, and None where scores are too large or too small for them.
    """

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        self.alpha, self.dtype = scale / LN_2, dtype
        self._bias: Tensor | None = None
        self._scratch: dict[str, Tensor] = {}

    def of_tiles(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Of q [h, n, q, D] over k, v [h, n, K, D], with a bias [q, K] of 0 and -inf.

        Returns:
            Output [h, n, q, D] and log-sum-exp [h, n, q].
        """
        if bias is not self._bias:  # most tiles are like the one before
            seen = torch.where(bias.mT == 0, -1, 0).to(_BITS[self.dtype])
            self._bias, self._seen = bias, seen.contiguous()  # [K, q]
        heads, tiles = q.shape[:2]
        o, sums = self._results(q, v)
        step = max(1, SCORES // (bias.numel() * bias.element_size()))
        together = max(1, step // tiles)
        for i in range(0, heads, together):
            for j in range(0, tiles, step):
                part = slice(i, i + together), slice(j, j + step)
                # Overlapping tiles would be copied for every product.
                q_p, k_p = self._copied("queries", q[part]), self._copied("keys", k[part])
                p = self._weights(q_p, k_p, self._seen, sums[part].flatten(0, 1))
                v_p = self._copied("keys", v[part])  # over those
                torch.bmm(p.mT, v_p, out=o[part].flatten(0, 1))
        return _divided(o, sums)

    def of_all(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of q [h, N, D] over all of k, v [h, K, D].

        Returns:
            Output [h, N, D] and log-sum-exp [h, N].
        """
        o, sums = self._results(q, v)
        step = max(1, SCORES // (len(k) * k.shape[1] * k.element_size()))
        for j in range(0, q.shape[1], step):
            n = slice(j, j + step)
            p = self._weights(q[:, n], k, None, sums[:, n])
            torch.bmm(p.mT, v, out=o[:, n])
        return _divided(o, sums)

    def _weights(self, q: Tensor, k: Tensor, seen: Tensor | None, sums: Tensor) -> Tensor:
        """exp(scale k qᵀ) [n, K, q], 0 where a key is not seen; their sums go to sums [n, q].

        Keys come first as oneDNN packs the second of two factors, and they are more.
        """
        n, keys, queries = len(q), k.shape[1], q.shape[1]
        p = self._buffer("scores", n * keys * queries).view(n, keys, queries)
        torch.baddbmm(p, k, q.mT, beta=0, alpha=self.alpha, out=p)
        narrow = self.dtype == torch.bfloat16
        if narrow:
            # With r, what rounding took, 2^(p + r) is 2^p (1 + r ln 2).
            rest = self._buffer("rest", n * (keys + 1) * queries)
            r = rest[: p.numel()].view(p.shape).copy_(p)
            torch.baddbmm(r, k, q.mT, beta=-1, alpha=self.alpha, out=r)
            p.exp2_().addcmul_(p, r, value=LN_2)
        else:
            p.exp2_()
        if seen is not None:
            p.view(seen.dtype).bitwise_and_(seen)
        if narrow:  # half of them in float32 fit where r was; torch.sum would take as much anew
            half = -(-keys // 2)
            wide = rest[: 2 * n * half * queries].view(torch.float32).view(n, half, queries)
            torch.sum(wide.copy_(p[:, :half]), 1, out=sums)
            sums += wide[:, : keys - half].copy_(p[:, half:]).sum(1)
        else:
            torch.sum(p, 1, out=sums)
        return p

    def _results(self, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        size = q.shape[:-1]
        return q.new_empty(*size, v.shape[-1]), q.new_empty(size, dtype=torch.float32)

    def _copied(self, name: str, x: Tensor) -> Tensor:
        """[h, n, ...] as [hn, ...]."""
        return self._buffer(name, x.numel()).view(x.shape).copy_(x).flatten(0, 1)

    def _buffer(self, name: str, numel: int) -> Tensor:
        if name not in self._scratch or self._scratch[name].numel() < numel:
            self._scratch[name] = torch.empty(numel, dtype=self.dtype)
        return self._scratch[name][:numel]


def _divided(o: Tensor, sums: Tensor) -> tuple[Tensor, Tensor] | None:
    least, most = SUMS[o.dtype]
    low, high = (x.item() for x in sums.aminmax())
    if not (least < low and high < most):  # nor if one is NaN
        return None
    o = o.float().div_(sums[..., None])
    # A value that is not finite, times a weight of 0, reaches tokens that do not see it.
    return (o, sums.log_()) if math.isfinite(o.sum()) else None
