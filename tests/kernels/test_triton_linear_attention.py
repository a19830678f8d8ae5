"""The Triton kernels, interpreted on a CPU, against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from linfusion.kernels import linear_attention
from linfusion.kernels.linear_attention import reference
from linfusion.kernels.linear_attention import triton as kernels
from linfusion.kernels.linear_attention.common import Choices
from linfusion.kernels.linear_attention.triton_configs import num_splits

# Relative RMS error against float64. Wrong signs, masks or scales are errors of order one.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-4}

# queries, keys, D, Dv
SHAPES = [
    (1, 63, 8, 8),
    (200, 5, 40, 40),
    (63, 200, 40, 24),
    (63, 200, 64, 64),
    (200, 63, 80, 80),
    (63, 33, 160, 160),
    (20, 33, 40, 160),
    (33, 20, 160, 40),
]
CHOICES = [
    ("elu1", "mean"),
    ("elu1", "sum"),
    ("elu1", "none"),
    ("relu", "mean"),
    ("relu", "sum"),
    ("relu", "none"),
    ("relu_eps", "mean"),
    ("identity", "none"),
]


def inputs(n: int, m: int, d: int, dv: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, and a gradient of the output, for two batches of two heads."""
    g = torch.Generator().manual_seed(n * 1000 + d)
    shapes = (n, d), (m, d), (m, dv), (n, dv)
    return tuple(torch.randn(2, t, 2, c, generator=g).to(dtype) for t, c in shapes)


def key_weight(m: int) -> Tensor:
    """Weights in [0, 1], a third of them zero, at least one of them one."""
    w = torch.rand(2, m, generator=torch.Generator().manual_seed(m))
    w = w.where(w > 1 / 3, 0)
    w[:, 0] = 1
    return w


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    w: Tensor | None,
    feature_map: str,
    normalizer: str,
    splits: int | None = None,
) -> tuple[Tensor, ...]:
    """Output and gradients by the kernels."""
    choices = Choices(feature_map, normalizer, 1e-4)
    state = kernels.state_forward(k, v, w, feature_map, splits=splits)
    o = kernels.read_forward(q, state, choices, v.dtype)
    grads = kernels.attention_backward(do, q, k, v, w, state, choices, splits=splits)
    return o, *grads


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    w: Tensor | None,
    feature_map: str,
    normalizer: str,
) -> tuple[Tensor, ...]:
    """Output and gradients by the definition, in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    state = reference.state_forward(k, v, w, feature_map)
    choices = Choices(feature_map, normalizer, 1e-4)
    o = reference.read_forward(q, state, choices, torch.float64)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do.double())


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).square().mean() / truth.square().mean()).sqrt().item()


def check(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for name, a, b in zip(("o", "dq", "dk", "dv"), ours, truth, strict=True):
        assert a.dtype == dtype, name
        assert error(a, b) <= TOLERANCE[dtype], name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that is allocated and not yet written holds NaN."""

    def poison(allocate):  # type: ignore[no-untyped-def]
        def empty(*args, **kwargs):  # type: ignore[no-untyped-def]
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return empty

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("n", "m", "d", "dv"), SHAPES)
def test_output_and_gradients_agree_with_the_definition(n, m, d, dv, dtype, poisoned):
    tensors = inputs(n, m, d, dv, dtype)
    check(run(*tensors, None, "elu1", "mean"), exact(*tensors, None, "elu1", "mean"), dtype)


@pytest.mark.parametrize("d", [40, 80], ids=["fused", "split"])
@pytest.mark.parametrize(("feature_map", "normalizer"), CHOICES)
def test_every_feature_map_and_normalizer_agrees(feature_map, normalizer, d, poisoned):
    tensors, w = inputs(63, 70, d, d, torch.float32), key_weight(70)
    choice = (w, feature_map, normalizer)
    check(run(*tensors, *choice), exact(*tensors, *choice), torch.float32)


def test_one_key_gives_its_value(poisoned):
    # o = v·z/(z + ε): ε is 1e-4, z about 40.
    tensors = inputs(200, 1, 40, 40, torch.float32)
    o, _, _, dv = run(*tensors, None, "elu1", "mean")
    truth = exact(*tensors, None, "elu1", "mean")
    assert error(o, truth[0]) <= TOLERANCE[torch.float32]
    assert error(dv, truth[3]) <= TOLERANCE[torch.float32]


def test_the_widest_head_agrees(poisoned):
    q, k, v, _ = inputs(2, 3, 576, 576, torch.float32)
    q, k, v = (x[:1, :, :1] for x in (q, k, v))
    state = kernels.state_forward(k, v, None, "elu1")
    choices = Choices("elu1", "mean", 1e-4)
    o = kernels.read_forward(q, state, choices, torch.float32)
    state = reference.state_forward(k.double(), v.double(), None, "elu1")
    truth = reference.read_forward(q, state, choices, torch.float64)
    assert error(o, truth) <= TOLERANCE[torch.float32]


def test_a_head_of_288_has_the_right_gradients(poisoned):
    tensors = inputs(5, 7, 288, 288, torch.float32)
    tensors = tuple(x[:1, :, :1] for x in tensors)
    check(run(*tensors, None, "elu1", "mean"), exact(*tensors, None, "elu1", "mean"), torch.float32)


@pytest.mark.parametrize("d", [40, 80], ids=["fused", "split"])
def test_identity_agrees_with_the_mean_normaliser(d, poisoned):
    # Of one sign, as what is mapped already is: else a denominator may be anywhere near zero.
    q, k, v, do = inputs(63, 70, d, d, torch.float32)
    choice = (q.abs(), k.abs(), v, do, key_weight(70), "identity", "mean")
    check(run(*choice), exact(*choice), torch.float32)


