"""The ahead-of-time gate: what ships passes it, and it catches what it says it catches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.aot.chips import CHIPS, Report, jobs
from benchmarks.aot.compiled import _hip_width
from benchmarks.aot.page import page
from benchmarks.aot.products import executed_for_each_needed

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: in this one Triton interprets and cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


GOOD = Report(
    chip="sm_80",
    dtype="float16",
    d=40,
    kernel="k",
    tile="",
    registers=80,
    spills=0,
    shared=166_912,
    mma="mma.sync",
    products=1.0,
    loads={16: 8, 4: 2},
    hbm=1,
    issued=1,
    minimum=1,
)


def test_the_gate_names_each_fault():
    assert GOOD.problems() == []
    for changes, text in (
        ({"spills": 3}, "3 spill"),
        ({"shared": 166_913}, "166913 bytes of shared memory, sm_80 has 166912"),
        ({"chip": "gfx942", "shared": 65_537}, "gfx942 has 65536"),
        ({"loads": {16: 8, 2: 5}}, "5 loads of 2 bytes or less"),
        ({"products": 1.06}, "1.06 products executed for each needed, 1.05 may be"),
    ):
        (problem,) = replace(GOOD, **changes).failures()
        assert text in problem


def test_a_norm_may_load_its_weight_by_the_number():
    narrow = replace(GOOD, loads={16: 8, 2: 1})
    assert narrow.failures() and not replace(narrow, narrow=1).failures()
    assert replace(narrow, narrow=1, loads={2: 2}).failures()


def test_a_chip_that_runs_the_blocked_form_fails_nothing():
    spilled = replace(GOOD, chip="gfx1100", spills=414)
    assert spilled.problems() and not spilled.failures()
    assert replace(spilled, chip="gfx942").failures()


def test_every_chip_that_is_launched_on_compiles_every_size():
    assert CHIPS.keys() == {job[0] for job in jobs(("128×128",))}
    for name, chip in CHIPS.items():
        sizes = {(d, dtype) for c, d, dtype in jobs(("128×128",)) if c == name}
        wanted = {(d, t) for d in (72, 96, "128×128") for t in ("bfloat16", "float16", "float32")}
        assert wanted <= sizes or not chip.launched


def test_the_page_says_which_chips_run_the_blocked_form():
    scan = replace(GOOD, d="64×64", dtype="bfloat16", kernel="ssd_read", products=1.25)
    text = page([scan, replace(scan, chip="gfx1100", spills=414)])
    assert "| sm_80 | 1 | 1 | 80 | 166912, 166912 | 1.25 |" in text
    assert "| gfx1100 | 1 | 1: blocked form there |" in text
    assert "| bfloat16 | 64×64 | ssd_read |  | 80 | 414 | 166912 | mma.sync | 1.25 |" in text


def dot(layout: str, rows: int, columns: int) -> str:
    """TTGIR of a rows × columns product of depth 32 whose result lies as `layout` says."""
    operand = "bf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * "
    return (
        f"#mma = #ttg.{layout}\n%x = tt.dot %a, %b, %c : tensor<{rows}x32x{operand}"
        f"tensor<32x{columns}x{operand[:-3]} -> tensor<{rows}x{columns}xf32, #mma> loc(#loc1)\n"
    )


def test_products_are_counted_from_the_layout_of_the_result():
    mma = "nvidia_mma<{{versionMajor = 2, warpsPerCTA = [{}], instrShape = [16, 8]}}>"
    for layout, rows, columns, times in (
        (mma.format("4, 1"), 64, 64, 1),
        (mma.format("8, 1"), 64, 64, 2),  # of eight warps over four rows of tiles, four repeat
        (mma.format("8, 1"), 128, 64, 1),
        (mma.format("2, 4"), 32, 16, 2),
        ("amd_mfma<{version = 3, warpsPerCTA = [8, 1], instrShape = [32, 32, 8]}>", 32, 128, 8),
        ("amd_wmma<{version = 1, ctaLayout = {warp = [[0, 1], [1, 0]]}}>", 32, 32, 1),
        ("amd_wmma<{version = 1, ctaLayout = {warp = [[0, 1], [1, 0]]}}>", 32, 16, 2),
        ("blocked<{warpsPerCTA = [8, 1]}>", 16, 16, 1),  # no tensor core
    ):
        assert executed_for_each_needed(dot(layout, rows, columns)) == times, layout
    two = dot(mma.format("8, 1"), 64, 64) + dot(mma.format("8, 1"), 128, 64).split("\n", 1)[1]
    assert executed_for_each_needed(two) == 4 / 3  # (2 × 64 + 128) rows where 192 are needed
    with pytest.raises(ValueError, match="layout that is not known: strange"):
        executed_for_each_needed(dot("strange<{}>", 16, 16))


def test_the_names_of_loads_before_gfx11_and_since_are_read():
    for width, kinds in {
        16: ("dwordx4", "b128", "lds_dwordx4", "tr_b128"),
        8: ("dwordx2", "b64"),
        4: ("dword", "b32"),
        2: ("ushort", "u16", "d16_b16", "d16_hi_b16", "short_d16_hi"),
        1: ("ubyte", "u8", "i8"),
    }.items():
        assert {_hip_width(kind) for kind in kinds} == {width}


def test_a_few_kernels_pass_on_every_chip(tmp_path):
    figures = tmp_path / "figures.json"
    page = ROOT / "docs" / "kernels-aot.md"
    before = page.stat().st_mtime_ns
    done = python("-m", "benchmarks.aot", "--quick", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    reports = json.loads(figures.read_text())
    assert {r["chip"] for r in reports} == {c for c, chip in CHIPS.items() if chip.launched}
    kernels = {r["kernel"].split(",")[0] for r in reports}
    assert {"linear_state_fwd", "linear_state_reduce", "linear_out_fwd"} <= kernels
    assert {"linear_bwd_q", "linear_bwd_q_rows", "linear_bwd_kv"} <= kernels
    assert {"ssd_cumsum", "ssd_states", "ssd_pass", "ssd_read"} <= kernels
    assert {"ssd_bwd_keys", "ssd_bwd_within", "ssd_bwd_decays"} <= kernels
    sums = {"linear_state_reduce", "ssd_cumsum", "ssd_pass", "ssd_bwd_decays"}
    passes = {"norm_leaky_relu_fwd", "rotary_rms_norm_fwd", "conv_fwd", "gated_rms_norm_fwd"}
    passes |= {"norm_leaky_relu_bwd", "rotary_rms_norm_bwd", "gated_rms_norm_bwd"}
    passes |= {"conv_bwd_x", "conv_bwd_weights"}
    assert {r["kernel"].split(",")[0] for r in reports if not r["mma"]} == sums | passes
    assert page.stat().st_mtime_ns == before


def test_the_gate_sees_spills_and_narrow_loads_in_compiled_code():
    # A tile four times too large, and rows of 41 elements that no 16-byte load can start at.
    done = python(
        "-c",
        """
