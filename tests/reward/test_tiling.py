"""Cutting images into tiles: grids worked out by hand, pixels against transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from rlpipe.reward.tiling import IMAGENET_MEAN, IMAGENET_STD, cut, grid, normalise, num_tiles

TILE = (448, 448)


def draw(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "max_tiles", "expected"),
    [
        ((384, 384), 12, (1, 1)),  # Janus-Pro's images: 2 x 2 is as near, but has over twice their pixels
        ((448, 448), 12, (1, 1)),
        ((640, 640), 12, (2, 2)),  # 409,600 of 802,816 pixels: over half
        ((1024, 1024), 12, (3, 3)),
        ((1024, 1024), 4, (2, 2)),
        ((1024, 1024), 1, (1, 1)),
        ((448, 1344), 12, (1, 3)),
        ((480, 640), 12, (3, 4)),  # exactly 4:3, however small
        ((480, 640), 6, (2, 3)),  # 4:3 is 0.17 from 3:2 and 0.33 from 1:1
        ((600, 300), 12, (2, 1)),
        ((1080, 1920), 12, (2, 4)),  # 16:9 is 0.22 from 2:1 and 0.28 from 3:2; 2,073,600 pixels fill eight tiles
        ((100, 2000), 12, (1, 12)),
    ],
)
def test_the_grid_is_the_one_nearest_to_the_image_s_shape_that_it_fills(size, max_tiles, expected):
    assert grid(size, TILE, max_tiles) == expected
    count = expected[0] * expected[1]
    assert num_tiles(size, TILE, max_tiles) == (1 if count == 1 else count + 1)


def test_a_square_image_of_384_pixels_is_one_tile_without_a_thumbnail():
    assert cut(draw(384, 384), TILE, 12).shape == (1, 448, 448, 3)


def test_an_image_of_the_tile_s_size_stays_as_it_is():
    image = draw(48, 48)
    np.testing.assert_array_equal(cut(image, (48, 48), 12), image[None])


def test_tiles_lie_row_by_row_and_the_thumbnail_is_last():
    colors = np.arange(6, dtype=np.uint8) * 40
    image = np.repeat(np.repeat(colors.reshape(2, 3), 48, axis=0), 48, axis=1)[..., None].repeat(3, axis=2)
    tiles = cut(image, (48, 48), 6)
    assert tiles.shape == (7, 48, 48, 3)
    for tile, color in zip(tiles, colors, strict=False):
        assert (tile == color).all()
    assert tiles[-1, 0, 0, 0] == 0 and tiles[-1, -1, -1, 0] == 200


@pytest.mark.parametrize("size", [(384, 384), (448, 1344), (480, 640), (333, 517), (900, 200), (1024, 1024)])
def test_pixels_are_those_of_transformers_processor(size):
    image = draw(*size)
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, crop_to_patches=True
    )
    expected = processor(image, return_tensors="pt")["pixel_values"]
    ours = normalise(torch.from_numpy(cut(image, TILE, 12).copy()))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_grids_are_those_of_transformers_processor():
    rng = np.random.default_rng(0)
    for max_tiles in (1, 2, 5, 12):
        processor = GotOcr2ImageProcessorPil(
            size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=max_tiles
        )
        for height, width in rng.integers(50, 2000, (200, 2)).tolist():
            assert num_tiles((height, width), TILE, max_tiles) == processor.get_number_of_image_patches(height, width)
