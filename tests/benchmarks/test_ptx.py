"""The emulator: it calculates as PTX says, and sees what it says it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ptx.launch import GridLaunch
from benchmarks.ptx.memory import GlobalMemory
from benchmarks.ptx.program import Program
from benchmarks.ptx.races import KINDS, Faults

ROOT = Path(__file__).parents[2]

# %rd1 is where this thread's word of the first tensor is, %rd2 of the second, %r9 its shared word.
HEAD = """.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1,
	.param .u32 k_param_2
)
.reqntid 64
{
	.reg .b32 %r<99>;
	ld.param.b64 %rd90, [k_param_0];
	ld.param.b64 %rd91, [k_param_1];
	mov.u32 %r90, %tid.x;
	mov.u32 %r91, %ctaid.x;
	mad.lo.s32 %r92, %r91, 64, %r90;
	mul.wide.u32 %rd92, %r92, 4;
	add.s64 %rd1, %rd90, %rd92;
	add.s64 %rd2, %rd91, %rd92;
	shl.b32 %r9, %r90, 2;
"""


def run(
    body: str, source: np.ndarray, out: np.ndarray, *, programs: int = 1, threads: int = 64
) -> Faults:
    """Run `body` on words; `out` is changed. The shared memory is 4 KiB, k_param_2 is 7."""
    memory = GlobalMemory()
    arguments = []
    for x in (source, out):
        address = memory.put(x.reshape(-1).view(np.uint8))
        memory.allow(address, (x.size,), (1,), x.itemsize)
        arguments.append(address)
    program = Program(HEAD + body + "\n\tret;\n}\n")
    launch = GridLaunch(program, memory, [*arguments, 7], programs, threads, 4096)
    faults = launch.run()
    out.reshape(-1).view(np.uint8)[:] = memory.get(arguments[1], out.nbytes)
    return faults


def kinds(body: str, **options: int) -> set[str]:
    """What is found of `body` on 64 words of zeros a program."""
    words = np.zeros(64 * options.get("programs", 1), np.uint32)
    return run(body, words, words.copy(), **options).kinds()


def of_words(body: str, words: np.ndarray) -> np.ndarray:
    """`body` turns %r1 into %r2."""
    out = np.zeros_like(words)
    faults = run(f"ld.global.b32 %r1, [%rd1];\n{body}\nst.global.b32 [%rd2], %r2;", words, out)
    assert not faults.counts, faults
    return out


RANDOM = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
FLOATS = np.random.default_rng(1).normal(size=64).astype(np.float32)
with np.errstate(over="ignore", invalid="ignore"):
    SIGNED = RANDOM.view(np.int32)
    INSTRUCTIONS = {
        "add.s32 %r2, %r1, 5;": RANDOM + np.uint32(5),
        "neg.s32 %r2, %r1;": np.uint32(0) - RANDOM,
        "mul.hi.u32 %r2, %r1, 123456789;": ((RANDOM.astype(np.uint64) * 123456789) >> 32),
        "mul.wide.s32 %rd5, %r1, -3; shr.u64 %rd6, %rd5, 32; cvt.u32.u64 %r2, %rd6;": (
            SIGNED.astype(np.int64) * -3 >> 32
        ),
        "mad.lo.s32 %r2, %r1, %r1, -1;": RANDOM * RANDOM - np.uint32(1),
        "div.s32 %r2, %r1, -7;": np.trunc(SIGNED / -7).astype(np.int64),
        "rem.s32 %r2, %r1, 7;": np.fmod(SIGNED, 7),
        "shr.s32 %r2, %r1, 40;": SIGNED >> 31,
        "shl.b32 %r2, %r1, 32;": np.zeros(64),
        "bfe.s32 %r2, %r1, 3, 5;": ((RANDOM << np.uint32(24)).view(np.int32) >> 27),
        "bfe.u32 %r2, %r1, 30, 2;": RANDOM >> 30,
        "bfi.b32 %r2, %r1, 0, 8, 8;": (RANDOM & 255) << 8,
        "prmt.b32 %r2, %r1, 255, 0x4012;": (
            0xFF000000 | (RANDOM & 255) << 16 | (RANDOM >> 8 & 255) << 8 | RANDOM >> 16 & 255
        ),
        "lop3.b32 %r2, %r1, 0xff00ff, 0xf0f, 0xea;": RANDOM & 0xFF00FF | 0xF0F,
        "shf.l.wrap.b32 %r2, %r1, %r1, 8;": RANDOM << np.uint32(8) | RANDOM >> np.uint32(24),
        "popc.b32 %r2, %r1;": np.bitwise_count(RANDOM),
        "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r2, {%rs2, %rs1};": RANDOM << 16 | RANDOM >> 16,
        "min.s32 %r2, %r1, 0;": np.minimum(SIGNED, 0),
        "setp.lt.u32 %p1, %r1, 0x80000000; selp.b32 %r2, 1, 2, %p1;": np.where(SIGNED < 0, 2, 1),
        "setp.ge.s32 %p1, %r1, 0; mov.b32 %r2, 9; @!%p1 mov.b32 %r2, 4;": (
            np.where(SIGNED < 0, 4, 9)
        ),
        "shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;": RANDOM[np.arange(64) ^ 5],
        "shfl.sync.up.b32 %r2, %r1, 3, 0, -1;": RANDOM[
            np.where(np.arange(64) % 32 < 3, np.arange(64), np.arange(64) - 3)
        ],
        "ld.param.b32 %r3, [k_param_2]; add.s32 %r2, %r1, %r3;": RANDOM + np.uint32(7),
    }


@pytest.mark.parametrize("body", INSTRUCTIONS)
def test_integers_are_calculated_as_the_manual_says(body):
    want = INSTRUCTIONS[body].astype(np.int64).astype(np.uint32)
    np.testing.assert_array_equal(of_words(body, RANDOM), want)


def test_floats_are_calculated_as_the_manual_says():
    def floats(body: str, x: np.ndarray = FLOATS) -> np.ndarray:
        return of_words(body, x.view(np.uint32)).view(np.float32)

    exact = FLOATS.astype(np.float64) * FLOATS + 3
    assert (floats("fma.rn.f32 %r2, %r1, %r1, 0f40400000;") == exact.astype(np.float32)).all()
    np.testing.assert_allclose(floats("ex2.approx.f32 %r2, %r1;"), np.exp2(FLOATS), rtol=1e-6)
    tiny = np.full(64, 1e-39, np.float32)
    assert (floats("mul.ftz.f32 %r2, %r1, 0f3F800000;", tiny) == 0).all()
    assert (floats("mul.f32 %r2, %r1, 0f3F800000;", tiny) == tiny).all()
    # NaN loses against a number, and is neither less nor not; unless it is asked for.
    nan = np.full(64, np.nan, np.float32)
    assert (floats("max.f32 %r2, %r1, 0f3F800000;", nan) == 1).all()
    assert np.isnan(floats("max.NaN.f32 %r2, %r1, 0f3F800000;", nan)).all()
    for compare, holds in (("lt", 0), ("geu", 1), ("ne", 0), ("neu", 1), ("num", 0)):
        body = f"setp.{compare}.f32 %p1, %r1, %r1; selp.b32 %r2, 1, 0, %p1;"
        assert (of_words(body, nan.view(np.uint32)) == holds).all(), compare


def test_halves_are_rounded_to_even():
    torch = pytest.importorskip("torch")
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1e30, 65520, 1e-8, np.inf], np.float32)
    x = np.resize(ties, 64)
    for type_, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = of_words(f"cvt.rn.{type_}x2.f32 %r2, %r1, 0f3F800000;", x.view(np.uint32))
        want = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        one = torch.ones(1, dtype=dtype).view(torch.int16).numpy().view(np.uint16)[0]
        np.testing.assert_array_equal(got >> 16, want)  # the first operand is the upper half
        assert ((got & 0xFFFF) == one).all()
        back = of_words(f"mov.b32 {{%rs1, %rs2}}, %r1; cvt.f32.{type_} %r2, %rs2;", got)
        np.testing.assert_array_equal(
            back.view(np.float32), torch.from_numpy(x).to(dtype).float().numpy()
        )


STORE, BARRIER = "st.shared.b32 [%r9], %r90;", "bar.sync 0;"
# Of the other warp.
LOAD = "xor.b32 %r10, %r9, 128; ld.shared.b32 %r11, [%r10];"
COPY = "cp.async.ca.shared.global [%r9], [%rd1], 4; cp.async.commit_group;"
FOUND = {
    "shared-race": STORE + LOAD,
    "shared-unwritten": "ld.shared.b32 %r11, [%r9];",
    "shared-outside": "st.shared.b32 [%r9+4096], %r90;",
    "shared-in-flight": COPY + "cp.async.wait_group 1; ld.shared.b32 %r11, [%r9];",
    "global-outside": "ld.global.b32 %r11, [%rd1+256];",
    "global-race-inside": "xor.b32 %r10, %r9, 128; cvt.u64.u32 %rd5, %r10;"
    "add.s64 %rd6, %rd91, %rd5; st.global.b32 [%rd2], %r90; ld.global.b32 %r11, [%rd6];",
    "misaligned": "ld.global.v2.b32 {%r11, %r12}, [%rd1];",
    "divergent": "setp.eq.s32 %p1, %r90, 3;\n@%p1 bra $L__BB0_1;\n$L__BB0_1:\n",
    "global-race": "st.global.b32 [%rd91], %r91;",
    "register": "wgmma.commit_group.sync.aligned;",
}


@pytest.mark.parametrize("kind", [k for k in FOUND if k != "register"])
def test_each_fault_is_found_where_it_is(kind):
    assert kind in kinds(FOUND[kind], programs=2)


def test_faults_name_the_line_and_the_instruction():
    text = str(run(LOAD, np.zeros(64, np.uint32), np.zeros(64, np.uint32)))
    assert "shared-unwritten at ?: 128 × 'ld.shared.b32 %r11, [%r10]'" in text


def test_what_is_in_order_is_no_fault():
    assert not kinds(STORE + BARRIER + LOAD, programs=3)
    assert not kinds(COPY + "cp.async.wait_group 0;" + BARRIER + LOAD)
    # Each warp for itself needs no barrier.
    assert not kinds(STORE + "ld.shared.b32 %r11, [%r9];")
    # All threads of a store to one place say the same.
    assert not kinds("st.global.b32 [%rd91], 5;")
    assert "global-race" in kinds("st.global.b32 [%rd91], %r90;")


def test_a_copy_lands_at_its_wait_and_not_before():
    words = np.arange(64, dtype=np.uint32)
    late = "mov.b32 %r8, 77; st.shared.b32 [%r9], %r8;" + COPY + "{}ld.shared.b32 %r2, [%r9];"
    out = np.zeros_like(words)
    store = "st.global.b32 [%rd2], %r2;"
    run(late.format("") + store, words, out)
    assert (out == 77).all()
    run(late.format("cp.async.wait_group 0;") + store, words, out)
    np.testing.assert_array_equal(out, words)


def test_programs_that_go_round_a_loop_more_or_less_often_are_all_right():
    body = """
	mov.b32 %r2, 0;
	mov.b32 %r3, 0;
$L__BB0_1:
	add.s32 %r2, %r2, 10;
	st.shared.b32 [%r9], %r2;
	bar.sync 0;
	add.s32 %r3, %r3, 1;
	setp.le.s32 %p1, %r3, %r91;
	@%p1 bra $L__BB0_1;
	ld.shared.b32 %r4, [%r9];
	st.global.b32 [%rd2], %r4;
"""
    out = np.zeros((5, 64), np.uint32)
    faults = run(body, out.copy(), out, programs=5)
    assert not faults.counts, faults
    assert (out == 10 * np.arange(1, 6)[:, None]).all()


def test_a_product_of_tensor_cores_is_the_product():
    # One warp: two matrices of 8 × 8 words in shared memory, read as 16 × 16 and 8 × 16 halves.
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-4, 5, (rows, 16)).astype(np.float16) for rows in (16, 8))
    c = np.zeros((16, 8), np.float32)
    rows = "".join(
        f"ld.global.b32 %r1, [%rd1+{128 * i}]; st.shared.b32 [%r9+{128 * i}], %r1;\n"
        for i in range(6)
    )
    body = f"""
{rows}
	// Row of a: of the first 8 the left half, of the next 8 those below, then the right halves.
	and.b32 %r20, %r90, 15;
	shl.b32 %r21, %r20, 5;
	and.b32 %r22, %r90, 16;
	add.s32 %r23, %r21, %r22;
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r1, %r2, %r3, %r4}}, [%r23];
	and.b32 %r24, %r90, 7;
	shl.b32 %r25, %r24, 5;
	and.b32 %r26, %r90, 8;
	shl.b32 %r27, %r26, 1;
	add.s32 %r28, %r25, %r27;
	ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r5, %r6}}, [%r28+512];
	mov.b32 %r10, 0f00000000;
	mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r11, %r12, %r13, %r14}},
		{{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r10, %r10, %r10, %r10}};
	shl.b32 %r30, %r90, 3;
	cvt.u64.u32 %rd5, %r30;
	add.s64 %rd6, %rd91, %rd5;
	st.global.v2.b32 [%rd6], {{%r11, %r12}};
	st.global.v2.b32 [%rd6+256], {{%r13, %r14}};
