"""The fused elementwise operators as users call them: every argument is checked here."""

from __future__ import annotations

import torch
from torch import Tensor

from linfusion.kernels.common import accumulator, check_device, check_tensor, implementation
from linfusion.kernels.elementwise import ops, reference

WIDEST = {
    "norm_leaky_relu": 8192,
    "rotary_rms_norm": 1024,
    "gated_rms_norm": 8192,
}  # channels: a row is held at once


def one_pass(x: Tensor) -> bool:
    """Whether these kernels are the faster way for x: eager, on a GPU that takes Triton's.

    `torch.compile` fuses what they fuse, and more; a tensor that stands for another goes through
    operators that it knows; autocast has its own dtypes.
    """
    if type(x) is not Tensor or x.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cuda"):
        return False
    return implementation(None, x, accumulator(x), lambda: None) == "triton"


def norm_leaky_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    slope: float = 0.01,
    impl: str | None = None,
) -> Tensor:
    """lrelu(LN(x)) over the channels, in one pass: `layer_norm` and `leaky_relu` take two.

    Args:
        x: [..., C], any strides.
        weight, bias: of the LayerNorm, [C].
        eps: added to the variance.
        slope: of leaky ReLU below 0.
        impl: "reference" or "blocked" (the two operators of torch), "triton" (CUDA, ROCm). None
            takes "triton" on a GPU that has it and "blocked" elsewhere.

    Returns:
        [..., C] in the dtype of x, contiguous.

    Raises:
        ValueError: an argument has a wrong rank, shape, dtype or device; the message names it.
        ImportError: impl="triton" without triton.
    """
    check_tensor(x, "x", "[..., C]")
    _check_channels(weight, "weight", x)
    _check_channels(bias, "bias", x)
    impl = _implementation("norm_leaky_relu", impl, x)
    if impl != "triton":
        return reference.norm_leaky_relu(x, weight, bias, eps, slope).contiguous()
    return ops.norm_leaky_relu(x, weight, bias, float(eps), float(slope))


def rotary_rms_norm(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    impl: str | None = None,
) -> Tensor:
    """RMSNorm of queries or keys and their rotary embedding, in one pass.

    y = x / √(mean x² + ε) · w,  out_2i = y_2i cos_2i - y_2i+1 sin_2i,
    out_2i+1 = y_2i+1 cos_2i+1 + y_2i sin_2i+1, as FLUX has it (diffusers' `apply_rotary_emb` with
    `use_real_unbind_dim=-1` and `sequence_dim=1`).

    Args:
        x: [B, N, H, D], D even, any strides.
        weight: of the RMSNorm, [D].
        cos, sin: [N, D].
        eps: added to the mean square.
        impl: as for `norm_leaky_relu`.

    Returns:
        [B, N, H, D] in the dtype of x, contiguous.

    Raises:
        ValueError, ImportError: as `norm_leaky_relu`.
    """
    check_tensor(x, "x", "[B, N, H, D]")
    if x.shape[3] % 2:
        raise ValueError(f"x: expected an even number of channels, got shape {tuple(x.shape)}")
    _check_channels(weight, "weight", x)
    for table, name in ((cos, "cos"), (sin, "sin")):
        check_tensor(table, name, "[N, D]")
        if table.shape != (x.shape[1], x.shape[3]):
            raise ValueError(
                f"{name}: expected [N, D] = {(x.shape[1], x.shape[3])} as in x, got "
                f"{tuple(table.shape)}"
            )
        check_device(table, name, x, "x")
    impl = _implementation("rotary_rms_norm", impl, x)
    if impl != "triton":
        return reference.rotary_rms_norm(x, weight, cos, sin, eps).contiguous()
    return ops.rotary_rms_norm(x, weight, cos, sin, float(eps))


Filters = tuple[Tensor, Tensor | None]


