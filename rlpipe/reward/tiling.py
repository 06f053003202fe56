"""How InternVL cuts an image into tiles of its own size (dynamic tiling), and their normalisation; no torchvision."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def _grids(max_tiles: int) -> list[tuple[int, int]]:
    """(columns, rows) of every grid of at most so many tiles, the smallest first."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= max_tiles]
    return sorted(grids, key=math.prod)


def grid(size: tuple[int, int], tile: tuple[int, int], max_tiles: int) -> tuple[int, int]:
    """(rows, columns) of the tiles that an image of `size` (height, width) is cut into.

    The grid whose width / height is nearest to the image's; of equally near ones a larger one only while the image has
    more than half of its pixels (official `dynamic_preprocess`).

        grid((384, 384), (448, 448), 12)          # (1, 1)
        grid((448, 1344), (448, 448), 12)         # (1, 3)
    """
    height, width = size
    best, nearest = (1, 1), math.inf
    for columns, rows in _grids(max_tiles):
        distance = abs(width / height - columns / rows)
        fills = 2 * width * height > math.prod(tile) * columns * rows
        if distance < nearest or (distance == nearest and fills):
            best, nearest = (rows, columns), distance
    return best


def num_tiles(size: tuple[int, int], tile: tuple[int, int], max_tiles: int) -> int:
    """Tiles that `cut` makes of an image of `size` (height, width), its thumbnail included."""
    count = math.prod(grid(size, tile, max_tiles))
    return count + (count > 1)


def cut(image: np.ndarray, tile: tuple[int, int], max_tiles: int) -> np.ndarray:
    """uint8 [N, H, W, 3]: the tiles of a uint8 [h, w, 3] image, row by row, each of size `tile` (H, W).

    Where there is more than one, the whole image at the size of a tile (its thumbnail) is the last.
    """
    height, width = tile
    rows, columns = grid(image.shape[:2], tile, max_tiles)
    canvas = _resize(image, rows * height, columns * width)
    tiles = canvas.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    return tiles if len(tiles) == 1 else np.concatenate([tiles, _resize(image, height, width)[None]])


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialiasing, as Pillow has it."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def normalise(tiles: torch.Tensor) -> torch.Tensor:
    """float32 [N, 3, H, W] of uint8 [N, H, W, 3], by ImageNet's mean and deviation; on the device of the tiles."""
    scaled = tiles.permute(0, 3, 1, 2).float() / 255.0
    mean, std = (scaled.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (scaled - mean) / std