"""
    faults = run(body, np.concatenate([a, b]), c, threads=32)
    assert not faults.counts, faults
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


def swizzled(matrix: np.ndarray) -> np.ndarray:
    """Rows of 16 halves in lines of 32 bytes, as wgmma takes them: pieces of 16 bytes exchanged."""
    pieces = matrix.reshape(len(matrix), 2, 8)
    odd = (np.arange(len(matrix)) * 32 >> 7 & 1).astype(bool)
    pieces[odd] = pieces[odd][:, ::-1]
    return pieces.reshape(matrix.shape)


@pytest.mark.parametrize("fence, wait", [(True, True), (False, True), (True, False)])
def test_wgmma_multiplies_and_wants_a_fence_before_and_a_wait_after(fence, wait):
    rng = np.random.default_rng(3)
    a, b = (rng.integers(-4, 5, (rows, 16)).astype(np.float16) for rows in (64, 8))
    # 64 rows of 32 bytes for a, 8 for b behind them: 2,304 bytes, 4 words and a half a thread.
    words = np.zeros(5 * 128, np.uint32)
    words[:576] = np.concatenate([swizzled(a.copy()), swizzled(b.copy())]).view(np.uint32).ravel()
    copies = "".join(
        f"ld.global.b32 %r1, [%rd1+{512 * i}]; st.shared.b32 [%r9+{512 * i}], %r1;\n"
        for i in range(5)
    )
    described = [3 << 62 | 16 << 32 | start >> 4 for start in (0, 2048)]  # 256 bytes to 8 rows
    results = "{" + ", ".join(f"%r{i}" for i in range(11, 15)) + "}"
    body = f"""
{copies}
	bar.sync 0;
	{"fence.proxy.async.shared::cta;" if fence else ""}
	mov.b64 %rd5, {described[0]};
	mov.b64 %rd6, {described[1]};
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {results}, %rd5, %rd6, 0, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	{"wgmma.wait_group.sync.aligned 0;" if wait else ""}
	shr.u32 %r20, %r90, 5;
	and.b32 %r21, %r90, 31;
	shl.b32 %r22, %r20, 9;
	shl.b32 %r23, %r21, 3;
	add.s32 %r24, %r22, %r23;
	cvt.u64.u32 %rd7, %r24;
	add.s64 %rd8, %rd91, %rd7;
	st.global.v2.b32 [%rd8], {{%r11, %r12}};
	st.global.v2.b32 [%rd8+256], {{%r13, %r14}};
