"""Window attention in the ahead-of-time gate: what is launched, what it moves, what the page says.

A radius is no constant of a kernel, and neither is a grid: one compilation serves all of them, and
the launches at r = 8, 16, 32 are checked to be the same but for their tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.aot.chips import COLUMNS, RULE, Chip, Report, target_of

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

# Of a tile: tokens that a program holds, that it takes at a time, columns
# in one or two pieces.
TILE = ("BM", "BK", "BA", "BB")
HEAD_DIMS = (64, 72, 96, 128)
RADII = (8, 16, 32)
# FLUX.1 at 1024 pixels.
BATCH, GRID, HEADS, TEXT = 1, (64, 64), 24, 512


def launches(chip: Chip, d: int, dtype: str) -> list[tuple[str, Launch]]:
    """A forward and backward pass at every radius, names end in ", r=8" and so on; at one of them
    also with counted cells.

    Raises:
        RuntimeError: a radius would compile a kernel anew.
    """
    import torch

    from linfusion.kernels.window_attention import triton as kernels

    tokens = GRID[0] * GRID[1]
    one = getattr(torch, dtype)

    def empty(n: int) -> torch.Tensor:
        return torch.empty(BATCH, n, HEADS, d, dtype=one, device="meta")

    found: list[tuple[str, Launch]] = []
    constants: dict[str, dict[str, object]] = {}
    for radius in RADII:
        collected: list[Launch] = []
        target = target_of(chip, collected)
        x = (empty(tokens), empty(tokens), empty(tokens), empty(TEXT), empty(TEXT))
        choices = (GRID, float(radius), "disc", d**-0.5, False)
        o, lse = kernels.attention(*x, *choices, target=target)
        kernels.attention_backward(o, lse, *x, o, lse, *choices, target=target)
        for launch in collected:
            name = launch.kernel.__name__
            fixed = {
                p.name: launch.args[p.name] for p in launch.kernel.params if p.is_constexpr
            } | launch.options
            if constants.setdefault(name, fixed) != fixed:
                raise RuntimeError(f"{name}: r={radius} compiles it anew, with {fixed}")
            found.append((f"{name}, r={radius}", launch))
    collected = []
    cells = (empty(TEXT + GRID[0] * GRID[1] // 64),) * 2
    kernels.attention(*x[:3], *cells, *choices, (8, 8), target=target_of(chip, collected))
    found += [(f"{launch.kernel.__name__}, cells, r={RADII[-1]}", launch) for launch in collected]
    return found


def traffic(launch: Launch) -> tuple[int, int, int]:
    """Bytes of HBM, issued and at least needed by one launch; see `Report`."""
    a = launch.args
    size = {name: x.numel() * x.element_size() for name, x in a.items() if hasattr(x, "data_ptr")}
    row = a["D"] * a["Q"].element_size()
    # Tensors of the tokens that a program holds, and rows of the two tensors that it walks over.
    held = {"window_fwd": 2, "window_bwd_q": 4}.get(launch.kernel.__name__, 4)
    if launch.kernel.__name__ == "window_bwd_all":
        tokens = a["T"] * a["Y"] * a["X"]
        rows = held * BATCH * HEADS * TEXT + 2 * launch.programs * tokens
    else:
        entries = (len(a["TABLE"]) - 4 * a["tiles"]) // 2
        seen = 64 * entries + a["tiles"] * a.get("always", 0)
        rows = BATCH * HEADS * (held * a["tiles"] * 64 + 2 * (64 // a["BM"]) * seen)
    long = ("Q", "K", "V", "OUT", "DO", "DQ", "DK", "DV")
    return sum(size.values()), rows * row, sum(size[name] for name in long if name in size)


def section(reports: list[Report]) -> list[str]:
    """The lines of the page; `reports` are those of `launches`."""
    import torch

    from linfusion.kernels.window_attention.triton.lists import lists

    lines = [
        "",
        "# Window attention",
        "",
        f"Bytes for batch {BATCH}, a grid of {GRID[0]} × {GRID[1]} tokens, {TEXT} text tokens, "
        f"{HEADS} heads. *Tile* is tokens that a program holds × tokens that it takes at a time × "
        "columns, warps and pipeline stages. One compilation serves every grid and radius; "
        "*issued* is given for a disc of r = 8, 16, 32.",
        "",
        "Tiles of 8 × 8 tokens that a tile sees, on average over the grid:",
        "",
        "| r | whole | in part | keys visited | keys needed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for radius in RADII:
        tables = lists(GRID, float(radius), "disc", torch.device("cpu"))
        whole, part = tables.whole / tables.tiles, tables.part / tables.tiles
        visited = 64 * (whole + part)
        lines.append(
            f"| {radius} | {whole:.1f} | {part:.1f} | {visited:.0f} | {_needed(radius):.0f} |"
        )
    for chip in dict.fromkeys(r.chip for r in reports):
        lines += [
            "",
            f"## {chip}, window attention",
            "",
            f"{COLUMNS} HBM | issued |",
            f"{RULE} --- | --- |",
        ]
        of_kernel: dict[tuple[str, int | str, str], list[Report]] = {}
        for r in (r for r in reports if r.chip == chip):
            of_kernel.setdefault((r.dtype, r.d, r.kernel.split(", r=")[0]), []).append(r)
        for (_, _, kernel), group in of_kernel.items():
            r = group[0]
            issued = " / ".join(f"{x.issued / x.minimum:.1f}" for x in group)
            lines.append(f"{r.cells(kernel)} {r.hbm / r.minimum:.2f} | {issued} |")
    return lines


def _needed(radius: int) -> float:
    """Keys in the window of a query, on average over the grid."""
    pairs = 0
    for dy in range(-radius + 1, radius):
        for dx in range(-radius + 1, radius):
            if dy * dy + dx * dx < radius * radius:
                pairs += max(0, GRID[0] - abs(dy)) * max(0, GRID[1] - abs(dx))
    return pairs / (GRID[0] * GRID[1])
