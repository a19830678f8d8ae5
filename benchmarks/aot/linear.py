"""Linear attention in the ahead-of-time gate: its launches, what they move, its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.aot.chips import CHIPS, COLUMNS, RULE, Chip, Report, target_of

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

# Of a tile: tokens, columns of q or k, columns of v.
TILE = ("BN", "BD", "BE", "BLOCK")
LIT = 576  # columns of a head of DiT-XL/2 with LiT's two heads, whose feature map is another
# A 1024-pixel image at the first level of Stable Diffusion 1.5, with guidance.
BATCH, TOKENS, HEADS = 2, 16384, 8


def launches(chip: Chip, d: int, dtype: str) -> list[tuple[str, Launch]]:
    """Every different launch of a forward and backward pass, with and without key weights."""
    import torch

    from linfusion.kernels.linear_attention import triton as kernels
    from linfusion.kernels.linear_attention.common import Choices

    collected: list[Launch] = []
    target = target_of(chip, collected)
    one = getattr(torch, dtype)
    q, k, v, do = (torch.empty(BATCH, TOKENS, HEADS, d, dtype=one, device="meta") for _ in range(4))
    choices = Choices("relu_eps", "mean", 1e-6) if d == LIT else Choices("elu1", "mean", 1e-4)
    for key_weight in (None, torch.empty(BATCH, TOKENS, device="meta")):
        state = kernels.state_forward(k, v, key_weight, choices.feature_map, target=target)
        kernels.read_forward(q, state, choices, one, target=target)
        kernels.attention_backward(do, q, k, v, key_weight, state, choices, target=target)
    different: dict[str, tuple[str, Launch]] = {}
    for launch in collected:
        constants = {n: v for n, v in launch.args.items() if not isinstance(v, torch.Tensor)}
        name = launch.kernel.__name__ + (", weighted" if launch.args.get("WEIGHTED") else "")
        different.setdefault(f"{name} {constants}", (name, launch))
    return list(different.values())


def traffic(launch: Launch) -> tuple[int, int, int]:
    """Bytes of HBM, issued and at least needed by one launch; see `Report`."""
    a = launch.args
    tensors = {name: x for name, x in a.items() if hasattr(x, "data_ptr")}
    size = {name: x.numel() * x.element_size() for name, x in tensors.items()}
    hbm = sum(size[name] for name in {id(x): name for name, x in tensors.items()}.values())
    long = ("Q", "K", "V", "DO", "OUT", "DQ", "DK", "DV_OUT")
    minimum = sum(size[name] for name in long if name in size)
    if "BD" not in a:
        return hbm, hbm, 0
    d_tiles, e_tiles = -(-a["D"] // a["BD"]), -(-a["DV"] // a["BE"])
    states = launch.programs * (a["D"] * a["DV"] + a["D"]) * 4  # one state a program
    times = {  # how often the programs read each long tensor, and the states
        "linear_state_fwd": ({"K": e_tiles, "V": d_tiles}, 0),
        "linear_out_fwd": ({"Q": e_tiles}, 1),
        "linear_bwd_q": ({}, 1),
        "linear_bwd_q_rows": (
            {"Q": 1 + (d_tiles > 1), "DO": d_tiles * (1 + (d_tiles > 1))},
            1 + (d_tiles > 1),
        ),
        "linear_bwd_kv": ({"K": 1 + e_tiles, "V": d_tiles}, 2),
    }
    repeats, state_reads = times[launch.kernel.__name__]
    again = sum(size[name] * (count - 1) for name, count in repeats.items())
    return hbm, hbm + again + states * state_reads, minimum


def section(reports: list[Report]) -> list[str]:
    """The lines of the page; `reports` are those of `launches`."""
    lines = [
        "",
        "# Linear attention",
        "",
        f"Feature map elu + 1, mean normaliser; bytes for batch {BATCH}, {TOKENS} tokens, {HEADS} "
        "heads. *Tile* is tokens × columns of q or k × columns of v, warps and pipeline stages. "
        "*HBM* counts every tensor of the launch once, *issued* every load and store of its "
        "programs, re-reads from cache included; both are relative to the bytes of q, k, v, o and "
        "their gradients that the kernel has to touch.",
        "",
        "## Bytes of a whole pass",
        "",
        "Relative to the algorithm's minimum: 4 passes over a tensor of the size of q forward "
        "(read k, v, q; write o), 7 backward (read q, do, k, v; write dq, dk, dv).",
        "",
        "| chip | dtype | D | forward HBM | forward issued | backward HBM | backward issued |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (chip, dtype, d), group in _grouped(reports).items():
        unit = BATCH * TOKENS * HEADS * d * (4 if dtype == "float32" else 2)
        forward, backward = _passes(group)
        ratios = (
            total / (units * unit)
            for kernels, units in ((forward, 4), (backward, 7))
            for total in (sum(r.hbm for r in kernels), sum(r.issued for r in kernels))
        )
        lines.append(f"| {chip} | {dtype} | {d} | " + " | ".join(f"{x:.2f}" for x in ratios) + " |")
    for chip in dict.fromkeys(r.chip for r in reports):
        lines += [
            "",
            f"## {chip}",
            "",
            f"Shared memory limit {CHIPS[chip].shared} bytes.",
            "",
            f"{COLUMNS} HBM | issued |",
            f"{RULE} --- | --- |",
        ]
        for r in (r for r in reports if r.chip == chip):
            hbm, issued = (f"{x / r.minimum:.2f}" if r.minimum else "–" for x in (r.hbm, r.issued))
            lines.append(f"{r.cells()} {hbm} | {issued} |")
    return lines


def _grouped(reports: list[Report]) -> dict[tuple[str, str, int | str], list[Report]]:
    groups: dict[tuple[str, str, int | str], list[Report]] = {}
    for r in reports:
        groups.setdefault((r.chip, r.dtype, r.d), []).append(r)
    return groups


def _passes(group: list[Report]) -> tuple[list[Report], list[Report]]:
    """The launches of a forward and of a backward pass without key weights."""
    named = {r.kernel: r for r in reversed(group)}
    reduce = named["linear_state_reduce"]
    forward = [named["linear_state_fwd"], reduce, named["linear_out_fwd"]]
    backward = [reduce, named["linear_bwd_kv"]]
    if "linear_bwd_q" in named:
        backward.append(named["linear_bwd_q"])
    else:
        backward += [named["linear_bwd_q_rows"], named["linear_state_fwd, weighted"]]
    return forward, backward
