"""Hybrid attention as users call it: every argument is checked here, before any work is done."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from linfusion.kernels.hybrid_attention import ops, reference
from linfusion.kernels.hybrid_attention.parts import (
    Pair,
    check_features,
    check_weight,
    join,
    state_of,
)
from linfusion.kernels.library import without_autocast
from linfusion.kernels.window_attention import TileOrder, window_attention
from linfusion.kernels.window_attention.arguments import (
    autocast,
    check_tokens,
    checked_grid,
    checked_window,
    implementation,
)
from linfusion.kernels.window_attention.common import bounded, covers

FEATURES = 128  # the columns that a Triton program takes of features at a time


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    *,
    grid: tuple[int, int] | tuple[int, int, int],
    radius: float,
    log_weight: Tensor,
    shape: str = "disc",
    exclude: bool = True,
    rotated: Pair | None = None,
    context: Pair | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    order: TileOrder | None = None,
    impl: str | None = None,
) -> Tensor | Pair:
    """Softmax attention in a window and linear attention to the rest, in one normalisation.

    With s_ij = scale · q_i·k_j, S_i the tokens in the window of i and those of `context`, and L_i
    all other tokens of the grid,

        o_i = (Σ_{j∈S_i} exp(s_ij) v_j + w_h Σ_{j∈L_i} φ(q_i)·φ(k_j) v_j) /
              (Σ_{j∈S_i} exp(s_ij)     + w_h Σ_{j∈L_i} φ(q_i)·φ(k_j))

    This is the form of ReHyAt (arXiv 2601.04342) and Attention Surgery (arXiv 2509.24899) with two
    things made exact. They subtract the largest score c of the near part from its exponents alone,
    so that the weight of the far part depends on c, by which the implementation is chosen; here
    both parts are on one scale, as merging by log-sum-exp has it, and w_h = exp(log_weight_h) is
    learned. And far is every token that is not near: each counts once.

    Far is the sum over all tokens, one state a head, minus what the windows see of it, found as
    the windows' scores are. That second pass costs about as much as the windows do.
    `exclude=False` saves it, as SLA's released code does (arXiv 2509.24006): L_i is then the whole
    grid, and what the window sees counts twice, as itself and in the sum.

    Sums are float32 (float64 for float64 inputs). Differentiable in every tensor. Where the window
    covers the whole grid, the far part is empty and the result that of `window_attention`.

    Args:
        q, k, v: tokens of the grid, [B, N, H, D], one dtype, any strides.
        phi_q, phi_k: features φ(q), φ(k) [B, N, H, F], dtype of q. They must not be negative, which
            is not checked: a denominator that is not above 0 leaves the far part out.
        grid: (h, w) or (t, h, w), of N tokens.
        radius: of the window, in tokens, above 0; the border is outside.
        log_weight: log w_h, [H], on the device of q, floating.
        shape: "disc" or "square", as `window_attention` takes it.
        exclude: whether the far part leaves out what the window sees.
        rotated: features of the numerator (φ(q), φ(k)) [B, N, H, F] where they are not those of
            the denominator: with rotary embedding, which makes them negative (SANA-Video). With
            `exclude` it takes one more pass over the windows.
        context: keys and values [B, T, H, D] that every query sees, near: the text.
        scale: of the scores; None is D^-½.
        return_lse: also return the logarithm of the denominator, to `merge` with other keys.
        order: the tile order that all of them lie in, and the results will; None is raster order.
        impl: "reference" (dense), "blocked" (any device), "triton" (CUDA, ROCm), or None, as for
            `window_attention`.

    Returns:
        o [B, N, H, D] in the dtype of v, contiguous; with `return_lse`, (o, l) with l [B, N, H],
        natural logarithm, float32 (float64 for float64 inputs).

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype, device or value; the message names
            it, what came and what is accepted.
        ImportError: impl="triton" without triton.
    """
    tensors = (q, k, v, phi_q, phi_k)
    if has_torch_function(tensors):  # tensors that know better, as torch's own functions ask
        return handle_torch_function(
            hybrid_attention, tensors, *tensors, grid=grid, radius=radius, log_weight=log_weight,
            shape=shape, exclude=exclude, rotated=rotated, context=context, scale=scale,
            return_lse=return_lse, order=order, impl=impl,
        )  # fmt: skip
    check_tokens(q, k, v)
    size: Any = checked_grid(grid, q.shape[1])
    radius = checked_window(radius, shape)
    features = check_features(q, phi_q, phi_k, rotated)
    check_weight(log_weight, q)
    impl = implementation(impl, q)
    q, k, v, *cast = autocast(q, k, v, *features)
    phi_q, phi_k, rotated_q, rotated_k = cast
    near = window_attention(
        q, k, v, grid=size, radius=radius, shape=shape, context=context, scale=scale,
        return_lse=True, order=order, impl=impl,
    )  # fmt: skip
    if exclude and covers(size, bounded(radius, size), shape):
        return near if return_lse else near[0]
    if impl == "reference":
        if order is not None:
            v, phi_q, phi_k, rotated_q, rotated_k = map(order.undo, (v, *cast))
            near = order.undo(near[0]), order.undo(near[1])
        features = phi_q, phi_k, rotated_q, rotated_k
        with without_autocast(q.device):
            o, lse = reference.joined(v, *near, *features, log_weight, size, radius, shape, exclude)
        o, lse = (o, lse) if order is None else (order.permute(o), order.permute(lse))
        return (o, lse) if return_lse else o
    left_out = None
    if exclude:
        choices = (size, radius, shape, 1 / v.shape[1], order is not None, impl)
        num, den = _window_sum(phi_q, phi_k, v, choices)
        if rotated is not None:
            num, _ = _window_sum(rotated_q, rotated_k, v, choices)
        left_out = num, den
    state = state_of(phi_k, rotated_k, v, impl)
    o, lse = join(near, phi_q, rotated_q, state, log_weight, left_out, impl)
    return (o, lse) if return_lse else o


def _window_sum(phi_q: Tensor, phi_k: Tensor, v: Tensor, choices: Any) -> Pair:
    """As many features at a time as a program takes: a dot product is a sum of them."""
    parts = [
        ops.window_sum(a, b, v, *choices)
        for a, b in zip(phi_q.split(FEATURES, 3), phi_k.split(FEATURES, 3), strict=True)
    ]
    num, den = parts[0]
    for more, less in parts[1:]:
        num, den = num + more, den + less
    return num, den
