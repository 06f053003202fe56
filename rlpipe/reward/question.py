"""The question template that turns a prompt into what a judge is asked."""

from __future__ import annotations

import re

PLACEHOLDER = "{prompt}"
IMAGE = "<image>"
"""Where an image stands in a template about several."""


def check_question(question: str, field: str = "question") -> str:
    """The template itself if it has `{prompt}` and no other placeholder, else ValueError naming `field`."""
    if not isinstance(question, str) or PLACEHOLDER not in question:
        raise ValueError(f"{field}: {question!r} has no {PLACEHOLDER}; put it where the description belongs")
    others = sorted(set(re.findall(r"\{\w*\}", question)) - {PLACEHOLDER})
    if others:
        raise ValueError(f"{field}: unknown placeholder {', '.join(others)}; only {PLACEHOLDER} is filled in")
    return question


def fill(question: str, prompt: str) -> str:
    """The question about one prompt; braces in the prompt stay as they are."""
    return question.replace(PLACEHOLDER, prompt.strip())


def around_images(question: str, prompt: str, num_images: int, field: str = "question") -> tuple[str, ...]:
    """The texts before, between and after the images of a template with `<image>` in it, about one prompt.

    The template is split before the prompt is filled in, so that a prompt cannot add an image.
    """
    pieces = question.split(IMAGE)
    if len(pieces) != num_images + 1:
        raise ValueError(f"{field}: {question!r} has {len(pieces) - 1} times {IMAGE}; put it {num_images} times")
    return tuple(piece.replace(PLACEHOLDER, prompt.strip()) for piece in pieces)
