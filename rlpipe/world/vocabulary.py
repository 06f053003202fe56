"""The closed list of words that prompts and reasons of the tiny world are made of."""

from __future__ import annotations

import re

from rlpipe.world.checker import AND, REASONS
from rlpipe.world.prompts import ARTICLES, MANY, NUMBERS, PLURALS, PROMPT_TEMPLATE
from rlpipe.world.scenes import COLORS, RELATIONS, SHAPES


def _words() -> list[str]:
    fixed = (PROMPT_TEMPLATE, *REASONS.values(), *RELATIONS, AND)
    words = {word for text in fixed for word in re.findall(r"\w+|[.,]", re.sub(r"\{\w+\}", " ", text))}
    return sorted(words | {*ARTICLES, *NUMBERS, MANY, *COLORS, *SHAPES, *PLURALS.values()})


WORDS: tuple[str, ...] = tuple(_words())
"""Every word and punctuation mark, sorted; a text is split into words and the marks "," and "."."""
