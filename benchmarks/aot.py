"""Compile every Triton kernel for four GPUs, without a GPU, and fail on what would make it slow.

    python -m benchmarks.aot            # everything; writes docs/kernels-aot.md
    python -m benchmarks.aot --quick    # a few combinations, writes nothing

A kernel fails on a spilled register, on more shared memory than the chip has, and on 2-byte
loads of q, k, v, of x, B, C or of their gradients. What is compiled is what the library launches:
the launches are collected from `triton.py` of each family of kernels itself, with tensors on the
meta device. Nothing runs, so nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import aot_ssd, aot_window

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch

PAGE = Path(__file__).parents[1] / "docs" / "kernels-aot.md"
HEAD_DIMS = (40, 64, 80, 128, 160, 576)
LIT = 576  # columns of a head of DiT-XL/2 with LiT's two heads, whose feature map is another
# What a tile is called, by family of kernels.
TILES = {
    "linear": ("BN", "BD", "BE", "BLOCK"),
    "window": ("BM", "BK", "BA", "BB"),
    "ssd": ("BM", "BK", "BD", "BP", "BN", "BLOCK", "BH"),
}
DTYPES = ("bfloat16", "float16", "float32")
# A 1024-pixel image at the first level of Stable Diffusion 1.5, with guidance.
BATCH, TOKENS, HEADS = 2, 16384, 8


class Chip(NamedTuple):
    """A GPU to compile for; `shared` is the most bytes of shared memory one program may ask for."""

    vendor: str
    arch: int | str
    warp: int
    shared: int
    multiprocessors: int


Job = tuple[str, int | str, str]  # chip, head size, dtype

CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 166_912, 108),
    "sm_90": Chip("cuda", 90, 32, 232_448, 132),
    "sm_100": Chip("cuda", 100, 32, 232_448, 148),
    "gfx942": Chip("hip", "gfx942", 64, 65_536, 304),
}
QUICK: list[Job] = [
    ("sm_80", 40, "bfloat16"),
    ("sm_90", 160, "bfloat16"),
    ("sm_100", 64, "float16"),
    ("gfx942", 80, "float32"),
    ("sm_80", "64×64", "bfloat16"),
    ("sm_90", "64×128", "float32"),
    ("gfx942", "128×64", "float16"),
]


@dataclass
class Report:
    """What the compiler made of one kernel.

    Attributes:
        d: columns of a head; of the scan, channels of a head × features of its state.
        loads: width in bytes of a global load -> how many such instructions.
        hbm: bytes moved if every re-read hits a cache: each tensor once.
        issued: bytes that the programs load and store, re-reads included.
        minimum: bytes of the tensors as long as the sequence, each once.
    """

    chip: str
    dtype: str
    d: int | str
    kernel: str
    tile: str
    registers: int
    spills: int
    shared: int
    mma: str
    loads: dict[int, int]
    hbm: int
    issued: int
    minimum: int

    def problems(self) -> list[str]:
        """Why this kernel must not ship; empty if it may."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spill instructions or bytes")
        if self.shared > CHIPS[self.chip].shared:
            limit = CHIPS[self.chip].shared
            found.append(f"{self.shared} bytes of shared memory, {self.chip} has {limit}")
        if narrow := sum(count for width, count in self.loads.items() if width <= 2):
            found.append(f"{narrow} loads of 2 bytes or less")
        return [f"{self.chip} {self.dtype} D={self.d} {self.kernel}: {text}" for text in found]


