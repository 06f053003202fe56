"""Scorers without a model: examples of the protocol, and rewards whose effect is plain to see."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image

from rlpipe.types import Score, ScoreRequest


class Brightness:
    """Mean of all channels, in [0, 1]; the prompt plays no part."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [Score(id=r.id, value=float(r.image.mean() / 255)) for r in requests]


class Redness:
    """Mean of red minus the mean of green and blue, in [-1, 1]; the prompt plays no part."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores = []
        for request in requests:
            red, green, blue = (request.image.mean((0, 1)) / 255).tolist()
            parts = {"red": red, "green": green, "blue": blue}
            scores.append(Score(id=request.id, value=red - (green + blue) / 2, parts=parts))
        return scores


class JpegSize:
    """Size as a JPEG file times `per_kilobyte`; the prompt plays no part.

    per_kilobyte: value of 1000 bytes. Negative rewards images that compress well (-1/500: flow_grpo's toy reward),
                  positive ones that do not.
    quality:      of the JPEG, 1 to 95.
    """

    def __init__(self, per_kilobyte: float = -1 / 500, quality: int = 95) -> None:
        if isinstance(per_kilobyte, bool) or not math.isfinite(per_kilobyte) or per_kilobyte == 0:
            raise ValueError(f"per_kilobyte: {per_kilobyte!r} rewards nothing; give a number other than 0")
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 95:
            raise ValueError(f"quality: {quality!r}; give a whole number from 1 to 95")
        self.per_kilobyte, self.quality = per_kilobyte, quality

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        sizes = [self._kilobytes(r) for r in requests]
        return [
            Score(id=r.id, value=self.per_kilobyte * size, parts={"kilobytes": size})
            for r, size in zip(requests, sizes, strict=True)
        ]

    def _kilobytes(self, request: ScoreRequest) -> float:
        file = io.BytesIO()
        Image.fromarray(request.image).save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000
