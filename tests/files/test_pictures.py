"""Pictures written band by band and read back: exact, bounded in memory, whole or not there."""

from __future__ import annotations

import itertools
import os
import resource
import tracemalloc
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from linfusion.files.picture_formats import Preview
from linfusion.files.picture_reader import (
    bytes_needed,
    open_picture,
    read,
    read_parameters,
    size_of,
    writer,
)

SUFFIXES = [".png", ".jpg", ".jpeg", ".tif", ".tiff"]
MADE_WITH = {
    "prompt": "ein rotes Herz ❤ 赤いハート \0 \ud800",  # \ud800: half a surrogate pair
    "negative_prompt": "",
    "seed": 2**63,
    "stages": [{"size": [1024, 768], "strength": 0.4}, None, True],
}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 31 + y / 47 + shift) for shift in (0, 2, 4)]
    return (127.5 + 127 * np.stack(waves, -1)).astype(np.uint8)


def save(path: Path, picture: np.ndarray, rows: int = 16, **options: object) -> Path:
    height, width = picture.shape[:2]
    with writer(path, width, height, **{"parameters": {}, **options}) as out:
        for top in range(0, height, rows):
            out.write(picture[top : top + rows])
    return path


# Round trips


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    "height, width, rows",
    [(1, 1, 1), (37, 53, 1), (53, 37, 7), (256, 256, 256), (257, 255, 100), (513, 300, 600)],
)
def test_what_is_written_is_read_bit_for_bit(tmp_path, suffix, height, width, rows):
    picture = noise(height, width)
    path = save(tmp_path / f"a{suffix}", picture, rows)
    assert np.array_equal(read(path), picture)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pillow_reads_the_same_bits(tmp_path, suffix):
    picture = noise(301, 517)
    with Image.open(save(tmp_path / f"a{suffix}", picture, 40)) as image:
        assert np.array_equal(np.asarray(image), picture)


def test_tifffile_finds_one_tiled_bigtiff_page_with_the_same_bits(tmp_path):
    import tifffile

    picture = noise(301, 517)
    with tifffile.TiffFile(save(tmp_path / "a.tif", picture, 40)) as file:
        assert file.is_bigtiff and len(file.pages) == 1 and file.pages[0].is_tiled
        assert np.array_equal(file.asarray(), picture)


def test_a_jpeg_is_close(tmp_path):
    picture = smooth(230, 317)
    path = save(tmp_path / "a.jpg", picture, 33)
    assert np.abs(read(path).astype(int) - picture).mean() < 1  # another picture: about 80


def test_a_lower_quality_makes_a_smaller_jpeg(tmp_path):
    files = [save(tmp_path / f"{q}.jpg", noise(64, 64), quality=q) for q in (30, 95)]
    assert files[0].stat().st_size < files[1].stat().st_size / 2


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_how_bands_are_cut_changes_no_byte(tmp_path_factory, suffix, cuts):
    folder, picture = tmp_path_factory.mktemp("cuts"), noise(sum(cuts), 29)
    whole = save(folder / f"whole{suffix}", picture, rows=len(picture), preview=20)
    cut = folder / f"cut{suffix}"
    with writer(cut, 29, sum(cuts), parameters={}, preview=20) as out:
        for band in np.split(picture, np.cumsum(cuts)[:-1]):
            out.write(band)
    pixels = [read(path) for path in (whole, cut)]
    previews = [read(folder / f"{name}.preview.png") for name in ("whole", "cut")]
    assert np.array_equal(*pixels) and np.array_equal(*previews)


def test_bands_that_are_views_are_written_as_they_look(tmp_path):
    picture = noise(90, 120)[::-2, ::-2]
    assert np.array_equal(read(save(tmp_path / "a.png", picture)), picture)


def test_smooth_pictures_make_small_pngs(tmp_path):
    path = save(tmp_path / "a.png", smooth(600, 800), 64)
    assert path.stat().st_size < 0.4 * 600 * 800 * 3  # unfiltered: 0.9


# Regions


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_region_is_the_slice_of_the_whole(tmp_path_factory, suffix, data):
    picture, folder = noise(520, 300), tmp_path_factory.getbasetemp()
    path = folder / f"region{suffix}"
    if not path.exists():
        save(path, picture, 99)
    left, top = data.draw(st.integers(0, 299)), data.draw(st.integers(0, 519))
    width, height = data.draw(st.integers(1, 300 - left)), data.draw(st.integers(1, 520 - top))
    part = read(path, region=(left, top, width, height))
    assert np.array_equal(part, picture[top : top + height, left : left + width])


