from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from rlpipe.policy.pixels import ImageError, crop_square, load_image, pad_square


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("square", ["crop", "pad"])
def test_an_image_of_the_right_size_passes_unchanged(tmp_path, square):
    image = noise(48, 48)
    image.save(tmp_path / "image.png")
    assert np.array_equal(load_image(tmp_path / "image.png", 48, square), np.asarray(image))


@pytest.mark.parametrize("size", [(48, 48), (100, 60), (33, 200), (301, 300), (5, 4), (1000, 30)])
@pytest.mark.parametrize("square", [crop_square, pad_square])
def test_any_image_becomes_a_square_of_the_size(size, square):
    assert square(noise(*size), 48).size == (48, 48)


def test_padding_keeps_the_whole_image_between_equal_grey_bars():
    image = Image.new("RGB", (96, 48), (255, 0, 0))
    pixels = np.asarray(pad_square(image, 48))
    assert (pixels[12:36] == (255, 0, 0)).all()
    assert (pixels[:12] == 127).all() and (pixels[36:] == 127).all()
    assert np.array_equal(np.asarray(pad_square(image.transpose(Image.Transpose.ROTATE_90), 48)), pixels.swapaxes(0, 1))


def test_cropping_keeps_the_middle():
    image = Image.new("RGB", (144, 48), (0, 0, 255))
    image.paste((255, 0, 0), (48, 0, 96, 48))
    assert (np.asarray(crop_square(image, 48)) == (255, 0, 0)).all()


def test_large_images_are_halved_by_averaging_before_the_bicubic_step():
    checks = np.indices((192, 192)).sum(0) % 2 * 255
    image = Image.fromarray(np.repeat(checks[..., None], 3, 2).astype(np.uint8))
    # Averages of two-by-two checks are 127.5 everywhere; no step after them can bring the pattern back.
    assert np.ptp(np.asarray(crop_square(image, 48)).astype(int)) == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_mode_is_read_as_rgb(tmp_path, mode):
    image = Image.new(mode, (60, 50)) if mode == "I;16" else noise(60, 50).convert(mode)
    image.save(tmp_path / "image.png")
    pixels = load_image(tmp_path / "image.png", 48)
    assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png: cannot be read as an image"):
        load_image(tmp_path / "broken.png", 48)
    with pytest.raises(ImageError, match=r"absent\.png: no such image"):
        load_image(tmp_path / "absent.png", 48)
    noise(60, 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    with pytest.raises(ImageError, match=r"cut\.png: cannot be read as an image"):
        load_image(tmp_path / "cut.png", 48)
