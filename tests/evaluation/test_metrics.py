"""Distances between sets and pairs of pictures."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from linfusion.evaluation import (
    frechet_distance,
    inception_features,
    kernel_distance,
    kernel_distance_ratio,
    psnr,
    random_features,
    ssim,
)


@pytest.fixture(scope="module")
def extract():
    """The random features, which take seconds to set up."""
    return random_features()


def features(n, f, seed, shift=0.0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed)) + shift


def with_moments(n, mean, std):
    """[n, F] in float64 whose sample mean and covariance are exactly `mean` and diag(std²)."""
    x = features(n, len(mean), 0).double()
    x = x - x.mean(0)
    x = torch.linalg.qr(x).Q * math.sqrt(n - 1)
    return x * torch.tensor(std, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


@pytest.mark.parametrize("n, f", [(50, 7), (7, 50)])
def test_frechet_distance_to_itself_is_zero(n, f):
    x = features(n, f, 0)
    assert frechet_distance(x, x) < 1e-10


@pytest.mark.parametrize("n, m, f", [(50, 40, 7), (7, 9, 50)])
def test_distances_are_symmetric(n, m, f):
    x, y = features(n, f, 0), features(m, f, 1, shift=0.3)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-10)
    assert kernel_distance(x, y) == pytest.approx(kernel_distance(y, x), rel=1e-10)


def test_frechet_distance_of_known_gaussians():
    x = with_moments(100, [0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    y = with_moments(80, [1.0, 1.0, 0.0], [1.0, 5.0, 1.0])
    # Commuting covariances: |Δμ|² + Σ (σ_x − σ_y)²
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + 9 + 4, rel=1e-9)


def test_frechet_distance_is_that_of_the_matrix_root():
    x, y = features(60, 5, 0).double(), (features(70, 5, 1) @ features(5, 5, 2)).double()
    a, b = torch.cov(x.T), torch.cov(y.T)
    cross = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


def test_kernel_distance_is_unbiased():
    """Over all ways to draw x and y from one finite population its mean is exactly 0."""
    population = features(7, 3, 0, shift=1.0)
    distances = []
    for chosen in itertools.combinations(range(7), 3):
        rest = [i for i in range(7) if i not in chosen]
        distances.append(kernel_distance(population[list(chosen)], population[rest]))
    assert abs(sum(distances)) / len(distances) < 1e-12 < max(map(abs, distances))


def test_kernel_distance_of_two_points_each():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    # k(a, b) = (ab + 1)³: k(1,2) = 27, k(0,3) = 1; cross: 1, 64, 1, 343
    assert kernel_distance(x, y) == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4)


def test_kernel_distance_of_pairs_is_unbiased():
    """Over all samples of two of five dependent pairs its mean is the MMD of the population."""
    y = features(5, 3, 0, shift=1.0).double()
    x = y + 0.1 * features(5, 3, 1)

    def k(a, b):
        return ((a @ b.T / 3 + 1) ** 3).mean()

    expected = (k(x, x) + k(y, y) - 2 * k(x, y)).item()
    samples = [list(s) for s in itertools.product(range(5), repeat=2)]
    paired, unpaired = (
        sum(kernel_distance(x[s], y[s], pairs=pairs) for s in samples) / len(samples)
        for pairs in (torch.arange(2), None)
    )
    assert paired == pytest.approx(expected, rel=1e-9)
    assert unpaired < expected - 1  # why pairs are needed


def test_a_pair_drawn_twice_counts_as_often_as_one_drawn_once():
    x, y = features(4, 3, 0), features(6, 3, 1)
    pairs = torch.tensor([5, 0, 2, 3])
    twice = kernel_distance(x.repeat(2, 1), y, pairs=pairs.repeat(2))
    assert twice == pytest.approx(kernel_distance(x, y, pairs=pairs), rel=1e-12)


def blurred(n, seed, by):
    """Heavy-tailed real features, and what a model that mimics each makes of them."""
    real = features(n, 8, seed) * (0.5 + features(n, 1, seed + 1).abs())
    return real, real * (1 - by) + 0.05 * features(n, 8, seed + 2)


def test_pairs_tell_a_ratio_that_independent_pictures_cannot():
    many, far = blurred(1500, 0, 0.24)
    near = blurred(1500, 0, 0.2)[1]
    every = torch.arange(1500)
    true = kernel_distance(far, many, pairs=every) / kernel_distance(near, many, pairs=every)
    few = slice(0, 100)
    paired = kernel_distance_ratio(far[few], near[few], many[few], pairs=torch.arange(100))
    low, high = paired.interval
    assert low < paired.ratio < high and low < true < high
    assert high - low < 0.5
    unpaired = kernel_distance_ratio(far[few], near[few], many[few])
    assert unpaired.interval == (-math.inf, math.inf)


def test_the_standard_error_is_the_spread_over_samples():
    found = []
    for i in range(40):
        real, x = blurred(100, 10 * i, 0.2)
        d = kernel_distance(x, real, pairs=torch.arange(100))
        error = kernel_distance_ratio(x, x, real, pairs=torch.arange(100), draws=200).x_std
        found.append((d, error))
    d, errors = torch.tensor(found).unbind(1)
    assert 0.6 < errors.mean() / d.std() < 1.6


@pytest.mark.parametrize("pairs", [None, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])])
def test_equal_pictures_have_a_ratio_of_exactly_one(pairs):
    x, z = features(8, 4, 0, shift=2.0), features(5, 4, 1)
    found = kernel_distance_ratio(x, x, z, pairs=pairs, draws=50)
    assert (found.ratio, found.interval) == (1, (1, 1)) and found.x_std == found.y_std > 0


def test_a_distance_of_nothing_has_no_ratio():
    x, y, z = features(50, 4, 0, shift=1.0), features(50, 4, 1), features(50, 4, 2)
    assert kernel_distance_ratio(x, y, z).interval == (-math.inf, math.inf)


@pytest.mark.parametrize(
    "pairs, said",
    [
        (torch.tensor([0, 1]), r"pairs: got \(2,\) of torch.int64, accepted are 3 integers"),
        (torch.zeros(3), "of torch.float32, accepted are 3 integers"),
        (torch.tensor([0, 1, 4]), "pairs: got rows 0 to 4, accepted are 2 or more of 0 to 3"),
        (torch.tensor([2, 2, 2]), "pairs: got rows 2 to 2, accepted are 2 or more of 0 to 3"),
    ],
)
def test_pairs_that_are_none_are_refused(pairs, said):
    with pytest.raises(ValueError, match=said):
        kernel_distance(torch.zeros(3, 5), torch.zeros(4, 5), pairs=pairs)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"draws": 0}, "draws: got 0, accepted is 1 or more"),
        ({"level": 1.0}, "level: got 1.0, accepted is between 0 and 1"),
        ({"y": torch.zeros(4, 5)}, r"x, y: got \(3, 5\) and \(4, 5\)"),
    ],
)
def test_a_ratio_that_cannot_be_is_refused(changes, said):
    given = {"x": torch.zeros(3, 5), "y": torch.zeros(3, 5), "z": torch.zeros(4, 5), **changes}
    with pytest.raises(ValueError, match=said):
        kernel_distance_ratio(**given)


def test_psnr_of_a_known_error():
    x = torch.full((2, 3, 16, 16), 0.5)
    assert psnr(x, x + 0.1).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(x, x).tolist() == [math.inf, math.inf]


def test_ssim_of_equal_pictures_is_one():
    x = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0))
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_ssim_of_flat_pictures_is_the_luminance_term():
    x, y = torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.8)
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.2**2 + 0.8**2 + 1e-4)
    assert ssim(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_ssim_is_the_windowed_formula():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 12, 11, generator=g, dtype=torch.float64)
    taps = torch.exp(-((torch.arange(11).double() - 5) ** 2) / 4.5)
    window = torch.outer(taps, taps) / taps.sum() ** 2
    values = []
    for top in range(2):
        a, b = x[0, 0, top : top + 11], y[0, 0, top : top + 11]
        ma, mb = (window * a).sum(), (window * b).sum()
        va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
        cov = (window * (a - ma) * (b - mb)).sum()
        values.append(
            (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
        )  # fmt: skip
    assert ssim(x, y).item() == pytest.approx(torch.stack(values).mean().item(), abs=1e-10)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
@pytest.mark.parametrize(
    "x, y, said",
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), r"x, y: got \(3, 4\) and \(3, 5\)"),
        (torch.zeros(1, 4), torch.zeros(3, 4), "x: got 1 samples"),
        (torch.zeros(3, 4), torch.full((3, 4), math.nan), "y: got features that are not finite"),
    ],
)
def test_unfit_features_are_refused(metric, x, y, said):
    with pytest.raises(ValueError, match=said):
        metric(x, y)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_pictures_of_two_shapes_are_refused(metric):
    with pytest.raises(ValueError, match=r"x, y: got \(1, 3, 16, 16\) and \(1, 3, 16, 17\)"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))


def test_features_of_what_is_no_picture_are_refused(extract):
    with pytest.raises(ValueError, match=r"images: got shape \(2, 1, 20, 20\)"):
        extract(torch.zeros(2, 1, 20, 20))


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
def test_distances_are_computed_in_float64(metric):
    x, y = features(20, 4, 0, shift=100.0), features(20, 4, 1, shift=100.0)
    assert metric(x, y) == metric(x.double(), y.double())


def test_pictures_below_the_window_are_refused():
    with pytest.raises(ValueError, match="sides of 11 or more"):
        ssim(torch.zeros(1, 3, 10, 20), torch.zeros(1, 3, 10, 20))


def test_random_features_are_the_same_every_time(extract):
    x = torch.rand(2, 3, 50, 40, generator=torch.Generator().manual_seed(0))
    first = extract(x)
    assert first.shape == (2, 944) and torch.equal(first, random_features()(x))


def test_random_features_tell_more_noise_from_less(extract):
    g = torch.Generator().manual_seed(0)
    real, drawn = torch.nn.functional.interpolate(torch.rand(48, 3, 4, 4, generator=g), 64).split(
        24
    )
    noise = torch.randn(drawn.shape, generator=g)
    near, far = (
        kernel_distance(extract((drawn + s * noise).clamp(0, 1)), extract(real))
        for s in (0.02, 0.1)
    )
    assert near < far / 2


def test_missing_torch_fidelity_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"linfusion\[metrics\]"):
        inception_features(Path(__file__))
