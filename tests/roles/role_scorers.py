"""Scorers named by import path in the tests of the roles; reward actors import them from this folder."""

from __future__ import annotations

from collections.abc import Sequence

from rlpipe.types import Score, ScoreRequest


class Red:
    """Mean red; a prompt with the word "unscorable" gets a failure, one with "nan" not a number."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(request) for request in requests]

    def _one(self, request: ScoreRequest) -> Score:
        if "unscorable" in request.prompt.text:
            return Score(id=request.id, value=None, error="no red in this world")
        if "nan" in request.prompt.text:
            return Score(id=request.id, value=float("nan"))
        return Score(id=request.id, value=float(request.image[..., 0].mean() / 255))


class Raises:
    """Fails at every call."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        raise OSError("the service is down")
