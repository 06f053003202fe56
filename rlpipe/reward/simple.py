"""Scorers without a model: examples of the protocol, and rewards whose effect is plain to see."""

from __future__ import annotations

from collections.abc import Sequence

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
