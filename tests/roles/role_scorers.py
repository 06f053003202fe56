"""Scorers named by import path in the tests of the roles; reward actors import them from this folder."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace

from rlpipe.types import Prompt, Score, ScoreRequest


class Red:
    """Mean red; a prompt with the word "unscorable" gets a failure, "nan" not a number, "equal" a half."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [self._one(request) for request in requests]

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        return [f"prompt {p.id}: no red in this world" for p in prompts if "unscorable" in p.text]

    def _one(self, request: ScoreRequest) -> Score:
        if "unscorable" in request.prompt.text:
            return Score(id=request.id, value=None, error="no red in this world")
        if "nan" in request.prompt.text:
            return Score(id=request.id, value=float("nan"))
        if "equal" in request.prompt.text:
            return Score(id=request.id, value=0.5)
        return Score(id=request.id, value=float(request.image[..., 0].mean() / 255))


class Raises:
    """Fails at every call."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        raise OSError("the service is down")


class Recorder(Red):
    """Mean red; writes id and verdict of everything that it is asked to a file, one line a call."""

    def __init__(self, log: str) -> None:
        self.log = log

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        with open(self.log, "a") as log:
            log.write(json.dumps([[request.id, request.verdict] for request in requests]) + "\n")
        return super().score(requests)


class Flaky(Red):
    """Mean red, but every third call fails, each time in another way; a line in a file for each failure."""

    def __init__(self, log: str) -> None:
        self.log, self.calls, self.ways = log, 0, itertools.cycle(("raise", "short", "nan", "none", "timeout"))

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.calls += 1
        scores = super().score(requests)
        if self.calls % 3:
            return scores
        way = next(self.ways)
        with open(self.log, "a") as log:
            log.write(way + "\n")
        if way == "raise":
            raise OSError("HTTP 500")
        if way == "timeout":
            raise TimeoutError("no answer")
        if way == "short":
            return scores[1:]
        return [replace(score, value=float("nan") if way == "nan" else None) for score in scores]


class HangsOnce(Red):
    """Mean red; the first call of all its processes, which a file remembers, does not return."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        if not os.path.exists(self.marker):
            open(self.marker, "w").close()
            time.sleep(60)
        return super().score(requests)
