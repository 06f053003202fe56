"""Calling a scorer: what is computed once, what is tried again, what is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rlpipe.config import ScorerSection
from rlpipe.reward.service import ScoreService
from rlpipe.types import Prompt, Score, ScoreRequest


def picture(value: int) -> np.ndarray:
    return np.full((4, 4, 3), value, np.uint8)


def ask(*values: int, text: str = "a circle", **fields: Any) -> list[ScoreRequest]:
    return [ScoreRequest(f"{text}/{i}", Prompt("p", text), picture(v), **fields) for i, v in enumerate(values)]


def test_equal_texts_of_different_prompts_are_different_requests():
    class ByPrompt:
        def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
            return [Score(r.id, float(r.prompt.id)) for r in requests]

    requests = [ScoreRequest(i, Prompt(i, "a circle"), picture(0)) for i in ("1", "2")]
    scores, _ = ScoreService(ByPrompt(), ScorerSection()).score(requests)
    assert [score.value for score in scores] == [1.0, 2.0]


class Mean:
    """Mean of the pixels, and every batch it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[ScoreRequest]] = []

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.batches.append(list(requests))
        return [Score(r.id, float(r.image.mean()), {"level": 1.0}) for r in requests]


class Faulty(Mean):
    """Does with its first calls what it is told, one thing a call; then it works."""

    def __init__(self, *faults: Callable[[list[Score]], Any]) -> None:
        super().__init__()
        self.faults = iter(faults)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return next(self.faults, list)(super().score(requests))


