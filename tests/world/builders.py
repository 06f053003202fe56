"""Specs, reasons and pictures for the tests of the tiny world."""

from __future__ import annotations

import random
import re

import numpy as np
from PIL import Image, ImageDraw

from rlpipe.world.checker import check
from rlpipe.world.prompts import (
    TAGS,
    PromptSpec,
    sample_spec,
)
from rlpipe.world.render import render
from rlpipe.world.scenes import (
    BACKGROUND,
    SceneObject,
)

RED_CIRCLE = ("red", "circle")
BLUE_SQUARE = ("blue", "square")
ABOVE = PromptSpec("position", (RED_CIRCLE, BLUE_SQUARE), "above")
TWO_RED_CIRCLES = PromptSpec("counting", (RED_CIRCLE, RED_CIRCLE))
RED_CIRCLE_ONLY = PromptSpec("colors", (RED_CIRCLE,))


def specs_of_every_kind(count_per_tag: int, seed: int = 0) -> list[PromptSpec]:
    rng = random.Random(seed)
    return [sample_spec(rng, "all", tag) for tag in TAGS for _ in range(count_per_tag)]


def reason_for(spec: PromptSpec, *objects: SceneObject) -> str:
    return check(spec.metadata, render(objects)).reason


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def picture(draw_on) -> np.ndarray:
    """A uint8 image [48, 48, 3] drawn at four times the size."""
    image = Image.new("RGB", (192, 192), BACKGROUND)
    draw_on(ImageDraw.Draw(image))
    return np.array(image.resize((48, 48), Image.Resampling.BOX))
