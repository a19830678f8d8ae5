"""Every wrong argument of linear attention is named, with what came and what is accepted."""

from __future__ import annotations

import pytest
import torch

from linfusion.kernels import LinearState, library, linear_attention, linear_read, linear_state

X = torch.ones(2, 5, 3, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": X[0]}, r"q: expected 4 axes \[B, N, H, D\], got shape \(5, 3, 8\)"),
        ({"v": X.flatten(2)}, r"v: expected 4 axes \[B, M, H, E\], got shape \(2, 5, 24\)"),
        ({"k": None}, r"k: expected a tensor \[B, M, H, D\], got NoneType"),
        ({"q": X[:, :, :2]}, r"q: expected batch 2 and 3 heads as in k, got batch 2 and 2 heads"),
        ({"q": X[:1]}, r"q: expected batch 2 and 3 heads as in k, got batch 1 and 3 heads"),
        ({"v": X[:, :, :2]}, r"k, v: expected the same batch, tokens and heads"),
        ({"v": X[:, :4]}, r"k, v: expected the same .* got \(2, 5, 3, 8\) and \(2, 4, 3, 8\)"),
        ({"q": X[..., :7]}, r"q, k: expected one head dimension, got 7 in q and 8 in k"),
        ({"q": X.int()}, r"q: expected a real floating dtype .* got torch.int32"),
        ({"k": X.to(torch.complex64)}, r"k: expected a real floating .* got torch.complex64"),
        ({"v": X.bool()}, r"v: expected a real floating dtype .* got torch.bool"),
        ({"q": X[:, :0]}, r"q: expected every axis .* at least 1, got shape \(2, 0, 3, 8\)"),
        ({"k": X[:, :0], "v": X[:, :0]}, r"k: expected every axis of \[B, M, H, D\] to be at"),
        ({"eps": float("nan")}, r"eps: expected a finite number of at least 0, got nan"),
        ({"eps": float("inf")}, r"eps: expected a finite number of at least 0, got inf"),
        ({"eps": -1e-4}, r"eps: expected a finite number of at least 0, got -0.0001"),
        ({"eps": None}, r"eps: expected a finite number of at least 0, got None"),
        ({"feature_map": "softmax"}, r"feature_map: expected one of .*elu1.* got 'softmax'"),
        ({"feature_map": lambda x: x[:, :1]}, r"feature_map: expected it to keep the first three"),
        ({"normalizer": "max"}, r"normalizer: expected 'mean', 'sum' or None, got 'max'"),
        ({"normalizer": "none"}, r"normalizer: expected 'mean', 'sum' or None, got 'none'"),
        ({"impl": "cuda"}, r"impl: expected None or one of .*'blocked'.* got 'cuda'"),
        ({"key_weight": torch.ones(5)}, r"key_weight: expected shape \(2, 5\) or \(1, 5\), got"),
        ({"key_weight": torch.ones(2, 4)}, r"key_weight: expected shape .* got \(2, 4\)"),
        ({"key_weight": torch.ones(3, 5)}, r"key_weight: expected shape .* got \(3, 5\)"),
        ({"key_weight": torch.ones(2, 5).long()}, r"key_weight: expected a floating or bool"),
        ({"key_weight": [1.0] * 5}, r"key_weight: expected a floating or bool tensor, got list"),
        ({"q": X.to("meta")}, r"q: expected the device of k, cpu, got meta"),
        ({"v": X.to("meta")}, r"v: expected the device of k, cpu, got meta"),
        (
            {"key_weight": torch.ones(2, 5, requires_grad=True), "impl": "blocked"},
            r"key_weight: impl='blocked' has no gradient for it; .* impl='reference'",
        ),
        (
            {"q": X.double(), "impl": "triton"},
            r"impl: 'triton' takes float16, bfloat16 and float32, got float64",
        ),
        (
            {"q": X[..., :7], "k": X[..., :7], "impl": "triton"},
            r"impl: 'triton' takes head dimensions from 8 to 576, got \[7, 7, 8\]",
        ),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**({"q": X, "k": X, "v": X} | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": X[0]}, r"k: expected 4 axes \[B, M, H, D\], got shape \(5, 3, 8\)"),
        ({"v": X[:, :, :2]}, r"k, v: expected the same batch, tokens and heads"),
        ({"k": X.int()}, r"k: expected a real floating dtype .* got torch.int32"),
        ({"k": X[:, :0], "v": X[:, :0]}, r"k: expected every axis of \[B, M, H, D\] to be at"),
        ({"feature_map": "softmax"}, r"feature_map: expected one of .*elu1.* got 'softmax'"),
        ({"key_weight": torch.ones(2, 4)}, r"key_weight: expected shape .* got \(2, 4\)"),
        ({"impl": "cuda"}, r"impl: expected None or one of .*'blocked'.* got 'cuda'"),
    ],
)
def test_a_wrong_argument_of_a_state_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_state(**({"k": X, "v": X} | change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": X[0]}, r"q: expected 4 axes \[B, N, H, D\], got shape \(5, 3, 8\)"),
        ({"q": X.to(torch.complex64)}, r"q: expected a real floating .* got torch.complex64"),
        ({"q": X[:, :0]}, r"q: expected every axis .* at least 1, got shape \(2, 0, 3, 8\)"),
        ({"normalizer": "max"}, r"normalizer: expected 'mean', 'sum' or None, got 'max'"),
        ({"eps": float("inf")}, r"eps: expected a finite number of at least 0, got inf"),
    ],
)
def test_a_wrong_argument_of_a_read_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_read(**({"q": X, "state": linear_state(X, X)} | change))


def test_triton_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(library, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl: 'triton' needs tensors on a CUDA or ROCm device"):
        linear_attention(X, X, X, impl="triton")


def test_without_triton_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(library, "HAS_TRITON", False)
    with pytest.raises(ImportError, match="pip install triton"):
        linear_attention(X, X, X, impl="triton")


def test_a_state_of_another_shape_does_not_merge():
    with pytest.raises(ValueError, match=r"other: expected a state with kv \(2, 3, 8, 8\)"):
        linear_state(X, X).merge(linear_state(X[:1], X[:1]))


@pytest.mark.parametrize(
    "state, message",
    [
        (X, "state: expected a LinearState, got Tensor"),
        (linear_state(X[:1], X[:1]), "q: expected batch 1 and 3 heads as in state.kv"),
        (linear_state(X[..., :4], X), "q: expected head dimension 4 as in state.kv, got 8"),
        (LinearState(X, X[..., 0], X[0, 0, 0]), "state: expected k_mean .* and count"),
        (
            LinearState(*(x.half() for x in linear_state(X, X))),
            "state.kv: expected float32 or float64 throughout, got torch.float16",
        ),
    ],
)
def test_a_wrong_state_is_named(state, message):
    with pytest.raises(ValueError, match=message):
        linear_read(X, state)
