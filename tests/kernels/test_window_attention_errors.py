"""Every wrong argument of window attention is named, with what came and what is accepted."""

from __future__ import annotations

import pytest
import torch

from linfusion.kernels import TileOrder, library, window_attention

X = torch.ones(2, 6, 3, 8)
PAIR = (X[:, :4], X[:, :4])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": X[0]}, r"q: expected 4 axes \[B, N, H, D\], got shape \(6, 3, 8\)"),
        ({"k": None}, r"k: expected a tensor \[B, N, H, D\], got NoneType"),
        ({"k": X[:, :5]}, r"k: expected the shape of q, \(2, 6, 3, 8\), got \(2, 5, 3, 8\)"),
        ({"v": X[..., :4]}, r"v: expected the shape of q, \(2, 6, 3, 8\), got \(2, 6, 3, 4\)"),
        ({"v": X.int()}, r"v: expected a real floating dtype .* got torch.int32"),
        ({"q": X[:, :0]}, r"q: expected every axis .* at least 1, got shape \(2, 0, 3, 8\)"),
        ({"v": X.half()}, r"v: expected the dtype of q, torch.float32, got torch.float16"),
        ({"k": X.to("meta")}, r"k: expected the device of q, cpu, got meta"),
        ({"grid": (2, 4)}, r"grid: expected one of the 6 tokens of q, got \(2, 4\) of 8"),
        ({"grid": (6,)}, r"grid: expected \(h, w\) or \(t, h, w\), positive integers, got \(6,\)"),
        ({"grid": 6}, r"grid: expected \(h, w\) or \(t, h, w\), positive integers, got 6"),
        ({"grid": (-2, -3)}, r"grid: expected .* positive integers, got \(-2, -3\)"),
        ({"grid": (2.0, 3.0)}, r"grid: expected .* positive integers, got \(2.0, 3.0\)"),
        ({"radius": 0}, r"radius: expected a number of tokens above 0, got 0"),
        ({"radius": -8}, r"radius: expected a number of tokens above 0, got -8"),
        ({"radius": float("nan")}, r"radius: expected a number of tokens above 0, got nan"),
        ({"radius": None}, r"radius: expected a number of tokens above 0, got None"),
        ({"radius": True}, r"radius: expected a number of tokens above 0, got True"),
        ({"shape": "circle"}, r"shape: expected one of \('disc', 'square'\), got 'circle'"),
        ({"scale": float("inf")}, r"scale: expected a finite number or None, got inf"),
        ({"scale": "auto"}, r"scale: expected a finite number or None, got 'auto'"),
        (
            {"context": X},
            r"context: expected a pair \(k, v\) of tensors \[B, T, H, D\], got Tensor",
        ),
        ({"context": (X,)}, r"context: expected a pair \(k, v\) .* got 1 entries"),
        ({"pooled": (X, None)}, r"pooled v: expected a tensor \[B, P, H, D\], got NoneType"),
        ({"context": (X[:1], X[:1])}, r"context k: expected batch 2, 3 heads .* got shape \(1, 6"),
        ({"context": (X, X[:, :5])}, r"context: expected keys and values of one shape, got"),
        ({"pooled": (X.half(), X)}, r"pooled k: expected the dtype of q, torch.float32, got"),
        (
            {"pooled": (X[:, :0], X[:, :0])},
            r"pooled k: expected every axis of \[B, P, H, D\] to be",
        ),
        ({"cells": 2}, r"cells: expected None or a positive integer .* grid \(2, 3\), got 2"),
        ({"cells": (2, 0)}, r"cells: expected None or a positive integer .* got \(2, 0\)"),
        ({"cells": (2, 2)}, r"cells: expected pooled tokens with cells \(2, 2\), got none"),
        (
            {"cells": (2, 2), "pooled": PAIR},
            r"pooled: expected 2 tokens, one for each cell of \(2, 2\) of grid \(2, 3\), got 4",
        ),
        (
            {"order": TileOrder((3, 2))},
            r"order: expected .* of grid \(2, 3\), got that of \(3, 2\)",
        ),
        ({"order": True}, r"order: expected None or the TileOrder of grid \(2, 3\), got bool"),
        (
            dict.fromkeys("qkv", X.double()) | {"impl": "triton"},
            r"impl: 'triton' takes float16",
        ),
        (
            dict.fromkeys("qkv", X[..., :7]) | {"impl": "triton"},
            r"impl: 'triton' takes head dimensions from 8 to 128, got 7; 'blocked' and 'reference'",
        ),
        ({"impl": "flex"}, r"impl: expected None or one of .*'reference'.* got 'flex'"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {"q": X, "k": X, "v": X, "grid": (2, 3), "radius": 2} | change
    with pytest.raises(ValueError, match=message):
        window_attention(**arguments)


def test_a_mask_is_not_an_argument():
    with pytest.raises(TypeError, match="attention_mask"):
        window_attention(X, X, X, grid=(2, 3), radius=2, attention_mask=torch.ones(6, 6))


def test_float64_is_not_mixed_under_autocast():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"k: expected the dtype of q, .* got torch.float64"),
    ):
        window_attention(X, X.double(), X, grid=(2, 3), radius=2)


def test_an_order_of_no_grid_is_refused():
    with pytest.raises(ValueError, match=r"grid: expected .* positive integers, got \(4, 0\)"):
        TileOrder((4, 0))


def test_an_order_of_another_grid_does_not_permute():
    with pytest.raises(ValueError, match=r"x: expected the 8 tokens of grid \(2, 4\) along axis 1"):
        TileOrder((2, 4)).permute(X)


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(library, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: 'triton' needs tensors on a CUDA or ROCm device"):
        window_attention(X, X, X, grid=(2, 3), radius=2, impl="triton")


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(library, "HAS_TRITON", False)
    with pytest.raises(ImportError, match="pip install triton"):
        window_attention(X, X, X, grid=(2, 3), radius=2, impl="triton")
