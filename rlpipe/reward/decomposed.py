"""Scorer: a long prompt as yes/no questions, the mean of their P(yes) (paper: R_QA of long prompts)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from rlpipe.reward.backend import Answer, Query
from rlpipe.reward.decomposition import Question, QuestionBook, Questions, QuestionWriter, masked, plain
from rlpipe.reward.endpoint import EndpointSettings
from rlpipe.reward.judge import Judge
from rlpipe.reward.question import check_question, fill
from rlpipe.types import Prompt, Score, ScoreRequest

QUESTION = 'Does this image match the description "{prompt}"? Please directly respond with yes or no.'
SUFFIX = " Please directly respond with yes or no."
CACHE = "runs/questions.jsonl"
WRITER = ("cache", "max_tokens", *(f.name for f in fields(EndpointSettings)))


class DecomposedJudge(Judge):
    """Scorer: the mean of P(yes) over the questions about a prompt.

    questions:   file of questions (`decomposition`).
    writer:      text model that writes those that the file does not have: {url, model, api_key_env, cache}, and other
                 settings of `endpoint.EndpointSettings`. `cache` is the JSONL file that keeps them.
    short_words: prompts of fewer words are asked the one `question`, a template with `{prompt}`.
    dependency:  a question counts 0 where one that it depends on is answered with no (DPG-Bench).
    suffix:      put behind every question of a prompt.

    Parts: `questions`, their number; `yes`, the share with P(yes) above 0.5; `lowest`, the least P(yes); `mass`, the
    least mass of an answer; the mean of each category that the file names. All before the rule of `dependency`. The
    other keywords are those of `judge.Judge`.

        judge = DecomposedJudge("/models/InternVL3-8B-hf", questions="questions.jsonl", dependency=True)
    """

    paths: ClassVar = {"questions": None, "writer.cache": CACHE}

    def __init__(
        self,
        path: str | Path | None = None,
        question: str = QUESTION,
        questions: str | Path | None = None,
        writer: Mapping[str, Any] | None = None,
        short_words: int = 0,
        dependency: bool = False,
        suffix: str = SUFFIX,
        batch_size: int = 128,
        backend: str = "transformers",
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        self.question, self.short_words = check_question(question), short_words
        self.dependency, self.suffix = dependency, suffix
        _check(questions=questions, writer=writer, short_words=short_words, dependency=dependency, suffix=suffix)
        self.book = QuestionBook(questions)
        try:
            self.writer = QuestionWriter(self.book, **{"cache": CACHE, **writer}) if writer else None
        except ValueError as error:
            raise ValueError(f"writer.{error}") from None
        super().__init__(path, batch_size, backend, device, dtype, system, max_tiles, engine)

    @staticmethod
    def check_keywords(**keywords: Any) -> None:
        """ValueError "key: value ..., way out" for settings that no judge can be built of."""
        own = ("questions", "writer", "short_words", "dependency", "suffix")
        _check(**{key: keywords[key] for key in own if key in keywords})
        Judge.check_keywords(**keywords)
        QuestionBook(keywords.get("questions"))

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """One line for each prompt without questions, or with a writer one if it does not answer; and the backend's."""
        problems = super().check(prompts)
        if self.writer is not None:
            return problems + [line.replace("engine.", "writer.", 1) for line in self.writer.endpoint.problems()]
        lacking = [p for p in prompts if self._questions(p) is None]
        return problems + [f"prompt {p.id!r}: {self._lack(p)}; add them to `questions`" for p in lacking]

    def prepare(self, requests: Sequence[ScoreRequest]) -> tuple[list[list[Query]], Any]:
        """The questions of each request, written if need be, and what the backend made of them all."""
        self._write(requests)
        return super().prepare(requests)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order."""
        self._write(requests)
        return super().score(requests)

    def queries(self, request: ScoreRequest) -> list[Query]:
        return [Query.about(q.text, request.image) for q in self._questions(request.prompt) or ()]

    def judged(self, request: ScoreRequest, answers: list[Answer]) -> Score:
        if not answers:
            failures = {} if self.writer is None else self.writer.failures
            reason = failures.get(plain(request.prompt.text)) or self._lack(request.prompt)
            return Score(id=request.id, value=None, error=reason)
        questions = self._questions(request.prompt)
        for question, answer in zip(questions, answers, strict=True):
            if answer.error is not None:
                return Score(id=request.id, value=None, error=f"{question.text!r}: {answer.error}")
        p_yes = [answer.p_yes for answer in answers]
        counted = masked(questions, p_yes) if self.dependency else p_yes
        parts = _parts(questions, p_yes) | {"mass": min(answer.mass for answer in answers)}
        return Score(id=request.id, value=sum(counted) / len(counted), parts=parts)

    def _write(self, requests: Sequence[ScoreRequest]) -> None:
        if self.writer is not None:
            self.writer.write([r.prompt for r in requests if not self._is_short(r.prompt)])

    def _lack(self, prompt: Prompt) -> str:
        other = self.book.other_text(prompt)
        return f"no questions about {prompt.text!r}" + (f" (those of its id are about {other!r})" if other else "")

    def _is_short(self, prompt: Prompt) -> bool:
        return len(prompt.text.split()) < self.short_words

    def _questions(self, prompt: Prompt) -> Questions | None:
        """What is asked about a prompt; None where that is not known."""
        if self._is_short(prompt):
            return (Question("0", fill(self.question, prompt.text)),)
        found = self.book.find(prompt)
        return found and tuple(Question(q.id, q.text + self.suffix, q.parents, q.category) for q in found)


def _parts(questions: Questions, p_yes: Sequence[float]) -> dict[str, float]:
    parts = {
        "questions": float(len(questions)),
        "yes": sum(p > 0.5 for p in p_yes) / len(p_yes),
        "lowest": min(p_yes),
    }
    for category in dict.fromkeys(q.category for q in questions if q.category is not None):
        members = [p for q, p in zip(questions, p_yes, strict=True) if q.category == category]
        parts[category] = sum(members) / len(members)
    return parts


def _check(
    questions: Any = None, writer: Any = None, short_words: Any = 0, dependency: Any = False, suffix: Any = SUFFIX
) -> None:
    if isinstance(short_words, bool) or not isinstance(short_words, int) or short_words < 0:
        raise ValueError(f"short_words: {short_words!r}; give a whole number from 0")
    if not isinstance(dependency, bool):
        raise ValueError(f"dependency: {dependency!r}; give true or false")
    if not isinstance(suffix, str):
        raise ValueError(f"suffix: {suffix!r} is no text")
    if writer is None:
        if questions is None:
            raise ValueError("questions: null; give a .jsonl or .csv file of them, or a writer")
        return
    if not isinstance(writer, Mapping) or not {"url", "model"} <= set(writer):
        raise ValueError(f"writer: {writer!r}; give {{url: http://127.0.0.1:8000/v1, model: name}}")
    unknown = sorted(set(writer) - set(WRITER))
    if unknown:
        raise ValueError(f"writer: {unknown[0]!r} is none of {', '.join(WRITER)}")
    try:
        EndpointSettings(**{key: value for key, value in writer.items() if key not in ("cache", "max_tokens")})
    except ValueError as error:
        raise ValueError(f"writer.{error}") from None
