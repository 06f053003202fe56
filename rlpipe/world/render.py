"""Draws a scene."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from rlpipe.world.scenes import BACKGROUND, COLORS, IMAGE_SIZE, RADIUS, Scene

_SUPERSAMPLING = 4
_SQUARE_HALF_SIDE = 0.9
_CROSS_HALF_ARM = 0.36


def render(scene: Scene) -> np.ndarray:
    """The scene as uint8 RGB [48, 48, 3]; edges are anti-aliased by averaging 4 x 4 samples a pixel."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(image)
    radius = RADIUS * _SUPERSAMPLING
    for item in scene:
        x, y = item.x * _SUPERSAMPLING, item.y * _SUPERSAMPLING
        _draw_shape(draw, item.shape, x, y, radius, COLORS[item.color])
    return np.array(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]
) -> None:
    left, top, right, bottom = x - r, y - r, x + r - 1, y + r - 1  # PIL includes the last pixel
    if shape == "circle":
        draw.ellipse([left, top, right, bottom], fill=fill)
    elif shape == "square":
        half = round(r * _SQUARE_HALF_SIDE)
        draw.rectangle([x - half, y - half, x + half - 1, y + half - 1], fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, top), (left, bottom), (right, bottom)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, top), (left, y), (x, bottom), (right, y)], fill=fill)
    elif shape == "cross":
        half = round(r * _CROSS_HALF_ARM)
        draw.rectangle([x - half, top, x + half - 1, bottom], fill=fill)
        draw.rectangle([left, y - half, right, y + half - 1], fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}")