class Gated(Mean):
    """Answers only while its gate is open; knows how many calls were in it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.inside = self.most = 0
        self.lock = threading.Lock()

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.gate.wait(30)
        with self.lock:
            self.inside -= 1
        return super().score(requests)


def service(scorer: Any, **keys: Any) -> ScoreService:
    return ScoreService(scorer, ScorerSection(**{"backoff_s": 0.0, "retries": 0, **keys}))


def raising(error: Exception) -> Callable[[list[Score]], Any]:
    def fault(scores: list[Score]) -> Any:
        raise error

    return fault


def test_requests_are_answered_in_order_in_batches_of_the_section() -> None:
    scorer = Mean()
    scores, counts = service(scorer, batch_size=2).score(ask(1, 2, 3, 4, 5))
    assert [score.value for score in scores] == [1, 2, 3, 4, 5]
    assert [score.id for score in scores] == [f"a circle/{i}" for i in range(5)]
    assert sorted(map(len, scorer.batches)) == [1, 2, 2]
    assert (counts.requests, counts.calls, counts.failed, counts.missing, counts.cached) == (5, 3, 0, 0, 0)
    assert service(scorer).score([])[0] == []


def test_an_equal_request_is_computed_once_within_a_call_and_later() -> None:
    scorer = Mean()
    one = service(scorer)
    scores, counts = one.score(ask(7, 7, 8))
    assert [s.value for s in scores] == [7, 7, 8] and [s.id for s in scores] == [f"a circle/{i}" for i in range(3)]
    assert counts.cached == 1 and len(scorer.batches[0]) == 2
    again, counts = one.score(ask(8, 7))
    assert [s.value for s in again] == [8, 7] and (counts.cached, counts.calls) == (2, 0)
    assert [s.parts for s in again] == [{"level": 1.0}] * 2


@pytest.mark.parametrize(
    "other",
    [
        ask(7, text="a square"),
        ask(7, source=picture(1)),
        ask(7, source=picture(2)),
        ask(7, verdict="Yes."),
        ask(8),
        [ScoreRequest("x", Prompt("p", "a circle", {"tag": "counting"}), picture(7))],
    ],
)
def test_requests_that_differ_in_anything_the_scorer_sees_are_not_equal(other) -> None:
    scorer = Mean()
    one = service(scorer, sees=["every_image", "verdict", "source_image"])
    one.score(ask(7))
    _, counts = one.score(other)
    assert counts.cached == 0 and len(scorer.batches) == 2


def test_a_scorer_is_shown_only_what_its_section_lets_it_see() -> None:
    full = ask(7, source=picture(1), verdict="No, it is blue.")
    for sees, expected in (
        (["every_image"], (False, None)),
        (["every_image", "source_image"], (True, None)),
        (["every_image", "verdict"], (False, "No, it is blue.")),
    ):
        scorer = Mean()
        service(scorer, sees=sees).score(full)
        (seen,) = scorer.batches[0]
        assert (seen.source is not None, seen.verdict) == expected


def test_the_oldest_scores_are_forgotten_first_and_none_is_kept_without_a_cache() -> None:
    scorer = Mean()
    small = service(scorer, cache=2)
    for value in (1, 2, 1, 3):
        small.score(ask(value))
    assert small.score(ask(1))[1].cached == 1, "used since 2 was"
    assert small.score(ask(2))[1].cached == 0
    none = service(scorer, cache=0)
    none.score(ask(1))
    assert none.score(ask(1))[1].cached == 0


def test_an_equal_request_waits_for_the_one_that_is_under_way() -> None:
    scorer = Gated()
    one = service(scorer, concurrency=2)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(one.score, ask(7))
        assert scorer.entered.acquire(timeout=30)
        second = threads.submit(one.score, ask(7, 8))
        assert scorer.entered.acquire(timeout=30), "the other image need not wait"
        scorer.gate.set()
        assert [s.value for s in first.result()[0]] == [7] and [s.value for s in second.result()[0]] == [7, 8]
    assert sorted(len(batch) for batch in scorer.batches) == [1, 1]
    assert (first.result()[1].cached, second.result()[1].cached) == (0, 1)


def test_no_more_calls_than_allowed_are_with_the_scorer_from_any_number_of_threads() -> None:
    scorer = Gated()
    one = service(scorer, concurrency=2, batch_size=1)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(one.score, ask(v, v + 10, v + 20)) for v in range(4)]
        for _ in range(2):
            assert scorer.entered.acquire(timeout=30)
        assert not scorer.entered.acquire(timeout=0.2)
        scorer.gate.set()
        assert all(not score.missing for call in calls for score in call.result()[0])
    assert scorer.most == 2 and len(scorer.batches) == 12


def test_the_next_batch_is_prepared_while_the_scorer_is_busy() -> None:
    class Prepared(Gated):
        def __init__(self) -> None:
            super().__init__()
            self.prepared = threading.Semaphore(0)

        def prepare(self, requests):
            self.prepared.release()
            return [request.image.mean() for request in requests]

        def score_prepared(self, requests, prepared):
            assert len(super().score(requests)) == len(prepared)
            return [Score(r.id, float(level)) for r, level in zip(requests, prepared, strict=True)]

    scorer = Prepared()
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(service(scorer, batch_size=1).score, ask(1, 2, 3))
        assert scorer.entered.acquire(timeout=30)
        for _ in range(2):
            assert scorer.prepared.acquire(timeout=30)
        scorer.gate.set()
        scores, counts = call.result()
    assert [s.value for s in scores] == [1, 2, 3] and scorer.most == 1
    assert counts.prepare_seconds > 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raising(OSError("HTTP 500")), "OSError: HTTP 500"),
        (lambda scores: scores[:1], "returned 1 for 2 requests"),
        (lambda scores: None, "returned a NoneType"),
        (lambda scores: [Score(s.id, float("nan")) for s in scores], "value is nan"),
        (lambda scores: [Score(s.id, None, error="busy") for s in scores], "busy"),
        (lambda scores: scores[::-1], "answer has id"),
    ],
)
def test_a_failure_is_tried_again_and_missing_with_its_reason_when_it_stays(fault, reason) -> None:
    scores, counts = service(Faulty(fault, fault), retries=2).score(ask(1, 2))
    assert [s.value for s in scores] == [1, 2]
    assert (counts.calls, counts.failed, counts.retries, counts.missing) == (3, 2, 2, 0)
    scorer = Faulty(fault, fault)
    one = service(scorer, retries=1)
    scores, counts = one.score(ask(1, 2))
    assert all(s.missing and reason in s.error for s in scores)
    assert (counts.calls, counts.failed, counts.retries, counts.missing) == (2, 2, 1, 2)
    # Nothing of it is remembered.
    scores, counts = one.score(ask(1, 2))
    assert [s.value for s in scores] == [1, 2] and counts.cached == 0


def test_only_what_is_missing_is_asked_again() -> None:
    scorer = Faulty(lambda scores: [scores[0], Score(scores[1].id, None, error="busy"), scores[2]])
    scores, counts = service(scorer, retries=1).score(ask(1, 2, 3))
    assert [s.value for s in scores] == [1, 2, 3]
    assert [[r.image[0, 0, 0] for r in batch] for batch in scorer.batches] == [[1, 2, 3], [2]]
    assert (counts.failed, counts.retries) == (1, 1)


def test_an_image_that_is_none_never_reaches_the_scorer_and_is_not_asked_again() -> None:
    scorer = Mean()
    broken = [ScoreRequest("broken", Prompt("p", "a circle"), None)]
    scores, counts = service(scorer, retries=3, backoff_s=30.0).score([*broken, *ask(1)])
    assert scores[0].missing and "not uint8" in scores[0].error and scores[1].value == 1
    assert (counts.calls, counts.failed, counts.retries, counts.missing) == (1, 0, 0, 1)
    assert service(scorer, retries=3, backoff_s=30.0).score(broken)[1].calls == 0


def test_a_timeout_that_the_scorer_raises_is_counted() -> None:
    scores, counts = service(Faulty(raising(TimeoutError("30 s"))), retries=1).score(ask(1))
    assert scores[0].value == 1 and (counts.failed, counts.timeouts, counts.retries) == (1, 1, 1)


def test_a_call_that_does_not_return_is_left_behind_and_keeps_its_place() -> None:
    scorer = Gated()
    one = service(scorer, timeout_s=0.2, retries=1)
    scores, counts = one.score(ask(1))
    assert scores[0].missing and "the scorer hangs" in scores[0].error
    assert (counts.failed, counts.timeouts) == (2, 2)
    assert one.stuck and scorer.most == 1, "the retry must not join it"
    scorer.gate.set()
    while one.stuck:
        pass
    assert one.score(ask(1))[0][0].value == 1
