"""Judge one large picture: its patches, its seams, its likeness to the base, its repetitions.

A picture is uint8 [H, W, 3] and may be a `np.memmap`: only crops and bands of it are ever read, so
that 16,384 px square takes tens of megabytes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from linfusion.evaluation.features import random_features
from linfusion.evaluation.metrics import frechet_distance, kernel_distance, ssim

_BATCH = 16  # crops through the extractor at a time
_ROWS = 64  # rows read at a time when reducing, and reduced rows compared at a time
_REACH = 2  # rows on either side that a border is compared with
_CONTROLS = 4  # and as many rows of its phase on either side, compared with their neighbours
_FLAT = 1e-3  # gradient energy of a flat row
_SIDE = 256  # pixels of the longer side at which repetitions are sought


def patch_features(
    pictures: np.ndarray | Sequence[np.ndarray],
    *,
    crop: int,
    n: int = 256,
    seed: int = 0,
    extractor: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Features [n, F] of random square crops, from each picture in turn.

    Args:
        pictures: one or several, uint8 [H, W, 3].
        crop: side of a crop in pixels of the picture; nothing is resized but by the extractor.
        n: crops in all, 2 or more.
        seed: of their places.
        extractor: images [B, 3, crop, crop] in [0, 1] -> features [B, F]; None is
            `random_features()`.

    Raises:
        ValueError: no pictures, what is no picture, or a crop that does not fit.
    """
    return _patch_features(_list(pictures, "pictures"), crop, n, [seed], extractor)


