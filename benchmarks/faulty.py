"""Scorers that answer late, or not at all: what `reward_faults.py` trains with."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rlpipe.reward.internvl import InternVLJudge
from rlpipe.types import Score, ScoreRequest

KINDS = ("exception", "timeout", "nan", "short")


class SlowJudge:
    """Scorer: the InternVL judge, each of whose calls takes `delay_s` longer."""

    def __init__(self, path: str, question: str, batch_size: int = 128, delay_s: float = 1.0) -> None:
        self.judge, self.delay_s = InternVLJudge(path, question, batch_size), delay_s
        self._one = threading.Lock()  # the delays overlap, the model works on one batch after the other

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        time.sleep(self.delay_s)
        with self._one:
            return self.judge.score(requests)


class FlakyJudge:
    """Scorer: the InternVL judge, of whose calls a random `share` fails, each time in one of four ways.

    log: JSONL file that every failing call adds a line to, with the time, so that somebody else can count them.
    """

    def __init__(self, path: str, question: str, batch_size: int = 128, share: float = 0.2, log: str = "") -> None:
        self.judge, self.share, self.log = InternVLJudge(path, question, batch_size), share, Path(log)
        self.random = random.Random(os.getpid())

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        scores = self.judge.score(requests)
        if self.random.random() >= self.share:
            return scores
        kind = self.random.choice(KINDS)
        with self.log.open("a") as file:
            file.write(json.dumps({"time": time.time(), "kind": kind, "requests": len(requests)}) + "\n")
        if kind == "exception":
            raise ConnectionError("HTTP 500 (made by the benchmark)")
        if kind == "timeout":
            raise TimeoutError("no answer within 30 s (made by the benchmark)")
        if kind == "nan":
            return [Score(score.id, float("nan")) for score in scores]
        return scores[:-1]
