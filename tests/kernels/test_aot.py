"""The ahead-of-time gate: what ships passes it, and it catches what it says it catches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.aot import Report

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
    ):
        (problem,) = replace(GOOD, **changes).problems()
        assert text in problem


def test_a_few_kernels_pass_on_every_chip(tmp_path):
    figures = tmp_path / "figures.json"
    page = ROOT / "docs" / "kernels-aot.md"
    before = page.stat().st_mtime_ns
    done = python("-m", "benchmarks.aot", "--quick", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    reports = json.loads(figures.read_text())
    assert {r["chip"] for r in reports} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    kernels = {r["kernel"].split(",")[0] for r in reports}
    assert {"linear_state_fwd", "linear_state_reduce", "linear_out_fwd"} <= kernels
    assert {"linear_bwd_q", "linear_bwd_q_rows", "linear_bwd_kv"} <= kernels
    assert {"ssd_cumsum", "ssd_states", "ssd_pass", "ssd_read", "ssd_read_both"} <= kernels
    assert {"ssd_bwd_keys", "ssd_bwd_within", "ssd_bwd_decays"} <= kernels
    sums = {"linear_state_reduce", "ssd_cumsum", "ssd_pass", "ssd_bwd_decays"}
    assert all(r["mma"] for r in reports if r["kernel"].split(",")[0] not in sums)
    assert page.stat().st_mtime_ns == before


def test_the_gate_sees_spills_and_narrow_loads_in_compiled_code():
    # A tile four times too large, and rows of 41 elements that no 16-byte load can start at.
    done = python(
        "-c",
        """
import torch
from benchmarks import aot
from linfusion.kernels.linear_attention import triton, triton_configs

def state(k):
    collected = []
    triton.state_forward(k, k, None, "elu1", target=triton.Target("cuda", 108, collected.append))
    report = aot.compile_launch("state", collected[0], "sm_80", k.shape[-1], "float16")
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
from benchmarks import aot

class Pool:  # one job whose kernel spills, no compiler
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def imap_unordered(self, _, jobs):
        bad = aot.Report("sm_80", "bfloat16", 40, "k", "", 1, 9, 0, "", {{16: 1}}, 1, 1, 1)
        for job in jobs:
            yield job, [bad], 0.0

aot.PAGE = pathlib.Path({str(page)!r})
aot.multiprocessing.get_context = lambda _: type("C", (), {{"Pool": lambda *a, **k: Pool()}})
sys.exit(aot.main([]))
""",
    )
    assert done.returncode == 1
    assert "FAIL sm_80 bfloat16 D=40 k: 9 spill" in done.stderr
    assert page.read_text() == "before"