def launches(chip: Chip, d: int, dtype: str) -> list[tuple[str, Launch]]:
    """Every different launch of a forward and backward pass, with and without key weights."""
    import torch

    from linfusion.kernels.linear_attention import triton as kernels

    collected: list[Launch] = []
    target = kernels.Target(chip.vendor, chip.multiprocessors, collected.append)
    one = getattr(torch, dtype)
    q, k, v, do = (torch.empty(BATCH, TOKENS, HEADS, d, dtype=one, device="meta") for _ in range(4))
    phi, eps = ("relu_eps", 1e-6) if d == LIT else ("elu1", 1e-4)
    for key_weight in (None, torch.empty(BATCH, TOKENS, device="meta")):
        state = kernels.state_forward(k, v, key_weight, phi, target=target)
        kv, k_mean, count = state
        kernels.read_forward(q, kv, k_mean, phi, "mean", eps, count, one, target=target)
        kernels.attention_backward(do, q, k, v, key_weight, *state, phi, "mean", eps, target=target)
    different: dict[str, tuple[str, Launch]] = {}
    for launch in collected:
        constants = {n: v for n, v in launch.args.items() if not isinstance(v, torch.Tensor)}
        name = launch.kernel.__name__ + (", weighted" if launch.args.get("WEIGHTED") else "")
        different.setdefault(f"{name} {constants}", (name, launch))
    return list(different.values())


def compile_launch(name: str, launch: Launch, chip_name: str, d: int | str, dtype: str) -> Report:
    """Compile as the launcher would: pointers 16-byte aligned, integers not specialised on."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = CHIPS[chip_name]
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    types |= {torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(chip.vendor, chip.arch, chip.warp),
        options=launch.options,
    )
    read = _read_cuda if chip.vendor == "cuda" else _read_hip
    registers, spills, mma, loads = read(compiled.asm)
    family = launch.kernel.__name__.partition("_")[0]
    moved = {"linear": traffic, "window": aot_window.traffic, "ssd": aot_ssd.traffic}[family]
    hbm, issued, minimum = moved(launch)
    options = launch.options
    tile = "×".join(str(launch.args[x]) for x in TILES[family] if x in launch.args)
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
        loads=loads,
        hbm=hbm,
        issued=issued,
        minimum=minimum,
    )


def _read_cuda(asm: dict) -> tuple[int, int, str, dict[int, int]]:
    """Registers, LDL and STL instructions, matrix instruction, loads by width."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()

        def cuobjdump(option: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, option, cubin.name]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = cuobjdump("-res-usage")
        if not (found := re.search(r"\bREG:(\d+) STACK:(\d+) .*?\bLOCAL:(\d+)", usage)):
            raise RuntimeError(f"cuobjdump printed something unexpected: {usage[:500]!r}")
        registers, *memory = map(int, found.groups())
        spills = 0
        if any(memory):  # disassembling takes as long as compiling, and no stack means no spill
            spills = max(1, len(re.findall(r"\b(?:LDL|STL)\b", cuobjdump("-sass"))))
    ptx = asm["ptx"]
    loads = Counter(int(width, 16) for width in re.findall(r"cp\.async\.c\S+ .*?, (0x\w+)", ptx))
    for vector, bits in re.findall(r"\bld\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.[busf](\d+)\b", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    mma = " + ".join(kind for kind in kinds if kind in ptx)
    return registers, spills, mma, dict(loads)


def _read_hip(asm: dict) -> tuple[int, int, str, dict[int, int]]:
    """Registers, spilled registers and scratch bytes, matrix instruction, loads by width."""
    text = asm["amdgcn"]
    fields = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    registers, *spills = (int(re.search(rf"\.{f}: +(\d+)", text)[1]) for f in fields)
    widths = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    loads: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer|flat)_load_(\w+)", text):
        loads[widths.get(kind.removeprefix("lds_"), 1 if "byte" in kind else 2)] += 1
    mma = " + ".join(sorted({m.removeprefix("v_") for m in re.findall(r"\bv_mfma_\w+", text)}))
    return registers, sum(spills), mma, dict(loads)


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


def compile_all(job: Job) -> tuple[Job, list[Report], float]:
    """One chip, head size and dtype."""
    chip, d, dtype = job
    start = time.perf_counter()
    if isinstance(d, str):
        wanted = aot_ssd.launches(CHIPS[chip], d, dtype)
    else:
        wanted = launches(CHIPS[chip], d, dtype)
        if d in aot_window.HEAD_DIMS:
            wanted += aot_window.launches(CHIPS[chip], d, dtype)
    reports = [compile_launch(name, launch, chip, d, dtype) for name, launch in wanted]
    return job, reports, time.perf_counter() - start


