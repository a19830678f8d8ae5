"""What ranks do with rows and sums is what one process does, gradients included."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from linfusion.kernels import linear_attention, linear_read, linear_state
from linfusion.parallel.ranks import cut_rows
from tests.parallel.pool import run
from tests.parallel.sharing import watched

WORLDS = [1, 2, 3, 4]
DTYPES = {torch.float64: 1e-10, torch.float32: 2e-5}


def tokens(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def local(x, cuts, ranks, dim=1):
    """This rank's rows, as a leaf of its own."""
    mine = x.narrow(dim, cuts[ranks.rank], cuts[ranks.rank + 1] - cuts[ranks.rank])
    return mine.clone().requires_grad_()


def error(found, expected):
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found - expected).abs().max() / scale)


def compare(ranks, cuts, single, sharded, dims, dtype):
    """Errors of the output and of the gradients of every input.

    Args:
        single: inputs -> output of one process.
        sharded: this rank's inputs -> its rows of the output, or the whole (replicated).
        dims: the dimension along which each input is split; None for one that all ranks have.
    """
    inputs = [x.clone().requires_grad_() for x in single[1]]
    out = single[0](*inputs)
    weight = tokens(dtype, *out.shape, seed=9)
    (out * weight).sum().backward()

    mine = [
        x.detach().clone().requires_grad_() if dim is None else local(x.detach(), cuts, ranks, dim)
        for x, dim in zip(inputs, dims, strict=True)
    ]
    found = sharded(*mine)
    replicated = found.shape == out.shape and ranks.world > 1
    part = slice(cuts[ranks.rank], cuts[ranks.rank + 1])
    # The sum of all ranks' losses is that of one process.
    share = weight / ranks.world if replicated else weight[:, part]
    (found * share).sum().backward()
    errors = [error(found, out if replicated else out[:, part])]
    for x, y, dim in zip(inputs, mine, dims, strict=True):
        grad = y.grad if dim is not None else ranks.gather(y.grad).sum(0)
        expected = x.grad if dim is None else x.grad.narrow(dim, part.start, part.stop - part.start)
        errors.append(error(grad, expected))
    return max(errors)


# ---- linear attention


