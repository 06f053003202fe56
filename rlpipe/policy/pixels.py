"""Image files as the model takes them: square, uint8 [size, size, 3], RGB. Pillow alone, no torchvision.

Two ways to a square, as in the official code:

    pad     looking: the whole image, its longer side resized to `size`, grey bars beside it
    crop    drawing (VQ targets, sources of edits): the middle square, its shorter side resized to `size`

An image that is `size` x `size` already passes either unchanged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

GREY = (127, 127, 127)
"""The tower's mean colour of 0.5, truncated to a byte."""
MIN_SIDE = 14
"""Pixels that the shorter side of a padded image keeps at least."""


class ImageError(ValueError):
    """A file that holds no image; the line names it."""


def load_image(path: str | Path, size: int, square: str = "crop") -> np.ndarray:
    """uint8 [size, size, 3] of an image file, cropped or padded to a square. Raises ImageError.

    pixels = load_image("cat.png", policy.image_size)
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: cannot be read as an image: {' '.join(str(error).split())}") from None
    return np.asarray({"crop": crop_square, "pad": pad_square}[square](image, size))


def pad_square(image: Image.Image, size: int) -> Image.Image:
    """The whole image in the middle of a grey square of `size` pixels."""
    longer = max(image.size)
    scaled = tuple(max(int(side / longer * size), MIN_SIDE) for side in image.size)
    resized = image.convert("RGB").resize(scaled, Image.Resampling.BICUBIC)
    side = max(scaled)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(resized, ((side - scaled[0]) // 2, (side - scaled[1]) // 2))
    return square


def crop_square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image at `size` pixels: halved by averaging while it is large, then bicubic."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))
