"""Both scans as users call them: every argument is checked here, before any work is done."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linfusion.kernels.library import without_autocast
from linfusion.kernels.ssd import reference
from linfusion.kernels.ssd.arguments import (
    check_bool,
    check_count,
    check_inputs,
    check_shape,
    checked_limit,
    gated,
    implementation_for,
    skip_of,
    steps_of,
)
from linfusion.kernels.ssd.bidirectional import ops
from linfusion.kernels.ssd.common import accumulator


def ssd_bidirectional(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int,
    dt_b: Tensor | None = None,
    A_b: Tensor | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_bias_b: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    impl: str | None = None,
) -> Tensor:
    """The sum of a scan and of a scan from the last token to the first, of the same x, B and C.

    y = ssd_scan(x, dt, A, B, C) + ssd_scan(x, dt_b, A_b, B, C, reverse=True), for layers whose
    directions share a convolution (a quasiseparable mixer: Hwang et al. 2024, Hydra,
    arXiv:2407.09941, section 3). The products C Bᵀ of a chunk are computed once, their lower
    triangle decays forward and their upper one backward. Both scans contain the token itself.

    States, decays and sums are float32 (float64 for float64 inputs). Tensors are taken in the
    dtypes they have, also under autocast.

    Args:
        x: tokens, [B, L, H, P], any strides.
        dt: steps of the forward direction before bias and softplus, [B, L, H].
        A: of each head forward, [H], at most 0 for a decay.
        B, C: keys and queries of the state, [B, L, G, N]; G divides H.
        chunk_size: as for `ssd_scan`.
        dt_b, A_b: of the backward direction, in the shapes of dt and A; None takes dt and A.
        D: of the skip connection, [H] or [H, P]; it counts once, not once a direction.
        z: gate of the sum, [B, L, H, P].
        dt_bias: added to dt, [H].
        dt_bias_b: added to dt_b, [H]; None takes dt_bias.
        dt_softplus, dt_limit: of both directions, as for `ssd_scan`.
        impl: as for `ssd_scan`. The backward pass of "triton" is that of two scans.

    Returns:
        y [B, L, H, P] in the dtype of x, contiguous.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
        ImportError: impl="triton" without triton.
    """
    check_inputs(x, dt, A, B, C, D, z, dt_bias, ("B", "L"))
    if dt_b is not None:
        check_shape(dt_b, "dt_b", "[B, L, H]", x, tuple(dt.shape))
    for value, name in ((A_b, "A_b"), (dt_bias_b, "dt_bias_b")):
        if value is not None:
            check_shape(value, name, "[H]", x, tuple(A.shape))
    limit = checked_limit(dt_limit)
    check_count(chunk_size)
    check_bool(dt_softplus, "dt_softplus")
    dt_b, A_b = dt if dt_b is None else dt_b, A if A_b is None else A_b
    dt_bias_b = dt_bias if dt_bias_b is None else dt_bias_b
    dtype = accumulator(x, dt, A, B, C, dt_b, A_b)
    impl = implementation_for(impl, x, B, dtype)

    with without_autocast(x.device):
        forward = steps_of(dt, dt_bias, dt_softplus, limit, dtype)
        backward = steps_of(dt_b, dt_bias_b, dt_softplus, limit, dtype)
        skip = None if D is None else skip_of(D, x).expand(x.shape[0], *x.shape[2:])
        decays = forward * A.to(dtype), backward * A_b.to(dtype)
        if impl == "reference":
            x_ = x.to(dtype)  # rounded once, not once a direction
            y, _ = reference.scan(x_, forward, decays[0], B, C, skip, None, None, False)
            other, _ = reference.scan(x_, backward, decays[1], B, C, None, None, None, True)
            y = (y + other).to(x.dtype)
        else:
            steps, log_decays = torch.stack([forward, backward], -1), torch.stack(decays, -1)
            y = ops.ssd_bidirectional(x, steps, log_decays, B, C, skip, chunk_size, impl)
        return y if z is None else gated(y, z, dtype)
