"""Distances between sets of clips, and their motion and flicker, against closed forms."""

import math

import numpy as np
import pytest
import torch

from linfusion.evaluation import clip_distances, clip_features, flicker, motion, random_features
from linfusion.evaluation.video_metrics import BATCH


def colours(images):
    """Mean red, green and blue: an extractor whose features are known."""
    return images.mean((2, 3))


def flat(values):
    """A clip [1, f, 4, 6, 3] of flat grey frames."""
    clip = np.array(values, np.uint8)[None, :, None, None, None]
    return np.tile(clip, (1, 1, 4, 6, 3))


def noise(n, f, seed=0, side=16):
    return np.random.default_rng(seed).integers(0, 256, (n, f, side, side, 3), np.uint8)


# Motion and flicker


def test_still_clips_neither_move_nor_flicker():
    clips = noise(3, 1).repeat(5, 1)
    assert motion(clips).tolist() == flicker(clips).tolist() == [0, 0, 0]


def test_a_fade_moves_and_does_not_flicker():
    clips = flat(range(0, 250, 10))
    assert motion(clips).item() == pytest.approx(10 / 255)
    assert flicker(clips).item() == pytest.approx(0, abs=1e-15)


def test_frames_that_alternate_are_all_flicker():
    clips = flat([30, 90] * 4)
    for figure in (motion, flicker):
        assert figure(clips).item() == pytest.approx(60 / 255)


def test_one_flash_counts_by_its_neighbours():
    clips = flat([100, 100, 160, 100, 100])
    assert motion(clips).item() == pytest.approx(2 * 60 / 4 / 255)
    assert flicker(clips).item() == pytest.approx((30 + 60 + 30) / 3 / 255)


def test_gaussian_noise_flickers_by_the_square_root_of_three_quarters_of_its_motion():
    g = np.random.default_rng(0)
    clips = (128 + 20 * g.standard_normal((1, 24, 64, 64, 3))).round().clip(0, 255).astype(np.uint8)
    assert motion(clips).item() * 255 == pytest.approx(20 * 2 / math.sqrt(math.pi), rel=0.01)
    assert (flicker(clips) / motion(clips)).item() == pytest.approx(math.sqrt(3 / 4), rel=0.01)


def test_black_to_white_is_a_motion_of_one():
    assert motion(flat([0, 255, 0])).item() == flicker(flat([0, 255, 0])).item() == 1


@pytest.mark.parametrize("figure", [motion, flicker])
def test_clips_are_judged_one_by_one_and_as_tensors_too(figure):
    clips = noise(3, 5)
    alone = torch.cat([figure(clips[i : i + 1]) for i in range(3)])
    assert torch.equal(figure(clips), alone)
    assert torch.equal(figure(torch.from_numpy(clips)), alone)
    assert alone.unique().numel() == 3


@pytest.mark.parametrize("figure", [motion, flicker])
def test_the_direction_of_time_makes_no_difference(figure):
    clips = noise(2, 6)
    torch.testing.assert_close(figure(clips), figure(clips[:, ::-1].copy()))


# Features and distances


def test_features_of_flat_frames():
    clips = np.concatenate([flat([0, 51, 255]), flat([255, 255, 255])])
    found = clip_features(clips, colours)
    frames, differences = [0.4, 1.0], [0.75, 0.5]  # the mean, and half the ends' distance / 2 + ½
    expected = torch.tensor([frames, differences], dtype=torch.float64)[..., None].expand(2, 2, 3)
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-6, rtol=0)


def test_long_clips_go_through_the_extractor_in_parts():
    sizes = []

    def extract(images):
        sizes.append(len(images))
        return colours(images)

    clips = noise(1, 2 * BATCH + 5, side=4)
    found = clip_features(clips, extract)
    assert max(sizes) == BATCH
    expected = torch.from_numpy(clips / 255.0).mean((1, 2, 3))
    torch.testing.assert_close(found.frames, expected, atol=1e-6, rtol=0)


def test_the_order_of_frames_shows_in_the_differences_alone():
    clips = noise(4, 6)
    shuffled = clips[:, [0, 3, 1, 5, 2, 4]]
    extract = random_features()
    x, y = clip_features(clips, extract), clip_features(shuffled, extract)
    torch.testing.assert_close(x.frames, y.frames, atol=1e-9, rtol=0)
    assert (x.differences - y.differences).abs().max() > 1e-2


def test_clips_are_at_no_distance_from_themselves():
    x = clip_features(noise(6, 3), colours)
    found = clip_distances(x, x)
    assert max(found.frames_frechet, found.differences_frechet) < 1e-10


def test_frechet_distances_of_shifted_clips():
    """Equal covariances: the distance is that of the means."""
    clips = noise(8, 4) // 2
    brighter = clips + np.uint8(51)
    found = clip_distances(clip_features(clips, colours), clip_features(brighter, colours))
    assert found.frames_frechet == pytest.approx(3 * 0.2**2, rel=1e-5)
    assert found.differences_frechet < 1e-9


def test_a_distance_of_motion_alone():
    still = np.concatenate([flat([v] * 3) for v in (100, 110, 120)])
    rising = np.concatenate([flat([v - 51, v, v + 51]) for v in (100, 110, 120)])
    x, y = clip_features(still, colours), clip_features(rising, colours)
    found = clip_distances(x, y)
    assert found.frames_frechet < 1e-9
    assert found.differences_frechet == pytest.approx(3 * 0.1**2, rel=1e-5)
    # all of x equal and all of y: (1/4 + 1)³ + (0.6² + 1)³ − 2 (0.5 · 0.6 + 1)³
    kernel = 1.25**3 + 1.36**3 - 2 * 1.3**3
    assert found.differences_kernel == pytest.approx(kernel, rel=1e-5)


def test_pairs_reach_the_kernel_distances():
    x, y = (clip_features(noise(6, 3, seed), colours) for seed in (0, 1))
    plain, paired = clip_distances(x, y), clip_distances(x, y, pairs=torch.arange(6))
    assert plain.frames_frechet == paired.frames_frechet
    assert plain.frames_kernel != paired.frames_kernel
    assert plain.differences_kernel != paired.differences_kernel


# Refused


@pytest.mark.parametrize(
    "clips",
    [noise(1, 3)[0], noise(1, 3).astype(np.float32), noise(1, 3)[..., :2], noise(1, 3)[:0]],
)
@pytest.mark.parametrize("figure", [motion, flicker, lambda clips: clip_features(clips, colours)])
def test_what_are_no_clips_is_refused(figure, clips):
    with pytest.raises(ValueError, match=r"^clips: got .*accepted is uint8 \[n, f, H, W, 3\]"):
        figure(clips)


def test_too_few_frames_are_refused():
    for figure, frames in ((motion, 1), (flicker, 2)):
        with pytest.raises(ValueError, match=rf"^clips: got {frames} frames, accepted is"):
            figure(noise(2, frames))