def linear(ranks, cuts, dtype, masked):
    q, k, v = (tokens(dtype, 2, 13, 2, 4, seed=i) for i in range(3))
    weight = tokens(dtype, 2, 13).abs() if masked else None
    mine = None if weight is None else weight[:, cuts[ranks.rank] : cuts[ranks.rank + 1]]

    def sharded(q, k, v):
        state = ranks.merge_states(linear_state(k, v, key_weight=mine))
        return linear_read(q, state)

    def single(q, k, v):
        return linear_attention(q, k, v, key_weight=weight, impl="reference")

    return compare(ranks, cuts, (single, (q, k, v)), sharded, (1, 1, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", WORLDS)
def test_merged_states_are_the_state_of_all_tokens(world, dtype):
    for cuts in (cut_rows(13, world), (*range(world), 13)):  # as even as can be, and not at all
        assert max(run(world, linear, cuts, dtype, False)) < DTYPES[dtype]


def test_masked_keys_count_by_their_weights():
    assert max(run(3, linear, (0, 2, 9, 13), torch.float64, True)) < 1e-10


def of_one_chunk(ranks, cuts):
    """The gradient of k where each rank's backward keeps what it sees itself."""
    q, k, v = (tokens(torch.float64, 1, 12, 1, 4, seed=i) for i in range(3))
    mine = [local(x, cuts, ranks) for x in (q, k, v)]
    state = linear_state(mine[1], mine[2])
    merged = ranks.merge_states(state)
    cut = type(state)(*(m.detach() + (s - s.detach()) for m, s in zip(merged, state, strict=True)))
    results = []
    for read in (merged, cut):
        loss = linear_read(mine[0], read).square().sum()
        (grad,) = torch.autograd.grad(loss, mine[1], retain_graph=True)
        results.append(grad)
    return error(results[1], results[0])


def test_a_backward_of_ones_own_chunk_alone_is_seen_to_be_wrong():
    assert min(run(2, of_one_chunk, (0, 6, 12))) > 0.1


def counted(ranks, rows):
    """Bytes that this rank hands to collectives for one layer of linear attention, and back."""
    q, k, v = (tokens(torch.float32, 1, rows, 2, 4).requires_grad_() for _ in range(3))
    with watched() as sent:
        linear_read(q, ranks.merge_states(linear_state(k, v))).sum().backward()
    return sent


def test_what_linear_attention_sends_does_not_grow_with_the_picture():
    small, large = (run(2, counted, rows)[0] for rows in (16, 256))
    state = 4 * (2 * 4 * 5 + 1)  # H·D·(D + 1) numbers and a count, float32
    assert small == large == [state, state]  # to the one other rank, and gradients back


# ---- rows of others


def convolved(ranks, cuts, kernel, stride, pad, dtype):
    rows = cuts[-1]
    x = tokens(dtype, 2, rows, 3, 5)  # [B, rows, C, W]
    weight = tokens(dtype, 4, 3, kernel, kernel, seed=1)
    bias = tokens(dtype, 4, seed=2)
    out_rows = (rows + sum(pad) - kernel) // stride + 1
    out_cuts = tuple(c * out_rows // rows for c in cuts)

    def single(x, weight, bias):
        picture = F.pad(x.transpose(1, 2), (kernel // 2, kernel // 2, *pad))
        return F.conv2d(picture, weight, bias, stride).transpose(1, 2)

    def sharded(x, weight, bias):
        reads = [
            (a * stride - pad[0], (b - 1) * stride - pad[0] + kernel) for a, b in pairwise(out_cuts)
        ]
        wanted = [
            (min(max(a, 0), c), max(min(b, rows), d))
            for (a, b), c, d in zip(reads, cuts, cuts[1:], strict=False)
        ]
        extended = ranks.fetch(x, 1, cuts, wanted).transpose(1, 2)
        (low, high), (first, end) = reads[ranks.rank], wanted[ranks.rank]
        extended = extended[:, :, max(low - first, 0) : extended.shape[2] - max(end - high, 0)]
        border = (max(-low, 0), max(high - rows, 0))
        picture = F.pad(extended, (kernel // 2, kernel // 2, *border))
        return F.conv2d(picture, weight, bias, stride).transpose(1, 2)

    own = x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
    out = single(*own)
    upstream = tokens(dtype, *out.shape, seed=9)
    (out * upstream).sum().backward()
    mine = local(x, cuts, ranks), weight.requires_grad_(), bias.requires_grad_()
    found = sharded(*mine)
    part = slice(out_cuts[ranks.rank], out_cuts[ranks.rank + 1])
    (found * upstream[:, part]).sum().backward()
    rows_of = slice(cuts[ranks.rank], cuts[ranks.rank + 1])
    return max(
        error(found, out[:, part]),
        error(mine[0].grad, own[0].grad[:, rows_of]),
        error(ranks.gather(weight.grad).sum(0), own[1].grad),
        error(ranks.gather(bias.grad).sum(0), own[2].grad),
    )


@pytest.mark.parametrize(
    "world, cuts, kernel, stride, pad",
    [
        (2, (0, 4, 9), 3, 1, (1, 1)),
        (4, (0, 2, 4, 6, 8), 5, 1, (2, 2)),  # as many rows as are wanted of others
        (4, (0, 1, 2, 3, 7), 5, 1, (2, 2)),  # fewer: two neighbours
        (3, (0, 4, 8, 12), 3, 2, (1, 1)),  # Downsample2D
        (2, (0, 4, 8), 3, 2, (0, 1)),  # the VAE's encoder pads below alone
        (2, (0, 3, 8), 1, 1, (0, 0)),
    ],
)
def test_a_convolution_reads_the_rows_of_others(world, cuts, kernel, stride, pad):
    assert max(run(world, convolved, cuts, kernel, stride, pad, torch.float64)) < 1e-10
    assert max(run(world, convolved, cuts, kernel, stride, pad, torch.float32)) < 2e-5


# ---- moments, softmax


def normalised(ranks, cuts, mean, dtype):
    x = tokens(dtype, 2, cuts[-1], 8) + mean

    def single(x):
        return F.group_norm(x.transpose(1, 2), 4).transpose(1, 2)

    def sharded(x):
        groups = x.unflatten(2, (4, 2)).permute(0, 2, 1, 3).flatten(2)
        average = groups.mean(2)
        m2 = (groups - average[..., None]).square().sum(2)
        centre, variance = ranks.merge_moments(groups.shape[2], average, m2)
        out = (groups - centre[..., None]) * (variance + 1e-5).rsqrt()[..., None]
        return out.unflatten(2, (-1, 2)).permute(0, 2, 1, 3).flatten(2)

    return compare(ranks, cuts, (single, (x,)), sharded, (1,), dtype)


@pytest.mark.parametrize("world", WORLDS)
def test_moments_of_all_ranks_are_those_of_the_picture(world):
    assert max(run(world, normalised, (*range(0, 2 * world, 2), 11), 0.0, torch.float64)) < 1e-10


def test_moments_do_not_cancel():
    # Σx² - (Σx)²/n would lose 6 of float32's 7 digits here.
    assert max(run(3, normalised, (0, 3, 7, 12), 1e3, torch.float32)) < 1e-3


def read_by_text(ranks, cuts, dtype, text=5):
    q, k, v = (tokens(dtype, 2, n, 2, 4, seed=n) for n in (text, 13, 13))
    k, v = 3 * k, tokens(dtype, 2, 13, 2, 4, seed=2)

    def scores(q, k):
        return torch.einsum("bthd,bnhd->bthn", q, k) / 2

    def single(q, k, v):
        return torch.einsum("bthn,bnhd->bthd", scores(q, k).softmax(-1), v)

    def sharded(q, k, v):
        seen = scores(q, k)
        lse = seen.logsumexp(-1)
        part = torch.einsum("bthn,bnhd->bthd", (seen - lse[..., None]).exp(), v)
        return ranks.merge_softmax(part, lse)

    return compare(ranks, cuts, (single, (q, k, v)), sharded, (None, 1, 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", WORLDS)
def test_softmax_over_all_ranks_is_merged_exactly(world, dtype):
    cuts = (*range(world), 13)
    assert max(run(world, read_by_text, cuts, dtype)) < DTYPES[dtype]


def test_fewer_queries_than_ranks_are_merged_as_well():
    assert max(run(4, read_by_text, (0, 2, 5, 9, 13), torch.float64, 2)) < 1e-10


def joined(ranks, cuts, dtype):
    x = tokens(dtype, 2, cuts[-1], 3)

    def sharded(x):
        return ranks.join(x, 1, cuts)

    return compare(ranks, cuts, (lambda x: x * 1, (x,)), sharded, (1,), dtype)


def test_rows_of_all_ranks_are_joined_in_their_order():
    for dtype in (torch.bfloat16, torch.float64):  # bytes, whatever they mean
        assert max(run(4, joined, (0, 1, 5, 6, 12), dtype)) == 0


# ---- under torch.compile


def compiled(ranks):
    torch.compiler.reset()
    cuts = (0, 4, 8)

    def work(x):
        extended = ranks.fetch(x, 1, cuts, ranks.reach(cuts, 1, 1))
        return ranks.join(x, 1, cuts).sum() + extended.sum() + ranks.gather(x).sum()

    x = tokens(torch.float64, 2, 4, 3, seed=ranks.rank).requires_grad_()
    results = []
    for call in (work, torch.compile(work, backend="aot_eager", fullgraph=True)):
        out = call(x)
        results.append((out.detach(), *torch.autograd.grad(out, x)))
    return max(error(a, b) for a, b in zip(*results, strict=True))


def test_the_primitives_compile_without_a_break():
    assert max(run(2, compiled)) < 1e-12


def test_cuts_keep_units_together_and_refuse_too_many_ranks():
    assert cut_rows(9, 2, 2) == (0, 4, 9)
    assert cut_rows(10, 3) == (0, 3, 6, 10)
    with pytest.raises(
        ValueError, match=r"sp: got 4 ranks for 6 rows .* 2 stay together.* at most"
    ):
        cut_rows(6, 4, 2)
