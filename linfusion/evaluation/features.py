"""Feature extractors for the distances: pictures [B, 3, H, W] in [0, 1] -> features [B, F]."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128  # every picture is brought to this size first, as Inception brings it to 299


def random_features(seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A fixed extractor that needs no download: rectified random filters on an image pyramid.

    At 128, 64, 32 and 16 px: zero-mean random 5×5 filters, absolute value, again random filters,
    absolute value; both pooled to 2×2; with the colours of a 4×4 grid that makes 944 features,
    each scaled to mean 0 and variance 1 over a fixed set of seeded synthetic pictures (random
    discs). It tells textures, edges, colours and coarse layout apart; it knows nothing of objects.
    It is not Inception, and its distances cannot be compared with any published FID or KID: only
    with each other, for the same seed.

    Pictures with more contrast or texture than discs lie outside that range, and the cubic kernel
    gives them most of the weight: over 600 emoji at 128 px |x|²/F has a median of 1.7 and a
    maximum of 8, and the kernel distance of 128 of them to the rest has a spread of 0.3 around 0.
    To compare two models take pairs (`kernel_distance_ratio`), where that spread cancels. Fixed
    scales, and not those of the pictures at hand, keep distances to different sets comparable.

    Args:
        seed: of the filters.

    Returns:
        A function [B, 3, H, W] in [0, 1] -> [B, 944], float32.
    """
    g = torch.Generator().manual_seed(seed)
    first = [_filters(24, 3, g) for _ in range(4)]
    second = [_filters(32, 24, g) for _ in range(4)]

    def raw(images: Tensor) -> Tensor:
        x = F.interpolate(
            images.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
        )
        found = []
        for one, two in zip(first, second, strict=True):
            one, two = one.to(x.device), two.to(x.device)
            a = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), one).abs()
            b = F.conv2d(F.pad(a, (2, 2, 2, 2), mode="reflect"), two, stride=2).abs()
            found += [
                F.adaptive_avg_pool2d(a, 2).flatten(1),
                F.adaptive_avg_pool2d(b, 2).flatten(1),
            ]
            x = F.avg_pool2d(x, 2)
        return torch.cat([*found, F.adaptive_avg_pool2d(x, 4).flatten(1)], 1)

    synthetic = raw(_discs(64, g))
    mean, std = synthetic.mean(0), synthetic.std(0)

    def extract(images: Tensor) -> Tensor:
        _check(images)
        with torch.no_grad():
            return (raw(images) - mean.to(images.device)) / std.to(images.device)

    extract.__name__ = f"random_features(seed={seed})"
    return extract


def inception_features(weights_path: str | Path) -> Callable[[Tensor], Tensor]:
    """The 2048 pooled features of the FID Inception network, through torch-fidelity.

    Args:
        weights_path: `weights-inception-2015-12-05-6726825d.pth` on this machine; nothing is
            downloaded.

    Raises:
        ImportError: torch-fidelity is missing (extra `metrics`).
        ValueError: there is no such file.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            'inception_features needs torch-fidelity: pip install "linfusion[metrics]"'
        ) from error
    if not Path(weights_path).is_file():
        raise ValueError(f"weights_path: there is no file {weights_path}")
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights_path)
    ).eval()

    def extract(images: Tensor) -> Tensor:
        _check(images)
        with torch.no_grad():
            return network.to(images.device)((images * 255).round().clamp(0, 255).byte())[0]

    extract.__name__ = "inception-v3-compat"
    return extract


def _check(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, accepted is [B, 3, H, W]")


def _filters(out: int, channels: int, g: torch.Generator) -> Tensor:
    """Random 5×5 filters of mean 0 and norm 1: they see structure, not brightness."""
    w = torch.randn(out, channels, 5, 5, generator=g)
    w -= w.mean((1, 2, 3), keepdim=True)
    return w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _discs(n: int, g: torch.Generator) -> Tensor:
    """n pictures of 24 overlapping discs of random place, size and colour."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, SIDE)] * 2, indexing="ij")
    images = torch.rand(n, 3, 1, 1, generator=g).expand(n, 3, SIDE, SIDE).clone()
    for _ in range(24):
        cx, cy, r = torch.rand(3, n, 1, 1, 1, generator=g)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < (0.02 + 0.3 * r**2) ** 2
        images = torch.where(inside, torch.rand(n, 3, 1, 1, generator=g), images)
    return images
