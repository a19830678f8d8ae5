"""Judging one large picture."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from linfusion.evaluation import psnr, ssim
from linfusion.evaluation.large_pictures import (
    consistency,
    patch_distances,
    patch_features,
    repetition_score,
    seam_score,
)


def texture(height, width, sigma, amplitude=20, seed=0):
    """Stationary noise of that smoothness around grey, float64 [H, W, 3]."""
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    kept = np.exp(-2 * (np.pi * sigma) ** 2 * (y**2 + x**2))[..., None]
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    noise = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) * kept, s=(height, width), axes=(0, 1))
    return noise / noise.std() * amplitude + 128


def bytes_of(picture):
    return picture.round().clip(0, 255).astype(np.uint8)


def rng_of(seed):
    return np.random.default_rng(seed)


def colours(images):
    """Mean and spread of each colour: an extractor of 6 features."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def statistics(images):
    """The pixels themselves, to see which crops were taken."""
    return images.flatten(1) * 255


# patches


def test_crops_of_equal_pictures_are_near_and_of_others_far():
    a, b, c = (bytes_of(texture(96, 128, s, seed=i)) for i, s in enumerate((2, 2, 6)))
    near, far = (patch_distances(a, [other], crop=16, n=64, extractor=colours) for other in (b, c))
    assert near["frechet"] < far["frechet"] / 2
    assert near["kernel"] < far["kernel"] / 2


def test_crops_are_parts_of_every_picture_in_turn():
    pictures = [np.full((20 + i, 30, 3), 100 * i, np.uint8) for i in range(3)]
    found = patch_features(pictures, crop=20, n=7, extractor=statistics)
    assert found[:, 0].round().tolist() == [0, 100, 200, 0, 100, 200, 0]
    assert found.shape == (7, 20 * 20 * 3)


def test_crops_reach_every_corner():
    marked = np.arange(12, dtype=np.uint8).reshape(3, 4, 1).repeat(3, 2)
    found = patch_features(marked, crop=2, n=100, extractor=statistics)
    assert set(found[:, 0].round().int().tolist()) == {0, 1, 2, 4, 5, 6}


def test_the_reference_is_cropped_elsewhere():
    """Otherwise a picture would be at distance 0 from itself, and from itself alone."""
    picture = bytes_of(texture(64, 64, 2))
    assert patch_distances(picture, picture, crop=16, n=32, extractor=colours)["frechet"] > 0


