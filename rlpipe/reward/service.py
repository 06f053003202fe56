"""Calling a scorer as its section says: in batches, several at once, nothing computed twice, failures tried again."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from rlpipe.config import ScorerSection
from rlpipe.reward.scorer import Scorer, score_all
from rlpipe.types import Score, ScoreRequest

LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class ScoreCounts:
    """What it took to answer some requests.

    requests, missing: asked for; not answered after all retries.
    cached:            of the requests, those that an equal one had been or was being computed for.
    calls, failed:     calls of the scorer; those that left something missing.
    timeouts:          failed calls that took too long.
    retries:           calls that asked again for what was missing.
    seconds:           in the scorer, prepare_seconds in its `prepare`; summed over calls that ran at once.
    """

    requests: int = 0
    missing: int = 0
    cached: int = 0
    calls: int = 0
    failed: int = 0
    timeouts: int = 0
    retries: int = 0
    seconds: float = 0.0
    prepare_seconds: float = 0.0

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        return ScoreCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class ScoreService:
    """Answers requests from any number of threads by one scorer.

    Equal requests (prompt, image, and what else the scorer sees) are computed once: within a call, while an equal one
    is under way, and from the last `cache` scores. A failed score is not remembered.

        service = ScoreService(build_scorer(section), section)
        scores, counts = service.score(requests)              # as many scores, in order, with their ids
    """

    def __init__(self, scorer: Scorer, section: ScorerSection) -> None:
        self.scorer, self.section = scorer, section
        self._cache: OrderedDict[bytes, Score] = OrderedDict()
        self._under_way: dict[bytes, Future[Score]] = {}
        self._lock = threading.Lock()
        self._gate = _Gate(section.concurrency, section.timeout_s)
        # One more batch is prepared while as many as are allowed are with the scorer.
        self._lanes = ThreadPoolExecutor(section.concurrency + 1, thread_name_prefix="score")

    @property
    def stuck(self) -> bool:
        """Whether calls that do not return hold every place at the scorer."""
        return self._gate.stuck

    def score(self, requests: Sequence[ScoreRequest]) -> tuple[list[Score], ScoreCounts]:
        """One score per request; what the scorer fails to give, `retries` times more if need be, is missing."""
        if not requests:
            return [], ScoreCounts()
        shown = [self._shown(request) for request in requests]
        keys = [_key(request) for request in shown]
        known: dict[bytes, Score] = {}
        awaited: dict[bytes, Future[Score]] = {}
        own: dict[bytes, ScoreRequest] = {}
        with self._lock:
            for key, request in zip(keys, shown, strict=True):
                if key in known or key in awaited:
                    continue
                if key in self._cache:
                    self._cache.move_to_end(key)
                    known[key] = self._cache[key]
                    continue
                if key not in self._under_way:
                    self._under_way[key], own[key] = Future(), request
                awaited[key] = self._under_way[key]
        counts = self._compute(own)
        known |= {key: future.result() for key, future in awaited.items()}
        scores = [replace(known[key], id=request.id) for key, request in zip(keys, requests, strict=True)]
        missing = sum(score.missing for score in scores)
        cached = len(requests) - len(own)
        return scores, replace(counts, requests=len(requests), missing=missing, cached=cached)

    def _shown(self, request: ScoreRequest) -> ScoreRequest:
        """The request as the scorer may see it."""
        sees = self.section.sees
        return replace(
            request,
            source=request.source if "source_image" in sees else None,
            verdict=request.verdict if "verdict" in sees else None,
        )

    def _compute(self, own: dict[bytes, ScoreRequest]) -> ScoreCounts:
        """Settle every key of `own`: with its score as soon as there is one, else with the last reason why not."""
        counts, open_keys = ScoreCounts(), {key: Score("", None, error="not asked") for key in own}
        todo = list(own)
        try:
            for attempt in range(1 + self.section.retries):
                if attempt and todo:
                    time.sleep(self._pause_s(attempt))
                size = self.section.batch_size
                batches = [todo[start : start + size] for start in range(0, len(todo), size)]
                tasks = [self._lanes.submit(self._batch, [own[key] for key in batch]) for batch in batches]
                todo = []
                for batch, task in zip(batches, tasks, strict=True):
                    scores, asked, taken = task.result()
                    counts += replace(taken, retries=taken.calls if attempt else 0)
                    for key, score in zip(batch, scores, strict=True):
                        open_keys[key] = score
                        if not score.missing:
                            self._settle(key, open_keys.pop(key))
                        elif id(own[key]) in asked:
                            todo.append(key)
        finally:
            for key, score in open_keys.items():
                self._settle(key, score)
        return counts

    def _pause_s(self, attempt: int) -> float:
        """Before a retry: `backoff_s`, doubled each time, give or take half of it, so that replicas do not march in
        step."""
        return min(self.section.backoff_s * 2 ** (attempt - 1), LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)

    def _settle(self, key: bytes, score: Score) -> None:
        with self._lock:
            future = self._under_way.pop(key)
            if not score.missing and self.section.cache:
                self._cache[key] = score
                if len(self._cache) > self.section.cache:
                    self._cache.popitem(last=False)
        future.set_result(score)

    def _batch(self, requests: list[ScoreRequest]) -> tuple[list[Score], set[int], ScoreCounts]:
        """One call of the scorer: scores in order, missing where it failed; which requests it was asked, by `id()`."""
        call = _Call(self.scorer, self._gate)
        scores = score_all(call, requests)
        counts = ScoreCounts(
            calls=int(bool(call.asked)),
            failed=int(any(s.missing for r, s in zip(requests, scores, strict=True) if id(r) in call.asked)),
            timeouts=int(call.timed_out),
            seconds=call.seconds,
            prepare_seconds=call.prepare_seconds,
        )
        return scores, call.asked, counts


class _Gate:
    """Lets `concurrency` calls through at once, and leaves one behind that takes longer than `timeout_s`."""

    def __init__(self, concurrency: int, timeout_s: float) -> None:
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self._places = threading.BoundedSemaphore(concurrency)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="scorer")
        self._lock = threading.Lock()
        self._left_behind = 0

    @property
    def stuck(self) -> bool:
        return self._left_behind >= self.concurrency

    def enter(self) -> None:
        """Wait for a place; TimeoutError if calls that do not return hold all of them."""
        while not self._places.acquire(timeout=self.timeout_s):
            if self.stuck:
                raise TimeoutError(f"the scorer hangs: no call has returned for {self.timeout_s:g} s")

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns; one that is left behind keeps the place until it returns."""
        task = self._threads.submit(function, *args)
        try:
            return task.result(self.timeout_s)
        except TimeoutError:
            if not task.done():
                raise TimeoutError(f"no answer within {self.timeout_s:g} s") from None
            raise
        finally:
            if task.done():
                self._places.release()
            else:
                with self._lock:
                    self._left_behind += 1
                task.add_done_callback(self._came_back)

    def _came_back(self, task: Future) -> None:
        with self._lock:
            self._left_behind -= 1
        self._places.release()