"""
    c = np.zeros((64, 8), np.float32)
    faults = run(body, words, c, threads=128)
    assert faults.kinds() == (set() if fence and wait else {"register"} if fence else {"proxy"})
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


def test_what_is_not_known_is_refused_by_name():
    for text in (
        "tcgen05.wait::ld.sync.aligned;",
        "add.rz.f32 %r1, %r2, %r3;",
        "ld.local.b32 %r1, [%rd1];",
        "cvt.rz.f16.f32 %rs1, %r1;",
        "mov.u32 %r1, %clock;",
    ):
        with pytest.raises(NotImplementedError, match=text.split()[0].rstrip(";")):
            Program(HEAD + text + "\nret;\n}")
    with pytest.raises(ValueError, match=r"no \.entry"):
        Program("nothing")


def test_every_kind_of_fault_is_tested():
    assert {*FOUND, "proxy", "wgmma"} == KINDS.keys()


def test_an_operand_of_a_product_under_way_must_not_be_written():
    described = 3 << 62 | 16 << 32
    body = f"""
	mov.b32 %r1, 0;
	mov.b64 %rd5, {described};
	st.shared.b32 [%r9], %r1; st.shared.b32 [%r9+512], %r1;
	st.shared.b32 [%r9+1024], %r1; st.shared.b32 [%r9+1536], %r1;
	bar.sync 0;
	fence.proxy.async.shared::cta;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r11, %r12, %r13, %r14}}, %rd5, %rd5,
		0, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	bar.sync 0;
	WAIT
	st.shared.b32 [%r9], %r1;
