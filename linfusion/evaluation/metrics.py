"""Distances between sets of pictures, over their features, and between pairs of pictures."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (Heusel et al. 2017, FID, eq. 6).

    d² = |μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½)

    With Σ_x = AᵀA and Σ_y = BᵀB the last trace is the nuclear norm of A Bᵀ, so no matrix root is
    taken and singular covariances (fewer samples than features) are exact as well.

    Args:
        x, y: features [N, F] and [M, F]; N, M at least 2. Computed in float64.

    Raises:
        ValueError: shapes that do not agree, too few samples, or features that are not finite.
    """
    x, y = _features(x, y)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    a, b = (_root_of_covariance(t) for t in (x, y))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    # Rounding can leave a tiny negative number where the distance is 0.
    return max(0.0, (mean + a.square().sum() + b.square().sum() - 2 * cross).item())


def kernel_distance(x: Tensor, y: Tensor, *, pairs: Tensor | None = None) -> float:
    """Unbiased squared MMD with the cubic kernel (Bińkowski et al. 2018, KID, eq. 4).

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{ij} k(x_i, y_j),
    k(a, b) = (a·b / F + 1)³

    Being unbiased it is 0 in expectation for equal distributions, and may be negative.

    That holds for independent x and y. Pictures drawn from the captions of the very pictures they
    are compared with are not: k(x_i, y_i) is large, which biases the distance low, and the choice
    of captions is noise in x that y does not share. With `pairs` the distance is the U-statistic
    over the pairs (Gretton et al. 2012, A Kernel Two-Sample Test, eq. 4), which estimates the same
    quantity, is unbiased for dependent pairs, and in which the noise of the captions cancels:

    mean_{i≠j} k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i)

    Args:
        x, y: features [N, F] and [M, F]; N, M at least 2. Computed in float64.
        pairs: for each row of x the row of y that it depends on, integers [N] in [0, M) of at
            least 2 values; rows of y that no x names are left out, and so are the terms of two x
            of one y.

    Raises:
        ValueError: shapes that do not agree, too few samples, or features that are not finite.
    """
    x, y = _features(x, y)
    if pairs is None:
        w, v = torch.ones(1, len(x), device=x.device), torch.ones(1, len(y), device=x.device)
    else:
        pairs = _pairs(pairs, x, y)
        w = v = torch.ones(1, len(x), device=x.device)
    return _weighted_distances(x, y, pairs, w.double(), v.double()).item()


class KernelRatio(NamedTuple):
    """How much farther x is from z than y is: a ratio, and how sure it is.

    Attributes:
        ratio: kernel distance of x to z over that of y to z; nan where the latter is not positive.
        interval: the central part of the ratio's bootstrap distribution; (−inf, inf) where the
            distance of y to z cannot be told from 0, so that no ratio is.
        x_std, y_std: bootstrap standard errors of the two distances.
    """

    ratio: float
    interval: tuple[float, float]
    x_std: float
    y_std: float


def kernel_distance_ratio(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    *,
    pairs: Tensor | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> KernelRatio:
    """Ratio of two kernel distances to the same z, with an interval from the Bayesian bootstrap.

    Row i of x and of y come from equal prompt and noise, so they are weighed together, with the
    row of z they are paired with; what both share cancels in the ratio. Each draw gives the rows
    exponential weights (Rubin 1981, The Bayesian Bootstrap), under which the distances stay
    U-statistics: no row meets itself, as a row drawn twice would.

    Args:
        x, y: features [N, F] of student and teacher.
        z: features [M, F] of the real pictures.
        pairs: as in `kernel_distance`, for x and y alike; None weighs z independently.
        draws: of the bootstrap.
        level: share of the draws in the interval.
        seed: of the draws.

    Raises:
        ValueError: as `kernel_distance`, x and y of different length, or `draws` or `level`.
    """
    if x.shape != y.shape:
        raise ValueError(f"x, y: got {tuple(x.shape)} and {tuple(y.shape)}, accepted are equal")
    if draws < 1:
        raise ValueError(f"draws: got {draws}, accepted is 1 or more")
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, accepted is between 0 and 1")
    values = [kernel_distance(t, z, pairs=pairs) for t in (x, y)]
    (x, z), (y, _) = _features(x, z), _features(y, z)
    g = torch.Generator().manual_seed(seed)

    def weights(rows: int) -> Tensor:
        drawn = torch.empty(draws, rows, dtype=torch.float64).exponential_(generator=g)
        return drawn.to(x.device)

    v = weights(len(z))
    w = weights(len(x)) if pairs is None else v[:, pairs]
    if pairs is not None:
        v = w
    a, b = (_weighted_distances(t, z, pairs, w, v) for t in (x, y))
    tail = (1 - level) / 2
    interval = (-math.inf, math.inf)
    if (b <= 0).double().mean() <= tail:
        ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=x.device)
        low, high = (a / b)[b > 0].quantile(ends).tolist()
        interval = (low, high)
    return KernelRatio(
        values[0] / values[1] if values[1] > 0 else math.nan,
        interval,
        a.std(unbiased=False).item(),
        b.std(unbiased=False).item(),
    )