def test_a_region_of_a_tiff_needs_none_of_the_other_tiles(tmp_path):
    picture = noise(1100, 1100)
    path = save(tmp_path / "a.tif", picture, 200)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert np.array_equal(read(path, region=(300, 50, 700, 300)), picture[50:350, 300:1000])


@pytest.mark.parametrize(
    "region", [(0, 0, 38, 5), (0, 50, 5, 4), (-1, 0, 5, 5), (0, 0, 0, 5), (0, 0, 5), (0.5, 0, 5, 5)]
)
def test_a_region_outside_the_picture_is_refused(tmp_path, region):
    path = save(tmp_path / "a.png", noise(53, 37))
    with pytest.raises(ValueError, match=r"^region: .*inside 37 × 53"):
        read(path, region=region)


# Parameters


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_parameters_come_back_in_every_language(tmp_path, suffix):
    assert (
        read_parameters(save(tmp_path / f"a{suffix}", noise(5, 5), parameters=MADE_WITH))
        == MADE_WITH
    )


def test_the_preview_carries_the_parameters_too(tmp_path):
    save(tmp_path / "a.tif", noise(5, 5), parameters=MADE_WITH)
    assert read_parameters(tmp_path / "a.preview.png") == MADE_WITH


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_parameters_are_read_without_the_pixels(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", noise(400, 400), parameters=MADE_WITH)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert read_parameters(path) == MADE_WITH


@pytest.mark.parametrize("parameters", [{"a": {1}}, {"a": float("nan")}, [1], {"a": np.ones(2)}])
def test_parameters_that_are_not_json_are_refused(tmp_path, parameters):
    with pytest.raises(ValueError, match=r"^parameters: .*accepted: a dict"):
        writer(tmp_path / "a.png", 5, 5, parameters=parameters)
    assert list(tmp_path.iterdir()) == []


def test_parameters_too_long_for_a_jpeg_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^parameters: 70,\d+ bytes"):
        writer(tmp_path / "a.jpg", 5, 5, parameters={"prompt": "x" * 70_000})


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_picture_of_others_has_no_parameters(tmp_path, suffix):
    Image.new("RGB", (4, 4)).save(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match=r"^path: .*a\.\w+ holds no parameters"):
        read_parameters(tmp_path / f"a{suffix}")


# Preview


@pytest.mark.parametrize(
    "height, width, side", [(37, 53, 20), (53, 37, 52), (40, 80, 20), (64, 3, 7), (5, 9, 50)]
)
def test_a_preview_pixel_is_the_mean_of_its_area(height, width, side):
    picture = noise(height, width)
    preview = Preview(width, height, side)
    preview.write(picture)
    small = preview.picture

    def overlaps(pixels: int, length: int) -> list[list[Fraction]]:
        """How much of each of `length` rows (or columns) each of `pixels` covers."""
        edges = [Fraction(i * length, pixels) for i in range(pixels + 1)]
        return [
            [max(Fraction(0), min(b, x + 1) - max(a, x)) for x in range(length)]
            for a, b in itertools.pairwise(edges)
        ]

    down = np.array(overlaps(small.shape[0], height), float)
    across = np.array(overlaps(small.shape[1], width), float)
    area = height * width / (small.shape[0] * small.shape[1])
    expected = np.einsum("iy,jx,yxc->ijc", down, across, picture.astype(float)) / area
    assert np.abs(small - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("height, width", [(37, 53), (2, 1000)])
def test_the_long_side_of_the_preview_is_the_one_asked_for(tmp_path, height, width):
    save(tmp_path / "a.png", noise(height, width), preview=20)
    shape = read(tmp_path / "a.preview.png").shape
    assert max(shape) == 20 and min(shape[:2]) == max(1, round(20 * height / width))


def test_a_small_picture_is_its_own_preview(tmp_path):
    save(tmp_path / "a.png", noise(37, 53))
    assert np.array_equal(read(tmp_path / "a.preview.png"), noise(37, 53))


def test_no_preview_when_none_is_asked_for(tmp_path):
    save(tmp_path / "a.png", noise(5, 5), preview=None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


# Nothing half-written


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_an_exception_leaves_nothing_behind(tmp_path, suffix):
    with (
        pytest.raises(KeyboardInterrupt),
        writer(tmp_path / f"a{suffix}", 9, 9, parameters={}) as out,
    ):
        out.write(noise(5, 9))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_an_existing_picture_stays_until_the_new_one_is_whole(tmp_path, suffix):
    path = save(tmp_path / f"a{suffix}", noise(9, 9))
    before = path.read_bytes()
    out = writer(path, 9, 9, parameters={})
    out.write(noise(9, 9, seed=1))
    assert path.read_bytes() == before
    out.close()
    assert path.read_bytes() != before


def test_an_aborted_picture_leaves_the_existing_one(tmp_path):
    path = save(tmp_path / "a.png", noise(9, 9))
    before = path.read_bytes()
    writer(path, 9, 9, parameters={}).abort()
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    lost = writer(tmp_path / "a.png", 9, 9, parameters={})
    lost.write(noise(9, 9))
    [part] = tmp_path.iterdir()
    save(tmp_path / "a.png", noise(8, 8))
    assert part.exists()
    lost._parts[0].file.close()  # as a process does that is killed
    save(tmp_path / "a.png", noise(7, 7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.preview.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_missing_rows_are_an_error_and_leave_nothing(tmp_path, suffix):
    with (
        pytest.raises(ValueError, match=r"^band: .* got 5 rows; it has 9"),
        writer(tmp_path / f"a{suffix}", 9, 9, parameters={}) as out,
    ):
        out.write(noise(5, 9))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_disk_that_fills_up_is_said_in_one_line_and_leaves_nothing(tmp_path, suffix):
    # A limit on the size of files fails as a full disk does: in the middle of a write.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"\.\w+: .* bytes are needed, [\d,]+ are free") as error:
            save(tmp_path / f"a{suffix}", noise(400, 400))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "suffix, quality", [(".png", 95), (".tif", 95), (".jpg", 95), (".jpg", 100)]
)
@pytest.mark.parametrize("black_and_white", [False, True])
def test_no_picture_takes_more_than_bytes_needed(tmp_path, suffix, quality, black_and_white):
    picture = noise(500, 600)
    path = save(
        tmp_path / f"a{suffix}",
        picture // 128 * 255 if black_and_white else picture,
        preview=None,
        quality=quality,
    )
    allowance = 3.2e6  # for the preview of 1,024², which this picture does without
    assert path.stat().st_size <= bytes_needed(path, 600, 500) - allowance


# Memory


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_writing_holds_a_few_bands_whatever_the_height(tmp_path, suffix):
    band = smooth(256, 4000)
    tracemalloc.start()
    with writer(tmp_path / f"a{suffix}", 4000, 4096, parameters={}, preview=256) as out:
        for _ in range(16):
            out.write(band)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * band.nbytes  # the picture: 16


# Refused before any work


@pytest.mark.parametrize("name", ["a", "a.bmp", "a.png.gz"])
def test_an_unknown_suffix_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^path: suffix .*accepted: \.png, \.jpg"):
        writer(tmp_path / name, 5, 5, parameters={})


@pytest.mark.parametrize("side", [65_501, 65_536])
def test_a_jpeg_refuses_what_it_cannot_hold_with_the_reason(tmp_path, side):
    with pytest.raises(ValueError, match=r"^height: 65,\d+ pixels; .*65,535.*\.png and \.tif"):
        writer(tmp_path / "a.jpg", 5, side, parameters={})


def test_a_jpeg_holds_the_longest_side_it_is_said_to(tmp_path):
    path = save(tmp_path / "a.jpg", noise(2, 65_500))
    assert read(path).shape == (2, 65_500, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("width", [0, -1, 2**31, 2.0, True])
def test_a_size_that_no_file_holds_is_refused(tmp_path, suffix, width):
    with pytest.raises(ValueError, match=r"^width: "):
        bytes_needed(tmp_path / f"a{suffix}", width, 5)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^path: .*none is not a folder"):
        writer(tmp_path / "none" / "a.png", 5, 5, parameters={})


def test_a_folder_that_takes_no_files_is_refused(tmp_path):
    if Path("/proc").is_dir():  # even root cannot write there
        folder = Path("/proc")
    else:
        folder = tmp_path
        folder.chmod(0o500)
    with pytest.raises(ValueError, match=r"^path: cannot write in "):
        writer(folder / "a.png", 5, 5, parameters={})


@pytest.mark.parametrize(
    "band",
    [np.zeros((2, 8, 3), np.uint8), np.zeros((2, 9, 3)), np.zeros((2, 9, 4), np.uint8), [[1]]],
)
def test_a_band_of_another_kind_is_refused_and_changes_nothing(tmp_path, band):
    with writer(tmp_path / "a.png", 9, 4, parameters={}) as out:
        with pytest.raises(ValueError, match=r"^band: .*accepted: uint8 \[rows, 9, 3\]"):
            out.write(band)
        out.write(noise(4, 9))
    assert np.array_equal(read(tmp_path / "a.png"), noise(4, 9))


def test_more_rows_than_the_picture_has_are_refused(tmp_path):
    with writer(tmp_path / "a.png", 9, 4, parameters={}) as out:
        out.write(noise(3, 9))
        with pytest.raises(ValueError, match=r"^band: 2 rows after 3; the picture has 4"):
            out.write(noise(2, 9))
        out.write(noise(1, 9))


def test_a_closed_picture_takes_no_more_rows(tmp_path):
    out = writer(tmp_path / "a.png", 9, 4, parameters={})
    out.write(noise(4, 9))
    out.close()
    with pytest.raises(ValueError, match=r"^band: .*closed"):
        out.write(noise(1, 9))


@pytest.mark.parametrize("options", [{"quality": 0}, {"quality": 101}, {"preview": 0}])
def test_an_option_out_of_range_is_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        writer(tmp_path / "a.jpg", 9, 4, parameters={}, **options)


def test_a_tiff_without_tifffile_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"linfusion\[highres\]"):
        bytes_needed(tmp_path / "a.tif", 5, 5)


# Reading what others wrote


def test_pillows_limit_on_sizes_does_not_hold_here_and_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    paths = [save(tmp_path / f"a{suffix}", noise(40, 50)) for suffix in (".png", ".jpg", ".tif")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [read(path).shape for path in paths] == [(40, 50, 3)] * 3
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(Image.DecompressionBombError):
        Image.open(paths[0])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_camera_picture_stands_upright(tmp_path, suffix, orientation):
    from PIL import ImageOps

    image = Image.fromarray(noise(37, 53))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a{suffix}", exif=exif)
    image.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read(tmp_path / f"a{suffix}"), upright)
    region = read(tmp_path / f"a{suffix}", region=(3, 5, 20, 30))
    assert np.array_equal(region, upright[5:35, 3:23])


def test_alpha_is_composited_over_white_and_said(tmp_path):
    rgba = np.dstack([noise(20, 30), np.arange(600).reshape(20, 30) % 256]).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"a\.png: transparency is composited over white"):
        pixels = read(tmp_path / "a.png")
    alpha = rgba[..., 3:] / 255
    assert np.abs(pixels - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_what_loses_nothing_says_nothing(tmp_path, mode):
    image = Image.fromarray(noise(20, 30)).convert(mode)
    image.save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_an_opaque_alpha_says_nothing(tmp_path):
    Image.fromarray(noise(20, 30)).convert("RGBA").save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read(tmp_path / "a.png"), noise(20, 30))


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=0)
    with pytest.warns(UserWarning, match="over white"):
        assert (read(tmp_path / "a.png") == 255).all()


def test_cmyk_is_converted_and_said(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="CMYK is converted"):
        red = read(tmp_path / "a.jpg").astype(int)
    assert np.abs(red - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bits_are_scaled_and_said(tmp_path, suffix):
    grey = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    Image.fromarray(grey).save(tmp_path / f"a{suffix}")
    with pytest.warns(UserWarning, match="16 bits a channel are scaled to 8"):
        pixels = read(tmp_path / f"a{suffix}")
    assert np.array_equal(pixels, np.repeat((grey >> 8)[..., None], 3, -1))


def test_16_bit_colour_is_said_too(tmp_path):
    import tifffile

    colour = noise(16, 32).astype(np.uint16) << 8
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb")
    with pytest.warns(UserWarning, match="16 bits a channel are scaled to 8"):
        assert np.array_equal(read(tmp_path / "a.tif"), noise(16, 32))


def test_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"^path: .*a\.tif.*32 bits"):
        read(tmp_path / "a.tif")


def test_of_an_animation_the_first_frame_is_taken_and_said(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="several frames, number 1 is taken"):
        assert (read(tmp_path / "a.gif") == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_truncated_picture_is_refused(tmp_path, monkeypatch, suffix, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = save(tmp_path / f"a{suffix}", noise(300, 300))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)
    with pytest.raises(ValueError, match=rf"^path: .*a\{suffix} cannot be read"):
        read(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^picture: .*a\.png"):
        open_picture(tmp_path / "a.png")


def test_a_pillow_image_is_taken_as_a_file_is():
    image = Image.fromarray(noise(20, 30))
    assert np.array_equal(open_picture(image), noise(20, 30))


def test_the_warning_points_at_the_caller(tmp_path):
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.jpg")
    for take in (read, open_picture):
        with pytest.warns(UserWarning) as caught:
            take(tmp_path / "a.jpg")
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning) as caught:
        open_picture(Image.new("CMYK", (8, 8)))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("function", [open_picture, read, read_parameters, size_of])
def test_only_paths_are_opened_and_the_callers_descriptors_stay_open(function):
    reading, writing = os.pipe()
    try:
        with pytest.raises(ValueError, match=rf"got {writing} of type int; accepted: the path"):
            function(writing)
        os.write(writing, b"x")
        assert os.read(reading, 1) == b"x"
    finally:
        os.close(reading)
        os.close(writing)