"""
    words = np.zeros(128, np.uint32)
    assert run(body.replace("WAIT", ""), words, words.copy(), threads=128).kinds() == {"wgmma"}
    waited = body.replace("WAIT", "wgmma.wait_group.sync.aligned 0;")
    assert not run(waited, words, words.copy(), threads=128).counts


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: in this one Triton interprets and cannot compile."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "arch, names",
    [
        ("80", ("linear bf16 D=64, Dv=24", "window 9 × 1 × 2", "scan one token")),
        ("90", ("linear one token",)),
    ],
)
def test_compiled_kernels_are_right_and_without_faults(arch, names):
    done = python("-m", "benchmarks.ptx", "--arch", arch, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == len(names)


def test_a_mutation_of_compiled_code_is_noticed_and_fails_nothing_else():
    done = python(
        "-c",
        """
from benchmarks.ptx.comparing import bf16
from benchmarks.ptx.families.linear import strided
from benchmarks.ptx.mutations import Mutation, once, run, without

case = lambda target: strided(target, bf16, lambda draw: [draw(1, 70, 1, 40) for _ in range(3)])
for change in (
    without("bar.sync", 0),
    once(r"@%p\\d+ (st\\.global)", r"\\1"),
    lambda ptx: ptx,
):
    print(run(Mutation("linear_out_fwd", "", change, case), 80))
""",
    )
    assert done.returncode == 0, done.stderr
    barrier, store, nothing = done.stdout.splitlines()
    assert "there=True" in barrier and "shared-race" in barrier
    assert "there=True" in store and "global-race" in store
    assert nothing == "Seen(there=False, faults=[], wrong=[])"
