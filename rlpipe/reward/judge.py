"""Scorers made of a model that is asked yes or no, whichever backend it runs on; and how its answer is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlpipe.reward.backend import Answer, Query, build_backend, check_backend
from rlpipe.types import Prompt, Score, ScoreRequest

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")
SHARED = ("path", "backend", "batch_size", "device", "dtype", "system", "max_tiles")
"""What every backend is told; errors about its other settings name `engine`."""


class Judge:
    """Base of a scorer that asks a backend.

    A subclass has `queries(request)`, what is asked about one request, and `judged(request, answers)`, what becomes of
    the answers. It spells out the keywords below, because a scorer's signature says what its section may set.

    path:       checkpoint folder; null where a server has the model.
    backend:    "transformers" and "vllm" run in this process, "http" asks an OpenAI-compatible server.
    engine:     settings of that backend alone.
    batch_size, device, dtype, system, max_tiles: see `rlpipe.reward.backend`.

    `prepare` may run on another thread while `score_prepared` is busy with the requests before.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        batch_size: int = 128,
        backend: str = "transformers",
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        shared = {
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "system": system,
            "max_tiles": max_tiles,
        }
        Judge.check_keywords(path=path, backend=backend, engine=engine, **shared)
        try:
            self.backend = build_backend(backend, path, **shared, **(engine or {}))
        except ValueError as error:
            inside = str(error).partition(":")[0] in (engine or {})
            raise ValueError(f"engine.{error}" if inside else str(error)) from error

    @staticmethod
    def check_keywords(
        path: str | Path | None = None,
        backend: str = "transformers",
        engine: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """ValueError "key: value ..., way out" if no backend can be built of these; other keys are left alone."""
        if engine is not None and not isinstance(engine, Mapping):
            raise ValueError(f"engine: {engine!r} is no mapping; give the settings of backend {backend} by name")
        shared = {key: value for key, value in settings.items() if key in SHARED}
        clash = sorted(set(engine or {}) & set(SHARED))
        if clash:
            raise ValueError(f"engine.{clash[0]}: {clash[0]} is a setting of every backend; set it beside engine")
        try:
            check_backend(backend, path, {**shared, **(engine or {})})
        except ValueError as error:
            inside = str(error).partition(":")[0] not in (*SHARED, "engine")
            raise ValueError(f"engine.{error}" if inside else str(error)) from None

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """One line for whatever keeps the backend from answering, such as a server that is not there."""
        return list(getattr(self.backend, "problems", list)())

    def queries(self, request: ScoreRequest) -> list[Query]:
        """What is asked about a request."""
        raise NotImplementedError

    def judged(self, request: ScoreRequest, answers: list[Answer]) -> Score:
        """The score of a request by the answers to its queries, in their order."""
        raise NotImplementedError

    def prepare(self, requests: Sequence[ScoreRequest]) -> tuple[list[list[Query]], Any]:
        """The queries of each request, and what the backend made of them all."""
        queries = [self.queries(request) for request in requests]
        return queries, self.backend.prepare([q for asked in queries for q in asked])

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order."""
        return self._score(requests, [self.queries(request) for request in requests], None)

    def score_prepared(self, requests: Sequence[ScoreRequest], prepared: tuple[list[list[Query]], Any]) -> list[Score]:
        """The same, after `prepare`."""
        return self._score(requests, *prepared)

    def _score(self, requests: Sequence[ScoreRequest], queries: list[list[Query]], prepared: Any) -> list[Score]:
        flat = [q for asked in queries for q in asked]
        answers = iter(self.backend.answer(flat, prepared) if flat else [])
        return [self.judged(r, [next(answers) for _ in asked]) for r, asked in zip(requests, queries, strict=True)]


def missing(request: ScoreRequest, answers: Sequence[Answer]) -> Score | None:
    """The missing score of a request with an answer that failed; None if all are there."""
    errors = [answer.error for answer in answers if answer.error is not None]
    return Score(id=request.id, value=None, error=errors[0]) if errors else None


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of `text` if the tokenizer knows it as one token, else None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the spellings of yes and of no that are single tokens; ValueError if either has none."""
    ids = tuple([i for t in words if (i := single_token(tokenizer, t)) is not None] for words in (YES, NO))
    for words, found in zip((YES, NO), ids, strict=True):
        if not found:
            raise ValueError(f"tokenizer: none of {', '.join(words)} is one token; the judge cannot answer with it")
    return ids


def p_yes(logits: torch.Tensor, yes: list[int], no: list[int]) -> torch.Tensor:
    """Probability [B] of yes against no from the logits [B, V] of the first answer token.

    p(yes, Yes, YES) / (p(yes, Yes, YES) + p(no, No, NO)), as the official scorer has it, but of the whole
    distribution: there a top-k of 50 comes first and can leave 0 / 0.
    """
    logits = logits.float()
    return torch.sigmoid(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1))


def answers(logits: torch.Tensor, yes: list[int], no: list[int]) -> list[Answer]:
    """P(yes) and mass of each row of the logits [B, V] of first answer tokens."""
    logprobs = logits.float().log_softmax(-1)
    rows = zip(logprobs[:, yes].tolist(), logprobs[:, no].tolist(), strict=True)
    return [Answer.from_logprobs(of_yes, of_no) for of_yes, of_no in rows]
