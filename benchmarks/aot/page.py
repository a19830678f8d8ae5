"""The page of the docs that the ahead-of-time gate writes."""

from __future__ import annotations

from benchmarks.aot.chips import CHIPS, MOST_PRODUCTS, Report
from benchmarks.aot.compiled import FAMILIES, family_of

# float16 is compiled and judged as the others are; its rows would be those of bfloat16 but for a
# register here and there.
SHOWN = ("bfloat16", "float32")


def page(reports: list[Report]) -> str:
    """What the compiler made of every kernel, chip by chip."""
    import triton

    lines = [
        "# Kernels, compiled ahead of time",
        "",
        f"`make aot` writes this page. It compiles each Triton kernel for {len(CHIPS)} GPUs "
        "without having one, and fails on a spilled register, on shared memory above the chip's "
        f"limit, on more than {MOST_PRODUCTS} products of the tensor cores for each that a kernel "
        "needs, and on 2-byte loads of q, k, v and of x, B, C.",
        "",
        "**These kernels have never run on a GPU.** They are compared with the reference in "
        "Triton's interpreter, and [as compiled, in an emulator](kernels-ptx.md); their speed is "
        "unknown, and nothing on this page is a time.",
        "",
        f"Triton {triton.__version__}; bfloat16 and float32 are shown, float16 is judged as well. "
        "*Products* are those that tensor cores execute over those needed: warps that no part of "
        "a tile is left for repeat what others do.",
        "",
        "| chip | kernels compiled | with a problem | most registers | most shared memory, of "
        "| most products |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for chip, about in CHIPS.items():
        of_chip = [r for r in reports if r.chip == chip]
        if not of_chip:
            continue
        bad = sum(bool(r.problems()) for r in of_chip)
        lines.append(
            f"| {chip} | {len(of_chip)} | {bad if about.launched else f'{bad}: blocked form there'}"
            f" | {max(r.registers for r in of_chip)} | {max(r.shared for r in of_chip)}, "
            f"{about.shared} | {max(r.products for r in of_chip):.2f} |"
        )
    lines += [
        "",
        "Where it says *blocked form there* kernels spill, so the library launches none of them "
        "and runs the blocked form, which is PyTorch's own operations.",
    ]
    shown = [r for r in reports if r.dtype in SHOWN]
    for family in dict.fromkeys(FAMILIES.values()):
        lines += family.section([r for r in shown if family_of(r.kernel) is family])
    return "\n".join(lines) + "\n"
