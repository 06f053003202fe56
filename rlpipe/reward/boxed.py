r"""Scorer: a judge that reasons first and ends with \boxed{1} or \boxed{0} (ReasonGen-R1)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlpipe.reward.backend import Answer, Query
from rlpipe.reward.judge import Judge
from rlpipe.reward.question import PLACEHOLDER, around_images
from rlpipe.types import Score, ScoreRequest

TEMPLATE = r"""You are given a text prompt: "{prompt}"
Below is one generated image:
<image>

1. Describe the image thoroughly (objects, colors, layout, etc.), do not be affected by the prompt.
2. Identify key visual elements and instructions from the prompt.
3. Evaluate how well the image follows the prompt:
   - Are all required elements present?
   - Are object counts, colors, and positions accurate?

Be extremly strict and precise:
Only if the image matches the prompt perfectly, respond with: \boxed{1}
Otherwise, respond with: \boxed{0}

Reason before your final boxed answer. Only one number should appear inside the box.
"""
"""What the official judge is asked, its spelling included."""
UNPARSABLE = ("missing", "zero")

_BOX = re.compile(r"\\boxed\{\s*([01])\s*\}")
_TOLD = 200
"""Characters of an answer without a box that its error quotes, from the end."""


class BoxedJudge(Judge):
    r"""Scorer: 1 if the judge's last box holds 1, 0 if it holds 0; of an answer in words, not of its first token.

    template:   with `{prompt}` and `<image>` where they belong; "A photo of " at the prompt's start is left out.
    max_tokens: length limit of an answer (official 1024).
    min_size:   a smaller image is enlarged to as many pixels as a square of this side has (official 512).
    unparsable: an answer without \boxed{1} or \boxed{0} makes the score "missing", or "zero" (official). So does one
                that is cut at max_tokens after its last box: that box may be of the reasoning.

    The other keywords are those of `judge.Judge`.

        judge = BoxedJudge(backend="http", engine={"url": "http://127.0.0.1:8000/v1", "model": "judge"})
        judge.score([ScoreRequest("0", prompt, image)])[0].value             # 1.0
    """

    def __init__(
        self,
        path: str | Path | None = None,
        template: str = TEMPLATE,
        max_tokens: int = 1024,
        min_size: int = 512,
        unparsable: str = "missing",
        batch_size: int = 128,
        backend: str = "transformers",
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        own = {"template": template, "max_tokens": max_tokens, "min_size": min_size, "unparsable": unparsable}
        _check(**own)
        self.template, self.max_tokens, self.min_size, self.unparsable = own.values()
        super().__init__(path, batch_size, backend, device, dtype, system, max_tiles, engine)

    @staticmethod
    def check_keywords(**keywords: Any) -> None:
        """ValueError "key: value ..., way out" for settings that no judge can be built of."""
        _check(
            **{key: keywords[key] for key in ("template", "max_tokens", "min_size", "unparsable") if key in keywords}
        )
        Judge.check_keywords(**keywords)

    def queries(self, request: ScoreRequest) -> list[Query]:
        prompt = re.sub(r"^\s*a photo of ", "", request.prompt.text, flags=re.IGNORECASE)
        return [Query(around_images(self.template, prompt, 1), (enlarged(request.image, self.min_size),))]

    def prepare(self, requests: Sequence[ScoreRequest]) -> tuple[list[list[Query]], None]:
        """The queries of each request, their images enlarged."""
        return [self.queries(request) for request in requests], None

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order."""
        return self.score_prepared(requests, self.prepare(requests))

    def score_prepared(self, requests: Sequence[ScoreRequest], prepared: tuple[list[list[Query]], None]) -> list[Score]:
        """The same, after `prepare`."""
        queries = [query for asked in prepared[0] for query in asked]
        answers = self.backend.write(queries, self.max_tokens) if queries else []
        return [self._read(r, a) for r, a in zip(requests, answers, strict=True)]

    def _read(self, request: ScoreRequest, answer: Answer) -> Score:
        if answer.error is not None:
            return Score(id=request.id, value=None, error=answer.error)
        value = boxed(answer.text, answer.cut)
        if value is None and self.unparsable == "missing":
            words = " ".join(answer.text.split())[-_TOLD:]
            cut = f", cut at max_tokens={self.max_tokens}" if answer.cut else ""
            error = rf"no \boxed{{1}} or \boxed{{0}} at the end of{cut}: {words!r}"
            return Score(id=request.id, value=None, error=error)
        return Score(id=request.id, value=float(value or 0), parts={"unparsable": float(value is None)})


def boxed(text: str, cut: bool = False) -> int | None:
    """1 or 0 if that alone is in the last box of the text, else None; if the text was cut, that box must end it."""
    found = _BOX.match(text, max(text.rfind(r"\boxed{"), 0))
    if found is None or (cut and re.search(r"\w", text[found.end() :])):
        return None
    return int(found[1])


def enlarged(image: np.ndarray, min_size: int) -> np.ndarray:
    """A uint8 [H, W, 3] image with at least min_size * min_size pixels, its proportions kept, bicubic."""
    height, width = image.shape[:2]
    if height * width >= min_size**2:
        return image
    scale = min_size / math.sqrt(height * width)
    size = (math.ceil(width * scale), math.ceil(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _check(template: str = TEMPLATE, max_tokens: int = 1024, min_size: int = 512, unparsable: str = "missing") -> None:
    if not isinstance(template, str) or PLACEHOLDER not in template:
        raise ValueError(f"template: {template!r} has no {PLACEHOLDER}; put it where the description belongs")
    around_images(template, "", 1, "template")
    for key, value, least in (("max_tokens", max_tokens, 1), ("min_size", min_size, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key}: {value!r}; give a whole number from {least}")
    if unparsable not in UNPARSABLE:
        raise ValueError(f"unparsable: {unparsable!r} is none of {', '.join(UNPARSABLE)}")