def patch_distances(
    pictures: np.ndarray | Sequence[np.ndarray],
    reference: np.ndarray | Sequence[np.ndarray] | Tensor,
    *,
    crop: int,
    n: int = 256,
    seed: int = 0,
    extractor: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Distances of random crops to those of a reference (after Chai et al. 2022, patch-FID).

    Crops are compared pixel for pixel: `crop` pixels of the large picture with as many of the
    reference, neither resized. With real pictures as reference it asks whether the large picture
    has, seen close, the detail that real pictures have at their own resolution. With the base
    picture brought to the large size by interpolation it asks how much was added to that.

    Both distances grow when n shrinks (Fréchet) or scatter more (kernel): compare equal n only.

    Args:
        pictures: what is judged, uint8 [H, W, 3], one or several.
        reference: the same of the reference, or features [M, F] that `patch_features` made of it
            with the same `crop` and `extractor`.
        crop: side of a crop in pixels.
        n: crops of the pictures, and of the reference.
        seed: of their places; the two are drawn independently.
        extractor: as in `patch_features`.

    Returns:
        {"frechet": `frechet_distance`, "kernel": `kernel_distance`}.

    Raises:
        ValueError: as `patch_features`, or reference features of another width.
    """
    pictures = _list(pictures, "pictures")
    _check_crops(pictures, "pictures", crop, n)
    if isinstance(reference, Tensor):
        if reference.ndim != 2 or len(reference) < 2:
            raise ValueError(
                f"reference: got features {tuple(reference.shape)}, accepted are [M, F], M >= 2"
            )
    else:
        reference = _list(reference, "reference")
        _check_crops(reference, "reference", crop, n)
    extractor = random_features() if extractor is None else extractor
    if not isinstance(reference, Tensor):
        reference = _patch_features(reference, crop, n, [seed, 1], extractor, "reference")
    x = _patch_features(pictures, crop, n, [seed], extractor)
    if reference.shape[1] != x.shape[1]:
        raise ValueError(
            f"reference: got {reference.shape[1]} features, accepted are the {x.shape[1]} of "
            "this extractor"
        )
    return {"frechet": frechet_distance(x, reference), "kernel": kernel_distance(x, reference)}


def consistency(picture: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """Likeness of a large picture to the one it was made from, at the size of the latter.

    Each pixel of the base is compared with the mean of the area that it covers in the picture
    (a box filter, of fractional width where the sizes are no multiples).

    Args:
        picture: uint8 [H, W, 3].
        base: uint8 [h, w, 3] with h <= H and w <= W, 11 px or more, of the picture's aspect ratio
            within 5 %.

    Returns:
        {"psnr": dB, infinite where equal, "ssim": at most 1}, as `metrics.psnr` and `metrics.ssim`.

    Raises:
        ValueError: what is no picture, or sizes that do not agree.
    """
    _check_picture(picture, "picture")
    _check_picture(base, "base")
    (height, width), (h, w) = picture.shape[:2], base.shape[:2]
    if min(h, w) < 11 or h > height or w > width:
        raise ValueError(
            f"base: got {w} x {h} px, accepted is from 11 px a side to the picture's "
            f"{width} x {height}"
        )
    if abs(np.log(height * w / (width * h))) > 0.05:
        raise ValueError(
            f"base: got {w} x {h} px, accepted is the aspect ratio of the picture's "
            f"{width} x {height}"
        )
    squares = likeness = 0.0
    window = 10  # rows that the window of SSIM reaches beyond the row it begins at
    for top in range(0, h - window, _ROWS):
        bottom = min(top + _ROWS + window, h)
        x = _reduced(picture, (h, w), top, bottom) / 255
        y = base[top:bottom] / 255
        last = bottom == h
        new = slice(None) if last else slice(bottom - top - window)  # the rest comes once more
        squares += float(np.square(x[new] - y[new]).sum())
        a, b = (torch.from_numpy(t).permute(2, 0, 1)[None] for t in (x, y))
        likeness += ssim(a, b).item() * (bottom - top - window)
    error = squares / base.size
    return {
        "psnr": float(-10 * np.log10(error)) if error else float("inf"),
        "ssim": likeness / (h - window),
    }


def seam_score(
    picture: np.ndarray, borders: Sequence[int], axis: int = 0, *, period: int = 8
) -> float:
    """Gradient energy across borders over that of their surroundings; 1.0 is no seam.

    e(y) is the mean squared difference of rows y − 1 and y, over columns and colours, ē(y) the mean
    of e(y − 2), e(y − 1), e(y + 1), e(y + 2), r(y) = ln((e(y) + δ) / (ē(y) + δ)), and

    score = exp(mean_b r(b) − mean_c r(c))

    with b the borders and c the rows of their phase that no border is near, up to four on either
    side of each: b ± k·period. Neighbouring rows share their detail, so ē takes away what the
    picture does at that place, and being symmetric also a slope of it. A decoder that upsamples by
    8 has a gradient energy of period 8 without any seam; the rows c take that away.

    Every border counts alike: one that meets an edge of the picture has a hundred times the energy
    of the others, and would be the score if energies were summed. δ is the energy of one grey level
    in one of a thousand values, below which a row is flat. Without a seam the score scatters around
    1 by the deviation of r over the root of the number of borders: about 0.5 % at 700 borders of a
    picture of 16,384 px, 1.5 % at 50.

    Args:
        picture: uint8 [H, W, 3].
        borders: indices of rows (axis 0) or columns (axis 1) where a band begins.
        axis: 0 for borders between rows, 1 between columns.
        period: pixels of the decoder's grid.

    Returns:
        The score; 1.0 where nothing changes across borders or anywhere near.

    Raises:
        ValueError: what is no picture, borders at the edge or nearer than 3 px to each other, or
            with no row of their phase between them.
    """
    _check_picture(picture, "picture")
    if axis not in (0, 1):
        raise ValueError(f"axis: got {axis}, accepted are 0 (between rows) and 1 (columns)")
    if period < 1:
        raise ValueError(f"period: got {period}, accepted is 1 or more")
    lines = picture if axis == 0 else picture.swapaxes(0, 1)
    sites = np.unique(np.asarray(borders, dtype=np.int64))
    first, last = _REACH + 1, len(lines) - _REACH - 1
    if not len(sites) or sites[0] < first or sites[-1] > last:
        raise ValueError(
            f"borders: got {list(borders)}, accepted are one or more of {first} to {last}"
        )
    if len(sites) > 1 and np.diff(sites).min() <= _REACH:
        raise ValueError(
            f"borders: got some {np.diff(sites).min()} px apart, accepted is {_REACH + 1} or more"
        )
    steps = period * np.arange(1, _CONTROLS + 1)
    controls = [_free(np.concatenate([b - steps, b + steps]), sites, first, last) for b in sites]
    if not any(map(len, controls)):
        raise ValueError(
            f"borders: there is no row between them at a multiple of {period} px from one; "
            "accepted are borders farther apart"
        )
    ratios = [
        np.mean([_log_ratio(lines[row - first : row + first]) for row in rows])
        for rows in (sites, np.concatenate(controls))
    ]
    return float(np.exp(ratios[0] - ratios[1]))


def repetition_score(picture: np.ndarray, base: np.ndarray | None = None) -> float:
    """How much of a picture's detail is found in it a second time, elsewhere.

    Objects that repeat are how diffusion above its trained size fails (He et al. 2023,
    ScaleCrafter, section 1). Sought are equal patches (in the spirit of Shechtman and Irani 2007,
    local self-similarities): the picture is reduced to 256 px, high-passed (less its Gaussian blur
    of 1/32 of the side), and each patch a of a quarter of the side, at every eighth, is compared
    with all patches b displaced by more than an eighth of the side, by

    s(a, b) = 2 ⟨a, b⟩ / (|a|² + |b|²), which is 1 for equal patches alone.

    The score is the mean over a, weighted by |a|², of the greatest s: 1 for a picture of 2 × 2
    equal tiles, 0 for a flat one. Rows of windows, waves or a straight horizon repeat rightly, so
    it says most as the excess over that of the base.

    Args:
        picture: uint8 [H, W, 3], 32 px or more.
        base: if given, its score, at the same size, is subtracted.

    Returns:
        In [0, 1], or [−1, 1] less that of the base.

    Raises:
        ValueError: what is no picture, or one that is too small.
    """
    given = {"picture": picture} if base is None else {"picture": picture, "base": base}
    for name, p in given.items():
        _check_picture(p, name)
        if min(p.shape[:2]) < 32:
            raise ValueError(f"{name}: got {p.shape[1]} x {p.shape[0]} px, accepted is 32 or more")
    side = min(_SIDE, *(max(p.shape[:2]) for p in given.values()))
    scores = [_self_similarity(p, side) for p in given.values()]
    return scores[0] - (scores[1] if base is not None else 0.0)


def _list(pictures: np.ndarray | Sequence[np.ndarray], name: str) -> list[np.ndarray]:
    found = [pictures] if isinstance(pictures, np.ndarray) else list(pictures)
    if not found:
        raise ValueError(f"{name}: got none, accepted is one or more")
    for picture in found:
        _check_picture(picture, name)
    return found


def _check_picture(picture: np.ndarray, name: str) -> None:
    dtype, shape = getattr(picture, "dtype", type(picture).__name__), np.shape(picture)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"{name}: got {dtype} {shape}, accepted is uint8 [H, W, 3]")


def _check_crops(pictures: Sequence[np.ndarray], name: str, crop: int, n: int) -> None:
    if n < 2:
        raise ValueError(f"n: got {n}, accepted is 2 or more")
    least = min(min(p.shape[:2]) for p in pictures)
    if not 1 <= crop <= least:
        raise ValueError(f"crop: got {crop} px, accepted is 1 to the {least} px of `{name}`")


def _patch_features(
    pictures: Sequence[np.ndarray],
    crop: int,
    n: int,
    seed: Sequence[int],
    extractor: Callable[[Tensor], Tensor] | None,
    name: str = "pictures",
) -> Tensor:
    _check_crops(pictures, name, crop, n)
    extractor = random_features() if extractor is None else extractor
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, n, _BATCH):
        crops = []
        for i in range(start, min(start + _BATCH, n)):
            picture = pictures[i % len(pictures)]
            y, x = (rng.integers(side - crop + 1) for side in picture.shape[:2])
            crops.append(picture[y : y + crop, x : x + crop])
        found.append(extractor(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2) / 255))
    return torch.cat(found)


def _reduced(picture: np.ndarray, size: tuple[int, int], top: int, bottom: int) -> np.ndarray:
    """Rows top to bottom [bottom − top, w, 3], float64, of the picture box-filtered to `size`."""
    height, width = picture.shape[:2]
    h, w = size
    edges = np.arange(w + 1) * (width / w)
    rows = []
    for i in range(top, bottom):
        low, high = i * height / h, (i + 1) * height / h
        total = np.zeros((width, 3))
        for start in range(int(low), int(np.ceil(high)), _ROWS):
            y = np.arange(start, min(start + _ROWS, int(np.ceil(high)), height))
            covered = np.minimum(y + 1, high) - np.maximum(y, low)
            total += np.einsum("y,yxc->xc", covered, picture[y[0] : y[-1] + 1])
        # The integral along x, taken at the fractional edges of the boxes.
        integral = np.concatenate([np.zeros((1, 3)), total.cumsum(0)])
        at = [np.interp(edges, np.arange(width + 1), integral[:, c]) for c in range(3)]
        rows.append(np.diff(np.stack(at, 1), axis=0) / ((high - low) * width / w))
    return np.stack(rows)


def _free(rows: np.ndarray, borders: np.ndarray, first: int, last: int) -> np.ndarray:
    """Those within the picture whose neighbourhood holds no border."""
    rows = rows[(rows >= first) & (rows <= last)]
    return rows[np.abs(rows[:, None] - borders).min(1) > _REACH]


def _log_ratio(lines: np.ndarray) -> float:
    """ln((e + δ) / (ē + δ)) of the middle of 2·(_REACH + 1) lines [·, L, 3]."""
    steps = np.diff(lines.astype(np.int16), axis=0)
    e = np.square(steps, dtype=np.float32).mean((1, 2), dtype=np.float64)
    around = (e.sum() - e[_REACH]) / (2 * _REACH)
    return float(np.log((e[_REACH] + _FLAT) / (around + _FLAT)))


def _self_similarity(picture: np.ndarray, side: int) -> float:
    scale = side / max(picture.shape[:2])
    h, w = (max(1, round(s * scale)) for s in picture.shape[:2])
    x = torch.from_numpy(_reduced(picture, (h, w), 0, h)).float().permute(2, 0, 1)  # [3, h, w]
    x = x - _blur(x, side / 32)
    patch, beyond = max(2, min(side // 4, h, w)), side / 8
    energy = F.conv2d(x.square().sum(0)[None, None], x.new_ones(1, 1, patch, patch))[0, 0]
    spectrum = torch.fft.rfft2(x)
    rows, columns = torch.arange(energy.shape[0]), torch.arange(energy.shape[1])
    weighted = total = 0.0
    for top in range(0, len(rows), max(1, side // 8)):
        for left in range(0, len(columns), max(1, side // 8)):
            a = torch.fft.rfft2(x[:, top : top + patch, left : left + patch], s=(h, w))
            product = torch.fft.irfft2(spectrum * a.conj(), s=(h, w)).sum(0)
            product = product[: len(rows), : len(columns)]  # where the patch does not wrap around
            own = energy[top, left]
            likeness = 2 * product / (own + energy).clamp_min(1e-6)
            far = ((rows - top).abs() > beyond)[:, None] | ((columns - left).abs() > beyond)
            if far.any():
                weighted += own.item() * likeness[far].max().clamp(0, 1).item()
                total += own.item()
    return weighted / total if total > 1 else 0.0


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [3, h, w], the edges repeated."""
    reach = min(int(3 * sigma + 0.5), min(x.shape[1:]) - 1)
    taps = torch.exp(-torch.arange(-reach, reach + 1, dtype=x.dtype).square() / (2 * sigma**2))
    taps /= taps.sum()
    x = F.pad(x[:, None], (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))[:, 0]
