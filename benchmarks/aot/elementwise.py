"""What surrounds a product, in the ahead-of-time gate: norms, rotations, gates, convolutions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.aot.chips import COLUMNS, RULE, Chip, Report, target_of

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

# Of a tile: rows, channels or columns.
TILE = ("BR", "BT", "BC", "BD")
HEAD_DIMS = (64, 128)
# Loads of two bytes that may be: a norm's weight, whose columns are fewer than the threads.
NARROW = 1
BATCH, TOKENS, HEADS = 2, 16384, 10
TAPS = 4  # of a convolution
LONG = ("X", "DY", "DX", "OUT", "OUT_B", "DY_B", "G", "G_B", "OTHER", "Z", "DZ")


def launches(chip: Chip, d: int, dtype: str) -> list[tuple[str, Launch]]:
    """Every operator, forward and backward; norms of all channels and of a head."""
    import torch

    from linfusion.kernels.elementwise import triton as kernels
    from linfusion.kernels.elementwise import triton_conv, triton_gate

    one = getattr(torch, dtype)

    def empty(*shape: int, dtype: torch.dtype = one) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    collected: list[Launch] = []
    target = target_of(chip, collected)
    x, weight, bias = empty(BATCH, TOKENS, HEADS * d), empty(HEADS * d), empty(HEADS * d)
    y = kernels.norm_leaky_relu(x, weight, bias, 1e-5, 0.01, target=target)
    kernels.norm_leaky_relu_backward(y, x, weight, bias, 1e-5, 0.01, target=target)
    x, weight = empty(BATCH, TOKENS, HEADS, d), empty(d)
    cos, sin = (empty(TOKENS, d, dtype=torch.float32) for _ in range(2))
    y = kernels.rotary_rms_norm(x, weight, cos, sin, 1e-6, target=target)
    kernels.rotary_rms_norm_backward(y, x, weight, cos, sin, 1e-6, target=target)
    channels = HEADS * d
    x = empty(BATCH, TOKENS, 4 * channels)[..., :channels]
    filters = (empty(channels, TAPS), empty(channels)) * 2
    y, y_b = triton_conv.directional_conv(x, *filters, 0, True, target=target)
    triton_conv.directional_conv_backward(y, y_b, x, *filters, 0, True, target=target)
    wide, weight = y[:, :, None], empty(1, channels)
    tensors = wide, y_b[:, :, None], x[:, :, None], weight
    triton_gate.gated_rms_norm(*tensors, 1e-5, 1.0, False, target=target)
    triton_gate.gated_rms_norm_backward(wide, *tensors, 1e-5, 1.0, False, target=target)
    return [(launch.kernel.__name__, launch) for launch in collected]


def traffic(launch: Launch) -> tuple[int, int, int]:
    """Bytes of HBM, issued (as many) and of tensors as long as the tokens; see `Report`."""
    size = {
        name: x.numel() * x.element_size()
        for name, x in launch.args.items()
        if hasattr(x, "data_ptr")
    }
    hbm = sum(size.values())
    return hbm, hbm, sum(size.get(name, 0) for name in LONG)


def section(reports: list[Report]) -> list[str]:
    """The lines of the page; `reports` are those of `launches`."""
    lines = [
        "",
        "# Norms, activations, rotations, gates and convolutions",
        "",
        f"Bytes for batch {BATCH}, {TOKENS} tokens, {HEADS} heads; a norm with an activation is "
        "over the channels of all heads, as one with a gate is, and one with a rotation over "
        "those of a head; convolutions are of both directions. *Tile* is rows × channels, warps "
        "and pipeline stages. *HBM* counts every tensor of the launch once, "
        "relative to those as long as the tokens.",
    ]
    for chip in dict.fromkeys(r.chip for r in reports):
        lines += ["", f"## {chip}, elementwise", "", f"{COLUMNS} HBM |", f"{RULE} --- |"]
        for r in (r for r in reports if r.chip == chip):
            lines.append(f"{r.cells()} {r.hbm / r.minimum:.2f} |")
    return lines