def directional_conv(
    x: Tensor,
    forward: Filters | None,
    backward: Filters | None,
    *,
    first: int = 0,
    silu: bool = True,
    impl: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """A short filter of every channel along the tokens, in one or both directions, and SiLU.

    The forward direction sees a token and those before it, the backward one reads the leading
    `first` tokens from the last of them to the first one, then the others in the same way. What it
    gives is in the order [first, ..., L - 1, 0, ..., first - 1], for `ssd_scan(reverse=True)`.

    Args:
        x: [B, L, C], any strides.
        forward, backward: of each direction the weight [C, taps], with as many taps in both, and
            the bias [C] or None. None: there is no such direction.
        first: leading tokens, 0 to L - 1.
        silu: whether SiLU follows.
        impl: as for `norm_leaky_relu`.

    Returns:
        Of each direction [B, L, C] in the dtype of x, contiguous, or None.

    Raises:
        ValueError, ImportError: as `norm_leaky_relu`.
    """
    check_tensor(x, "x", "[B, L, C]")
    if forward is None and backward is None:
        raise ValueError("forward: got None with backward None, expected filters of one of them")
    taps = (forward or backward)[0].shape[-1]  # type: ignore[index]
    for filters, name in ((forward, "forward"), (backward, "backward")):
        for t, shape in zip(filters or (), ((x.shape[2], taps), (x.shape[2],)), strict=False):
            if t is not None and t.shape != shape:
                raise ValueError(f"{name}: expected {shape} for x, got {tuple(t.shape)}")
            if t is not None:
                check_device(t, name, x, "x")
    if type(first) is not int or not 0 <= first < x.shape[1]:
        raise ValueError(f"first: got {first!r}, expected 0 to {x.shape[1] - 1}")
    impl = implementation(impl, x, accumulator(x), lambda: None)
    run = ops.directional_conv if impl == "triton" else reference.directional_conv
    (w, b), (w_b, b_b) = forward or (None, None), backward or (None, None)
    found = run(x, w, b, w_b, b_b, first, silu)
    return None if forward is None else found[0], None if backward is None else found[1]


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    other: Tensor | None = None,
    z: Tensor | None = None,
    eps: float = 1e-5,
    scale: float = 1.0,
    gate_last: bool = False,
    impl: str | None = None,
) -> Tensor:
    """The root-mean-square norm of a gated sum, in one pass.

    v = (x + other) · scale · silu(z),  out = v / √(mean v² + ε) · w, or with `gate_last` the gate
    comes after the norm.

    Args:
        x: [B, L, G, D], any strides; the norm is over D.
        weight: [G, D], any strides, or None for no norm.
        other: added to x, of its shape.
        z: of the gate, of the shape of x.
        eps: added to the mean square.
        scale: of the sum.
        gate_last: whether the norm comes first.
        impl: as for `norm_leaky_relu`.

    Returns:
        [B, L, G, D] in the dtype of x, contiguous.

    Raises:
        ValueError, ImportError: as `norm_leaky_relu`.
    """
    check_tensor(x, "x", "[B, L, G, D]")
    for t, name, shape in (
        (weight, "weight", x.shape[2:]),
        (other, "other", x.shape),
        (z, "z", x.shape),
    ):
        if t is not None:
            if t.shape != shape:
                raise ValueError(f"{name}: expected {tuple(shape)} for x, got {tuple(t.shape)}")
            check_device(t, name, x, "x")
    impl = _implementation("gated_rms_norm", impl, x)
    run = ops.gated_rms_norm if impl == "triton" else reference.gated_rms_norm
    return run(x, other, z, weight, float(eps), float(scale), gate_last).contiguous()


def _check_channels(t: Tensor, name: str, x: Tensor) -> None:
    check_tensor(t, name, "[C]")
    if t.shape[0] != x.shape[-1]:
        raise ValueError(f"{name}: expected [C] = ({x.shape[-1]},) as in x, got {tuple(t.shape)}")
    check_device(t, name, x, "x")


def _implementation(name: str, impl: str | None, x: Tensor) -> str:
    widest, channels = WIDEST[name], x.shape[-1]

    def unfit() -> str | None:
        if channels <= widest:
            return None
        return f"'triton' takes up to {widest} channels, got {channels}"

    return implementation(impl, x, accumulator(x), unfit)