# PSNR and SSIM are torchmetrics' too, which is one more dependency and computes in float32: two
# pictures that differ in one bit of a 16K picture have to differ here.
def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, in dB; infinite where they are equal.

    Args:
        x, y: pictures [B, C, H, W] in [0, 1].

    Returns:
        [B], float64.

    Raises:
        ValueError: shapes that do not agree.
    """
    x, y = _pictures(x, y)
    return -10 * (x - y).square().mean((1, 2, 3)).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004, eq. 13), the mean over channels.

    Gaussian window of 11 taps with σ = 1.5, only where it fits; K1 = 0.01, K2 = 0.03.

    Args:
        x, y: pictures [B, C, H, W] in [0, 1]; H and W at least 11.

    Returns:
        [B], float64, at most 1.

    Raises:
        ValueError: shapes that do not agree, or pictures smaller than the window.
    """
    x, y = _pictures(x, y)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"x, y: got pictures {tuple(x.shape)}, accepted are sides of 11 or more")
    taps = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    window = torch.exp(-taps.square() / (2 * 1.5**2))
    window /= window.sum()
    b, c = x.shape[:2]

    def blur(t: Tensor) -> Tensor:
        t = t.reshape(b * c, 1, *t.shape[2:])
        t = F.conv2d(F.conv2d(t, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))
        return t.view(b, c, *t.shape[2:])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return likeness.mean((1, 2, 3))


def _features(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x, y: got {tuple(x.shape)} and {tuple(y.shape)}, accepted are [N, F] and [M, F]"
        )
    for name, t in (("x", x), ("y", y)):
        if len(t) < 2:
            raise ValueError(f"{name}: got {len(t)} samples, accepted is 2 or more")
        if not t.isfinite().all():
            raise ValueError(f"{name}: got features that are not finite")
    return x.detach().double(), y.detach().double()


def _pictures(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 4 or x.shape != y.shape:
        raise ValueError(
            f"x, y: got {tuple(x.shape)} and {tuple(y.shape)}, accepted are equal [B, C, H, W]"
        )
    return x.detach().double(), y.detach().double()


def _root_of_covariance(x: Tensor) -> Tensor:
    """A [min(N, F), F] with AᵀA = cov(x)."""
    return torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1)).R


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _pairs(pairs: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if pairs.shape != (len(x),) or pairs.is_floating_point() or pairs.is_complex():
        raise ValueError(
            f"pairs: got {tuple(pairs.shape)} of {pairs.dtype}, accepted are {len(x)} integers"
        )
    low, high = pairs.min().item(), pairs.max().item()
    if low < 0 or high >= len(y) or low == high:
        raise ValueError(
            f"pairs: got rows {low} to {high}, accepted are 2 or more of 0 to {len(y) - 1}"
        )
    return pairs.long().to(x.device)


def _weighted_distances(x: Tensor, y: Tensor, pairs: Tensor | None, w: Tensor, v: Tensor) -> Tensor:
    """Kernel distances [B] for weights w [B, N] of x and v [B, M] of y ([B, N] with pairs)."""
    if pairs is None:
        cross = ((w @ _kernel(x, y)) * v).sum(1) / (w.sum(1) * v.sum(1))
        return _mean_of_others(_kernel(x, x), w) + _mean_of_others(_kernel(y, y), v) - 2 * cross
    y = y[pairs]
    cross = _kernel(x, y)
    h = _kernel(x, x) + _kernel(y, y) - cross - cross.T
    return _mean_of_others(h, w, pairs)


def _mean_of_others(k: Tensor, w: Tensor, groups: Tensor | None = None) -> Tensor:
    """Σ w_i w_j k_ij / Σ w_i w_j over the i, j that are not one row, or not of one group."""
    groups = torch.arange(len(k), device=k.device) if groups is None else groups
    others = (groups[:, None] != groups[None, :]).double()
    return ((w @ (k * others)) * w).sum(1) / ((w @ others) * w).sum(1)