@pytest.mark.parametrize("splits", [1, 3, 7, 9])
def test_splitting_the_tokens_changes_nothing(splits, poisoned):
    # 200 tokens are seven blocks of 32: with seven splits one each, with nine the last two empty.
    tensors = inputs(200, 200, 40, 40, torch.float32)
    ours = run(*tensors, None, "elu1", "mean", splits=splits)
    check(ours, exact(*tensors, None, "elu1", "mean"), torch.float32)


def test_three_runs_give_the_same_bits():
    tensors = inputs(70, 130, 80, 80, torch.float16)
    first, *others = (run(*tensors, None, "elu1", "mean", splits=3) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_batch_changes_no_bits_when_the_splits_are_fixed():
    q, k, v, do = inputs(63, 200, 40, 40, torch.float32)
    both = run(q, k, v, do, None, "elu1", "mean", splits=3)
    alone = run(q[1:], k[1:], v[1:], do[1:], None, "elu1", "mean", splits=3)
    assert all(torch.equal(a[1:], b) for a, b in zip(both, alone, strict=True))


def test_masked_keys_leave_no_trace():
    q, k, v, do = inputs(20, 70, 40, 40, torch.float32)
    w = torch.ones(2, 70)
    w[:, 50:] = 0
    masked = run(q, k, v, do, w, "elu1", "mean")
    cut = run(q, k[:, :50], v[:, :50], do, None, "elu1", "mean")
    assert error(masked[0], cut[0].double()) <= TOLERANCE[torch.float32]
    assert not masked[2][:, 50:].any() and not masked[3][:, 50:].any()


@pytest.mark.parametrize("normalizer", ["mean", "sum", "none"])
def test_no_key_at_all_gives_zeros(normalizer):
    tensors = inputs(5, 7, 40, 40, torch.float32)
    for x in run(*tensors, torch.zeros(2, 7), "elu1", normalizer):
        assert not x.any()


def test_a_row_of_zeros_under_relu_has_finite_gradients():
    # z = 0 + ε/c with SANA's ε: 1/z² would be infinite.
    q, k, v, do = inputs(5, 7, 40, 40, torch.float32)
    q[:, 0] = -1
    state = kernels.state_forward(k, v, None, "relu")
    args = (do, q, k, v, None, state, Choices("relu", "sum", 1e-30))
    assert all(g.isfinite().all() for g in kernels.attention_backward(*args))


def test_nan_is_not_hidden_by_a_feature_map():
    _, k, v, _ = inputs(3, 5, 40, 40, torch.float32)
    k[0, 2, 0, 7] = float("nan")
    for feature_map in ("elu1", "relu", "identity"):
        kv, k_mean, _ = kernels.state_forward(k, v, None, feature_map)
        assert kv[0, 0, 7].isnan().all() and k_mean[0, 0, 7].isnan()


def views(layout: str, x: Tensor) -> Tensor:
    """The values of `x` [B, N, H, D] in another layout of memory."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one of three projections":
        return torch.stack([x, x, x], 2)[:, :, 1]
    if layout == "odd strides":
        return torch.nn.functional.pad(x, (0, 1))[..., :-1]
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # features outermost


@pytest.mark.parametrize(
    "layout", ["heads first", "one of three projections", "odd strides", "features outermost"]
)
def test_the_layout_of_memory_changes_no_bits(layout):
    tensors = inputs(63, 70, 40, 40, torch.float32)
    other = tuple(views(layout, x) for x in tensors)
    assert all(a.stride() != b.stride() for a, b in zip(tensors, other, strict=True))
    choice = (None, "elu1", "mean")
    for a, b in zip(run(*tensors, *choice), run(*other, *choice), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", ["batch", "token", "head"])
def test_offsets_beyond_two_to_the_31_are_right(axis):
    # Four gigabytes of address space, of which a few pages are touched.
    far = {"batch": (2**31, 64, 32, 1), "token": (64, 2**30, 32, 1), "head": (64, 128, 2**31, 1)}
    q, k, v, do = inputs(3, 3, 32, 32, torch.float16)
    if axis == "token":
        q, k, v, do = (x[:1] for x in (q, k, v, do))
    memory = torch.empty(2**31 + 4096, dtype=torch.float16)
    near = run(q, k, v, do, None, "elu1", "mean", splits=1)
    for i, x in enumerate((q, k, v, do)):
        view = memory.as_strided(x.shape, far[axis])
        view.copy_(x)
        tensors = [view if i == j else y for j, y in enumerate((q, k, v, do))]
        ours = run(*tensors, None, "elu1", "mean", splits=1)
        assert all(torch.equal(a, b) for a, b in zip(ours, near, strict=True))


@pytest.mark.parametrize("d", [40, 80], ids=["fused", "split"])
def test_the_public_function_runs_these_kernels_and_their_gradients(d):
    q, k, v, do = inputs(20, 33, d, d, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = linear_attention(q, k, v, impl="triton")
    grads = torch.autograd.grad(o, leaves, do)
    truth = exact(*(x.detach() for x in (q, k, v)), do, None, "elu1", "mean")
    check((o, *grads), truth, torch.float32)


def test_the_number_of_splits_sees_tokens_through_powers_of_two():
    def splits(tokens: int) -> int:
        return num_splits(tokens, d=64, groups=16, block=64, multiprocessors=132)

    assert len({splits(n) for n in range(4096, 8192, 97)}) == 1
    assert splits(63) == 1
    assert splits(1 << 22) == 33  # four waves of 132 programs over 16 heads
    assert all(splits(n) <= max(1, n // 64) for n in (1, 64, 200, 1000))
