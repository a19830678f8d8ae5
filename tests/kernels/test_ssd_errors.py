"""Every wrong argument of the scan is named, with what came and what is accepted."""

from __future__ import annotations

import math

import pytest
import torch

from linfusion.kernels import library, ssd_scan, ssd_step

ONE = torch.ones
GOOD = {
    "x": ONE(2, 6, 4, 3),
    "dt": ONE(2, 6, 4),
    "A": -ONE(4),
    "B": ONE(2, 6, 2, 5),
    "C": ONE(2, 6, 2, 5),
    "chunk_size": 4,
}
STEP = {
    "x": ONE(2, 4, 3),
    "dt": ONE(2, 4),
    "A": -ONE(4),
    "B": ONE(2, 2, 5),
    "C": ONE(2, 2, 5),
    "states": ONE(2, 4, 3, 5),
}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": ONE(6, 4, 3)}, r"x: expected 4 axes \[B, L, H, P\], got shape \(6, 4, 3\)"),
        ({"x": None}, r"x: expected a tensor \[B, L, H, P\], got NoneType"),
        ({"x": GOOD["x"].int()}, r"x: expected a real floating dtype .* got torch.int32"),
        ({"x": ONE(2, 0, 4, 3)}, r"x: expected every axis .* at least 1, got shape \(2, 0, 4, 3\)"),
        ({"dt": ONE(2, 6)}, r"dt: expected 3 axes \[B, L, H\], got shape \(2, 6\)"),
        ({"dt": ONE(2, 5, 4)}, r"dt: expected \[B, L, H\] = \(2, 6, 4\), got \(2, 5, 4\)"),
        ({"dt": GOOD["dt"].long()}, r"dt: expected a real floating dtype .* got torch.int64"),
        ({"dt": ONE(2, 6, 4, device="meta")}, r"dt: expected the device of x, cpu, got meta"),
        ({"A": -1.0}, r"A: expected a tensor \[H\], got float"),
        ({"A": -ONE(3)}, r"A: expected \[H\] = \(4,\), got \(3,\)"),
        ({"A": -ONE(4, 5)}, r"A: expected 1 axis \[H\], got shape \(4, 5\)"),
        ({"B": ONE(2, 6, 5)}, r"B: expected 4 axes \[B, L, G, N\], got shape \(2, 6, 5\)"),
        (
            {"B": ONE(2, 7, 2, 5)},
            r"B: expected \[B, L, G, N\] = \(2, 6, 2, 5\), got \(2, 7, 2, 5\)",
        ),
        ({"B": ONE(2, 6, 3, 5)}, r"B: expected a number of groups that divides 4 heads, got 3"),
        ({"B": ONE(2, 6, 8, 5)}, r"B: expected a number of groups that divides 4 heads, got 8"),
        (
            {"C": ONE(2, 6, 1, 5)},
            r"C: expected \[B, L, G, N\] = \(2, 6, 2, 5\), got \(2, 6, 1, 5\)",
        ),
        ({"C": GOOD["C"].bool()}, r"C: expected a real floating dtype .* got torch.bool"),
        ({"chunk_size": 0}, r"chunk_size: expected an integer of at least 1, got 0"),
        ({"chunk_size": -64}, r"chunk_size: expected an integer of at least 1, got -64"),
        ({"chunk_size": 64.0}, r"chunk_size: expected an integer of at least 1, got 64.0"),
        ({"chunk_size": True}, r"chunk_size: expected an integer of at least 1, got True"),
        ({"D": ONE(3)}, r"D: expected \[H\] = \(4,\), got \(3,\)"),
        ({"D": ONE(4, 4)}, r"D: expected \[H, P\] = \(4, 3\), got \(4, 4\)"),
        ({"D": ONE(4).int()}, r"D: expected a real floating dtype .* got torch.int32"),
        ({"D": 1.0}, r"D: expected a tensor \[H\], got float"),
        ({"dt_bias": ONE(2)}, r"dt_bias: expected \[H\] = \(4,\), got \(2,\)"),
        ({"dt_softplus": "yes"}, r"dt_softplus: expected True or False, got 'yes'"),
        ({"dt_limit": (math.nan, 1.0)}, r"dt_limit: .* smallest finite, got \(nan, 1.0\)"),
        ({"dt_limit": (0.0, math.nan)}, r"dt_limit: .* got \(0.0, nan\)"),
        ({"dt_limit": (math.inf, math.inf)}, r"dt_limit: .* got \(inf, inf\)"),
        ({"dt_limit": (-math.inf, 1.0)}, r"dt_limit: .* 0 <= smallest .* got \(-inf, 1.0\)"),
        ({"dt_limit": (-0.1, 1.0)}, r"dt_limit: .* 0 <= smallest .* got \(-0.1, 1.0\)"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit: .* smallest <= largest, .* got \(1.0, 0.5\)"),
        ({"dt_limit": (1.0,)}, r"dt_limit: expected \(smallest, largest\), .* got \(1.0,\)"),
        ({"dt_limit": 0.5}, r"dt_limit: expected \(smallest, largest\), .* got 0.5"),
        ({"dt_limit": (0, "inf")}, r"dt_limit: .* got \(0, 'inf'\)"),
        (
            {"initial_states": ONE(2, 4, 5, 3)},
            r"initial_states: expected \[B, H, P, N\] = \(2, 4, 3, 5\), got \(2, 4, 5, 3\)",
        ),
        ({"initial_states": 0}, r"initial_states: expected a tensor \[B, H, P, N\], got int"),
        ({"return_final_states": 1}, r"return_final_states: expected True or False, got 1"),
        ({"reverse": None}, r"reverse: expected True or False, got None"),
        ({"impl": "cuda"}, r"impl: expected None or one of \('reference', 'blocked'.*got 'cuda'"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match="^" + message):
        ssd_scan(**GOOD | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": ONE(2, 1, 4, 3)}, r"x: expected 3 axes \[B, H, P\], got shape \(2, 1, 4, 3\)"),
        ({"dt": ONE(2, 3)}, r"dt: expected \[B, H\] = \(2, 4\), got \(2, 3\)"),
        ({"A": -ONE(2)}, r"A: expected \[H\] = \(4,\), got \(2,\)"),
        ({"B": ONE(2, 3, 5)}, r"B: expected a number of groups that divides 4 heads, got 3"),
        ({"C": ONE(2, 2, 4)}, r"C: expected \[B, G, N\] = \(2, 2, 5\), got \(2, 2, 4\)"),
        ({"states": ONE(2, 4, 5, 3)}, r"states: expected \[B, H, P, N\] = \(2, 4, 3, 5\), got"),
        ({"states": None}, r"states: expected a tensor \[B, H, P, N\], got NoneType"),
        ({"D": ONE(2)}, r"D: expected \[H\] = \(4,\), got \(2,\)"),
        ({"dt_limit": (2, 1)}, r"dt_limit: .* got \(2, 1\)"),
        ({"dt_softplus": 1}, r"dt_softplus: expected True or False, got 1"),
    ],
)
def test_a_wrong_argument_of_a_step_is_named(change, message):
    with pytest.raises(ValueError, match="^" + message):
        ssd_step(**STEP | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": ONE(2, 6, 4, 3).double()}, r"'triton' takes float16, bfloat16 and float32"),
        (
            {"x": ONE(2, 6, 4, 129)},
            r"'triton' takes channels and features up to 128, got 129 and 5; 'blocked'",
        ),
    ],
)
def test_what_triton_does_not_take_is_refused(change, message):
    with pytest.raises(ValueError, match="^impl: " + message):
        ssd_scan(**GOOD | change, impl="triton")


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(library, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: 'triton' needs tensors on a CUDA or ROCm device"):
        ssd_scan(**GOOD, impl="triton")


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(library, "HAS_TRITON", False)
    with pytest.raises(ImportError, match="pip install triton"):
        ssd_scan(**GOOD, impl="triton")
