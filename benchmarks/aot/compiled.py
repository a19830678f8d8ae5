"""One launch, compiled as the launcher would for a GPU that is not there, and read."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from benchmarks.aot import elementwise, hybrid, linear, ssd, window
from benchmarks.aot.chips import CHIPS, Report
from benchmarks.aot.products import executed_for_each_needed
from benchmarks.compiling import compile_for

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

# By what the names of their kernels begin with.
FAMILIES = {
    "linear": linear,
    "window": window,
    "hybrid": hybrid,
    "ssd": ssd,
    "norm": elementwise,
    "rotary": elementwise,
    "conv": elementwise,
    "gated": elementwise,
}


def family_of(kernel: str) -> ModuleType:
    """The module that knows a kernel of this name."""
    return FAMILIES[kernel.partition("_")[0]]


def compile_launch(name: str, launch: Launch, chip_name: str, d: int | str, dtype: str) -> Report:
    """Compile as the launcher would, with pointers that are 16-byte aligned."""
    chip = CHIPS[chip_name]
    compiled = compile_for(launch, chip.vendor, chip.arch, chip.warp)
    asm = compiled.asm
    if chip.vendor == "cuda":
        registers, spills, mma, loads = _read_cuda(asm["cubin"], asm["ptx"])
    else:
        registers, spills, mma, loads = _read_hip(asm["amdgcn"])
    family = family_of(launch.kernel.__name__)
    hbm, issued, minimum = family.traffic(launch)
    options = launch.options
    tile = "×".join(str(launch.args[x]) for x in family.TILE if x in launch.args)
    return Report(
        chip=chip_name,
        dtype=dtype,
        d=d,
        kernel=name,
        tile=f"{tile}, {options['num_warps']}w {options['num_stages']}s",
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        mma=mma,
        products=executed_for_each_needed(asm["ttgir"]),
        loads=loads,
        hbm=hbm,
        issued=issued,
        minimum=minimum,
        narrow=getattr(family, "NARROW", 0),
    )


@cache  # launches that differ in their tables alone are one compilation
def _read_cuda(cubin: bytes, ptx: str) -> tuple[int, int, str, dict[int, int]]:
    """Registers, LDL and STL instructions, matrix instruction, loads by width."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def cuobjdump(option: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = cuobjdump("-res-usage")
        if not (found := re.search(r"\bREG:(\d+) STACK:(\d+) .*?\bLOCAL:(\d+)", usage)):
            raise RuntimeError(f"cuobjdump printed something unexpected: {usage[:500]!r}")
        registers, *memory = map(int, found.groups())
        spills = 0
        if any(memory):  # disassembling takes as long as compiling, and no stack means no spill
            spills = max(1, len(re.findall(r"\b(?:LDL|STL)\b", cuobjdump("-sass"))))
    loads = Counter(int(width, 16) for width in re.findall(r"cp\.async\.c\S+ .*?, (0x\w+)", ptx))
    for vector, bits in re.findall(r"\bld\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    mma = " + ".join(kind for kind in kinds if kind in ptx)
    return registers, spills, mma, dict(loads)


def _read_hip(text: str) -> tuple[int, int, str, dict[int, int]]:
    """Registers, spilled registers and scratch bytes, matrix instruction, loads by width."""
    fields = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    registers, *spills = (int(re.search(rf"\.{f}: +(\d+)", text)[1]) for f in fields)
    loads: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", text):
        loads[_hip_width(kind)] += 1
    mma = " + ".join(
        sorted({m.removeprefix("v_") for m in re.findall(r"\bv_mfma_\w+|\bv_wmma_\w+", text)})
    )
    return registers, sum(spills), mma, dict(loads)


def _hip_width(kind: str) -> int:
    """Bytes that a `global_load_<kind>` brings a thread, in the names before gfx11 and since.

    `dwordx4` and `b128` are 16 bytes; `ushort`, `u16` and `d16_hi_b16` 2.
    """
    if words := re.search(r"dword(?:x(\d))?$", kind):
        return 4 * int(words[1] or 1)
    if bits := re.search(r"[buif](\d+)$", kind):
        return int(bits[1]) // 8
    return 1 if "byte" in kind else 2
