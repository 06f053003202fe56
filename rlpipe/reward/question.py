"""The question template that turns a prompt into what a judge is asked."""

from __future__ import annotations

import re

PLACEHOLDER = "{prompt}"


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
