"""Distances between sets of pictures, over their features, and between pairs of pictures."""

import math

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


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel (Bińkowski et al. 2018, KID, eq. 4).

    mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{ij} k(x_i, y_j),
    k(a, b) = (a·b / F + 1)³

    Being unbiased it is 0 in expectation for equal distributions, and may be negative.

    Args:
        x, y: features [N, F] and [M, F]; N, M at least 2. Computed in float64.

    Raises:
        ValueError: shapes that do not agree, too few samples, or features that are not finite.
    """
    x, y = _features(x, y)
    return (_off_diagonal_mean(x) + _off_diagonal_mean(y) - 2 * _kernel(x, y).mean()).item()


def kernel_distance_subsets(
    x: Tensor, y: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of `kernel_distance` over random subsets, as KID is published.

    Args:
        x, y: features [N, F] and [M, F].
        subsets: how many are drawn.
        subset_size: rows drawn, without replacement, from each of x and y.
        seed: of the draws.

    Raises:
        ValueError: as `kernel_distance`, or a subset larger than x or y.
    """
    x, y = _features(x, y)
    if subsets < 1:
        raise ValueError(f"subsets: got {subsets}, accepted is 1 or more")
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(
            f"subset_size: got {subset_size}, accepted is 2 to {min(len(x), len(y))} here"
        )
    g = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        i, j = (torch.randperm(len(t), generator=g)[:subset_size].to(t.device) for t in (x, y))
        distances.append(kernel_distance(x[i], y[j]))
    d = torch.tensor(distances, dtype=torch.float64)
    return d.mean().item(), d.std(unbiased=False).item()


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


def _off_diagonal_mean(x: Tensor) -> Tensor:
    k = _kernel(x, x)
    return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))