def page(reports: list[Report]) -> str:
    """The table for the docs."""
    import triton

    windows = [r for r in reports if r.kernel.startswith("window")]
    scans = [r for r in reports if r.kernel.startswith("ssd")]
    reports = [r for r in reports if r.kernel.startswith("linear")]
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        "`make aot` writes this page. It compiles each Triton kernel for four "
        "GPUs without having one, and fails on a spilled register, on shared memory above the "
        "chip's limit and on 2-byte loads of q, k, v and of x, B, C.",
        "",
        "**These kernels have never run on a GPU.** They are compared with the reference in "
        "Triton's interpreter; their speed is unknown, and nothing on this page is a time.",
        "",
        f"Triton {triton.__version__}. Of linear attention: feature map elu + 1, mean normaliser; "
        f"bytes for batch {BATCH}, {TOKENS} tokens, {HEADS} heads. *Tile* is tokens × columns of q "
        "or k × columns of v, warps and pipeline stages. *HBM* counts every tensor of the launch "
        "once, *issued* every load and store of its programs, re-reads from cache included; both "
        "are relative to the bytes of q, k, v, o and their gradients that the kernel has to touch.",
        "",
        "# Linear attention",
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
            "| dtype | D | kernel | tile | registers | spills | shared | matrix instruction "
            "| loads: bytes × count | HBM | issued |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for r in (r for r in reports if r.chip == chip):
            loads = ", ".join(f"{w} × {n}" for w, n in sorted(r.loads.items(), reverse=True))
            bytes_ = [f"{x / r.minimum:.2f}" if r.minimum else "–" for x in (r.hbm, r.issued)]
            lines.append(
                f"| {r.dtype} | {r.d} | {r.kernel} | {r.tile} | {r.registers} | {r.spills} "
                f"| {r.shared} | {r.mma or '–'} | {loads} | {bytes_[0]} | {bytes_[1]} |"
            )
    return "\n".join(lines + aot_window.section(windows) + aot_ssd.section(scans)) + "\n"


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


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a kernel fails, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a few combinations, no page")
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    options = parser.parse_args(argv)
    # Interpreted kernels cannot be compiled; workers are spawned, so they import Triton after this.
    os.environ.pop("TRITON_INTERPRET", None)
    jobs: list[Job] = [
        (c, d, t) for c in CHIPS for t in DTYPES for d in (*HEAD_DIMS, *aot_ssd.SIZES)
    ]
    if options.quick:
        jobs = QUICK
    by_job: dict[Job, list[Report]] = {}
    context = multiprocessing.get_context("spawn")
    with context.Pool(os.cpu_count(), initializer=_be_nice) as pool:
        for job, reports, seconds in pool.imap_unordered(compile_all, jobs):
            by_job[job] = reports
            chip, d, dtype = job
            bad = sum(bool(r.problems()) for r in reports)
            for text in (text for r in reports for text in r.problems()):
                print(f"FAIL {text}", file=sys.stderr, flush=True)
            print(
                f"{len(by_job):3}/{len(jobs)}  {chip:7} {dtype:9} D={d:<4} {len(reports)} kernels "
                f"{seconds:5.1f} s  {f'{bad} FAIL' if bad else 'ok'}",
                flush=True,
            )
    reports = [r for job in jobs for r in by_job[job]]
    problems = [text for r in reports for text in r.problems()]
    if options.json:
        _write(options.json, json.dumps([asdict(r) for r in reports], indent=1) + "\n")
    if not options.quick and not problems:
        _write(PAGE, page(reports))
        print(f"wrote {PAGE}")
    print(f"{len(reports)} kernels, {len(problems)} problems; compiled only, never run on a GPU")
    return 1 if problems else 0


def _be_nice() -> None:
    """Leave the machine usable: a compiler on every core for minutes."""
    os.setpriority(os.PRIO_PROCESS, 0, max(10, os.getpriority(os.PRIO_PROCESS, 0)))


def _write(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a killed run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


if __name__ == "__main__":
    sys.exit(main())