import torch
from benchmarks.aot.compiled import compile_launch
from linfusion.kernels.linear_attention import triton, triton_configs

def state(k):
    collected = []
    triton.state_forward(k, k, None, "elu1", target=triton.Target("cuda", 108, collected.append))
    report = compile_launch("state", collected[0], "sm_80", k.shape[-1], "float16")
    print(report.problems(), report.loads)

rows = torch.empty(1, 128, 1, 41, dtype=torch.float16, device="meta")
state(rows[..., :40])
triton_configs._TILES["cuda", "state", 2] = [(64, 256, 128, 4, 1)] * 3
state(torch.empty(1, 128, 1, 256, dtype=torch.float16, device="meta"))
""",
    )
    assert done.returncode == 0, done.stderr
    narrow, spilled = done.stdout.splitlines()
    assert "loads of 2 bytes" in narrow and "spill" not in narrow
    assert "spill" in spilled and "loads of 2 bytes" not in spilled


def test_a_failing_kernel_makes_the_command_fail_and_keeps_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before")
    done = python(
        "-c",
        f"""
import pathlib, sys
from benchmarks.aot import run
from benchmarks.aot.chips import Report

class Pool:  # one job whose kernel spills, no compiler
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def imap_unordered(self, _, jobs):
        bad = Report("sm_80", "bfloat16", 40, "k", "", 1, 9, 0, "", 1, {{16: 1}}, 1, 1, 1)
        for job in jobs:
            yield job, [bad], 0.0

run.PAGE = pathlib.Path({str(page)!r})
run.multiprocessing.get_context = lambda _: type("C", (), {{"Pool": lambda *a, **k: Pool()}})
sys.exit(run.main([]))
""",
    )
    assert done.returncode == 1
    assert "FAIL sm_80 bfloat16 D=40 k: 9 spill" in done.stderr
    assert page.read_text() == "before"