class _Call:
    """One call of a scorer, timed; a scorer itself, so that `score_all` can judge what comes of it."""

    def __init__(self, scorer: Scorer, gate: _Gate) -> None:
        self.scorer, self.gate = scorer, gate
        self.asked: set[int] = set()
        self.timed_out = False
        self.seconds = self.prepare_seconds = 0.0

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.asked = set(map(id, requests))
        try:
            return self._score(requests)
        except TimeoutError:
            self.timed_out = True
            raise

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        function, arguments = self.scorer.score, (requests,)
        if hasattr(self.scorer, "score_prepared"):
            started = time.monotonic()
            function, arguments = self.scorer.score_prepared, (requests, self.scorer.prepare(requests))
            self.prepare_seconds = time.monotonic() - started
        self.gate.enter()
        started = time.monotonic()
        try:
            return self.gate.call(function, *arguments)
        finally:
            self.seconds = time.monotonic() - started


def _key(request: ScoreRequest) -> bytes:
    """What a score depends on."""
    prompt = request.prompt
    words = json.dumps([prompt.id, prompt.text, prompt.metadata, request.verdict], sort_keys=True, default=repr)
    digest = hashlib.sha256(words.encode())
    for image in (request.image, request.source):
        if isinstance(image, np.ndarray):
            digest.update(f"{image.dtype} {image.shape}".encode())
            digest.update(np.ascontiguousarray(image))
        else:
            digest.update(repr(image).encode())
    return digest.digest()