def test_the_same_seed_takes_the_same_crops():
    picture = bytes_of(texture(64, 64, 1))
    first, again, other = (
        patch_features(picture, crop=8, n=20, seed=s, extractor=colours) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_features_of_the_reference_may_be_kept():
    picture, real = (bytes_of(texture(64, 64, s)) for s in (1, 2))
    kept = patch_features(real, crop=8, n=20, seed=5, extractor=colours)
    found = patch_distances(picture, kept, crop=8, n=20, extractor=colours)
    assert found["kernel"] > 0 and found["frechet"] > 0


# consistency


def test_a_picture_of_the_repeated_pixels_of_its_base_is_consistent():
    base = bytes_of(texture(131, 20, 1))
    found = consistency(base.repeat(3, 0).repeat(3, 1), base)
    assert found == {"psnr": math.inf, "ssim": pytest.approx(1)}


@pytest.mark.parametrize("h, w", [(150, 13), (74, 11), (11, 13)])
def test_consistency_is_psnr_and_ssim_of_the_reduced_picture(h, w):
    picture, base = bytes_of(texture(4 * h, 4 * w, 3)), bytes_of(texture(h, w, 2, seed=1))
    x = picture.reshape(h, 4, w, 4, 3).mean((1, 3)) / 255
    x, y = (torch.from_numpy(t).permute(2, 0, 1)[None] for t in (x, base / 255))
    found = consistency(picture, base)
    assert found["psnr"] == pytest.approx(psnr(x, y).item(), rel=1e-9)
    assert found["ssim"] == pytest.approx(ssim(x, y).item(), rel=1e-9)


def test_boxes_of_fractional_size_weigh_what_they_cover():
    picture = bytes_of(texture(33, 45, 1))
    fine = picture.repeat(2, 0).repeat(2, 1)  # 66 x 90 -> 22 x 30: boxes of 1.5 px are 3 here
    expected = fine.reshape(22, 3, 30, 3, 3).mean((1, 3))
    base = bytes_of(expected)
    error = np.square((expected - base) / 255).mean()
    assert consistency(picture, base)["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-9)


# seams


def borders_of(seed, count):
    return np.sort(rng_of(seed).choice(np.arange(10, 13 * count + 20, 11), count, replace=False))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("seed, sigma", [(0, 0.0), (1, 0.8), (2, 2.0), (3, 6.0)])
def test_without_a_seam_borders_are_as_their_surroundings(seed, sigma, axis):
    picture = bytes_of(texture(192, 6144, sigma, seed=seed))
    picture = picture if axis == 0 else picture.swapaxes(0, 1)
    assert 0.98 < seam_score(picture, borders_of(seed, 10), axis) < 1.02


@pytest.mark.parametrize("step, least", [(1, 1.3), (2, 2.0)])
def test_a_tone_step_on_a_flat_picture_is_seen(step, least):
    picture = texture(128, 1024, 12, amplitude=10)
    for y in (32, 96):
        picture[y:] += step
    assert seam_score(bytes_of(picture), [32, 96]) > least


def test_the_grid_of_the_decoder_is_no_seam():
    picture = texture(160, 2048, 4)
    picture[::8] += 6  # 8 px is the period of a decoder's up-sampling
    picture = bytes_of(picture)
    assert seam_score(picture, [64, 104]) == pytest.approx(1, abs=0.05)
    assert seam_score(picture, [64, 104], period=5) > 1.1  # what the period is for


def test_borders_in_a_flat_picture():
    picture = np.full((64, 20, 3), 9, np.uint8)
    assert seam_score(picture, [32]) == 1
    picture[32:] += 1
    assert seam_score(picture, [32]) > 100


def test_an_edge_of_the_picture_at_one_border_of_many_is_one_border():
    picture = texture(64 * 21, 512, 2.0, amplitude=10)
    borders = list(range(21, 64 * 21, 21))
    clean = seam_score(bytes_of(picture), borders)
    picture[borders[30] :] += 100  # thousands of times the energy of any other row
    assert seam_score(bytes_of(picture), borders) < 1.2 * clean


def test_a_memory_mapped_picture_is_never_read_whole(tmp_path):
    picture = np.memmap(tmp_path / "large", np.uint8, "w+", shape=(16384, 16384, 3))  # a hole
    picture[8000:8200, ::64] = 50
    tracemalloc.start()
    try:
        seam_score(picture, [8100])
        patch_features(picture, crop=64, n=4, extractor=colours)
        assert tracemalloc.get_traced_memory()[1] < picture.nbytes / 50
    finally:
        tracemalloc.stop()


# repetitions


def scene(seed, objects, side=96):
    """Copies of one textured object [24, 24] on white, apart from each other."""
    patch = bytes_of(texture(side // 4, side // 4, 1.5, 60, seed))
    picture = np.full((side, side, 3), 255, np.uint8)
    for y, x in ((5, 9), (60, 14), (33, 61))[:objects]:
        y, x = y * side // 96, x * side // 96
        picture[y : y + len(patch), x : x + len(patch)] = patch
    return picture


def test_tiles_repeat_all():
    tile = bytes_of(texture(48, 40, 2, 40))
    assert repetition_score(np.tile(tile, (2, 2, 1))) > 0.95


@pytest.mark.parametrize("seed", [0, 1])
def test_a_single_object_repeats_little_and_copies_of_it_much(seed):
    assert repetition_score(scene(seed, 1)) < 0.3
    assert repetition_score(scene(seed, 3)) > 0.8


def test_a_flat_picture_repeats_nothing():
    assert repetition_score(np.full((40, 64, 3), 77, np.uint8)) == 0


def test_the_base_is_subtracted_at_its_own_size():
    base = scene(0, 3, side=48)
    large = np.asarray(Image.fromarray(base).resize((192, 192), Image.Resampling.NEAREST))
    assert repetition_score(large, base) == 0
    assert repetition_score(large, scene(0, 1, side=48)) > 0.4


# wrong calls

GREY = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: consistency(GREY / 1, GREY), r"picture: got float64 \(64, 64, 3\), accepted"),
        (lambda: consistency(GREY, GREY[..., 0]), r"base: got uint8 \(64, 64\), accepted"),
        (lambda: consistency(GREY[:32], GREY), "base: got 64 x 64 px, accepted is from 11 px"),
        (lambda: consistency(GREY, GREY[:10]), "base: got 64 x 10 px, accepted is from 11 px"),
        (lambda: consistency(GREY, GREY[:32]), "base: got 64 x 32 px, accepted is the aspect"),
        (lambda: seam_score(GREY, []), r"borders: got \[\], accepted are one or more of 3 to 61"),
        (lambda: seam_score(GREY, [2]), r"borders: got \[2\], accepted"),
        (lambda: seam_score(GREY, [20, 62]), r"borders: got \[20, 62\], accepted"),
        (lambda: seam_score(GREY, [20, 22]), "borders: got some 2 px apart, accepted is 3 or more"),
        (lambda: seam_score(GREY, range(8, 64, 8)), "borders: there is no row between them"),
        (lambda: seam_score(GREY, [20], 2), "axis: got 2, accepted"),
        (lambda: seam_score(GREY, [20], period=0), "period: got 0, accepted is 1 or more"),
        (lambda: repetition_score(GREY[:31]), "picture: got 64 x 31 px, accepted is 32 or more"),
        (lambda: repetition_score(GREY, GREY[:31]), "base: got 64 x 31 px"),
        (lambda: patch_features([], crop=8), "pictures: got none"),
        (lambda: patch_features(GREY, crop=65), "crop: got 65 px, accepted is 1 to the 64 px"),
        (lambda: patch_features(GREY, crop=0), "crop: got 0 px"),
        (lambda: patch_features(GREY, crop=8, n=1), "n: got 1, accepted is 2 or more"),
        (
            lambda: patch_distances(GREY, GREY[:9], crop=10),
            "crop: got 10 px, accepted is 1 to the 9 px of `reference`",
        ),
        (
            lambda: patch_distances(GREY, torch.zeros(5), crop=8),
            r"reference: got features \(5,\), accepted",
        ),
        (
            lambda: patch_distances(GREY, torch.zeros(5, 7), crop=8, n=2, extractor=colours),
            "reference: got 7 features, accepted are the 6",
        ),
    ],
)
def test_a_wrong_call_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()
