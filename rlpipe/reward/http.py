"""A judge behind an OpenAI-compatible server: P(yes) from the log-probs that come with its first answer token.

    backend = HTTPBackend(None, url="http://127.0.0.1:8000/v1", model="judge")
    backend.answer([Query.about("Is the circle red?", image)])[0].p_yes          # 0.97

The server has the chat format, the images' preprocessing and the precision; this side sends texts and pixels.
"""

from __future__ import annotations

import base64
import io
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlpipe.reward.backend import Answer, Query, distinct
from rlpipe.reward.endpoint import Endpoint, EndpointSettings, ServerError, not_finite, wrong_shape
from rlpipe.reward.judge import NO, YES

Messages = list[dict[str, Any]]
Row = tuple[tuple[str, ...], tuple[str, ...]]
"""The texts of a query and its images as data URLs, one between each two texts."""
Prepared = tuple[list[Row | Answer], list[int]]
"""Each distinct query, or why it cannot be asked, and which of them each query is."""
SPECIAL = re.compile(
    r"<\|\w+\|>|<IMG_CONTEXT>|</?(?:s|unk|img|image|video|quad|ref|box|think|tool_call)>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|\[UNUSED_TOKEN_\d+\]"
)
"""Texts that servers read as tokens of the chat (of InternVL's language models, and others'): with them a prompt could
close its turn or add an image."""
UNSAYABLE = -9999.0
"""Log-prob that vLLM sends in place of -inf, which JSON does not have."""


class HTTPBackend:
    """`rlpipe.reward.backend.Backend` over HTTP; `engine` are the fields of `EndpointSettings`.

    path:       the model's name on the server where `model` is not set (`vllm serve PATH` serves it as PATH).
    batch_size, device, dtype, max_tiles: the server's own affair; accepted and not sent. `engine.concurrency` is what
                limits the requests that are under way, over all threads.

    A server with vLLM's routes is asked once for its tokens of yes and no and for its chat template's way with images,
    then for the log-probs of exactly these tokens. Any other is asked for the `top_logprobs` likeliest tokens: a
    spelling that is not among them has at most the probability of the last of them, so P(yes) is known up to an
    interval. Its middle is the answer where it is no wider than `tolerance`; else the answer is missing, as it is where
    neither yes nor no is in the list.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        batch_size: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        **engine: Any,
    ) -> None:
        self.endpoint = Endpoint(_settings(path, engine))
        self.prepare_seconds = 0.0
        self._system = [{"role": "system", "content": system}] if system else []
        # One pool for all callers: batches that come from several threads share what the server is asked at once.
        self._pool = ThreadPoolExecutor(self.endpoint.settings.concurrency, thread_name_prefix="judge-http")
        self._lock = threading.Lock()
        self._dialect: _Dialect | None = None

    @staticmethod
    def check(
        path: str | Path | None,
        *,
        batch_size: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        **engine: Any,
    ) -> None:
        """ValueError for a wrong setting; whether the key's variable is set is told where the backend is built."""
        _settings(path, engine)

    @property
    def counts(self) -> dict[str, int]:
        """See `Endpoint.counts`."""
        return self.endpoint.counts

    def problems(self) -> list[str]:
        """See `Endpoint.problems`."""
        return self.endpoint.problems()

    def prepare(self, queries: Sequence[Query]) -> Prepared:
        """The distinct queries, their images as PNG."""
        start = time.perf_counter()
        kept, places = distinct(queries)
        rows = [_row(query) for query in kept]
        with self._lock:
            self.prepare_seconds += time.perf_counter() - start
        return rows, places

    def answer(self, queries: Sequence[Query], prepared: Prepared | None = None) -> list[Answer]:
        """One answer per query, in order; what the server does not give is an answer with an error."""
        return self._each(prepared or self.prepare(queries), self._ask)

    def write(self, queries: Sequence[Query], max_tokens: int) -> list[Answer]:
        """The greedy words of each answer, or an error."""
        return self._each(self.prepare(queries), partial(self._write, max_tokens=max_tokens))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.endpoint.close()

    def _each(self, prepared: Prepared, ask: Callable[[Messages, _Dialect], Answer]) -> list[Answer]:
        rows, places = prepared
        try:
            # Two threads may both ask at the start; they are told the same.
            dialect = self._dialect = self._dialect or _dialect(self.endpoint)
        except ServerError as error:
            return [Answer(error=str(error))] * len(places)

        def one(row: Row | Answer) -> Answer:
            if isinstance(row, Answer):
                return row
            messages = [*self._system, {"role": "user", "content": content(*row, dialect.ends_lines)}]
            try:
                return ask(messages, dialect)
            except ServerError as error:
                return Answer(error=str(error))
            except Exception as error:  # of one query; the others of its batch have their answers
                return Answer(error=f"{type(error).__name__}: {error}")

        answers = list(self._pool.map(one, rows))
        return [answers[place] for place in places]

    def _ask(self, messages: Messages, dialect: _Dialect) -> Answer:
        settings, tokens = self.endpoint.settings, dialect.tokens
        # A server that tells its tokens but knows no `logprob_token_ids` sends the list of the likeliest instead.
        fields = {"logprob_token_ids": list(tokens.values())} if tokens else {}
        listed = self.endpoint.complete(
            messages, first_token, max_tokens=1, logprobs=True, top_logprobs=settings.top_logprobs, **fields
        )
        return judged(listed, tuple(tokens or (*YES, *NO)), settings.tolerance)

    def _write(self, messages: Messages, dialect: _Dialect, max_tokens: int) -> Answer:
        text, cut = self.endpoint.write(messages, max_tokens)
        return Answer(text=text, cut=cut)


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What a server tells of itself.

    tokens:     token of each spelling of yes and no that is one; None where it does not tell or has none of either.
    ends_lines: whether its chat template breaks the line after an image, as those of published checkpoints do.
    """

    tokens: dict[str, int] | None
    ends_lines: bool


def _settings(path: str | Path | None, engine: Mapping[str, Any]) -> EndpointSettings:
    known = list(EndpointSettings.__dataclass_fields__)
    unknown = sorted(set(engine) - set(known))
    if unknown:
        raise ValueError(f"{unknown[0]}: no setting of backend http; it has {', '.join(known)}")
    if "url" not in engine:
        raise ValueError("url: missing; give the server's address, such as http://127.0.0.1:8000/v1")
    return EndpointSettings(**{"model": None if path is None else str(path), **engine})


def _dialect(endpoint: Endpoint) -> _Dialect:
    """ServerError if the server does not answer; one that does not know a question, or answers it with something else,
    has the default."""
    tokens = {}
    for word in (*YES, *NO):
        body = {"prompt": word, "add_special_tokens": False, "return_token_strs": True}
        try:
            payload = endpoint.offers(f"{endpoint.url.removesuffix('/v1')}/tokenize", body)
        except ServerError as error:
            if error.away:
                raise
            payload = None
        try:
            ids, texts = payload["tokens"], payload["token_strs"]
            # The text tells a word from the unknown token; tokenizers mark the start of a word in their own ways.
            if len(ids) == 1 and texts[0].lstrip("\u2581\u0120 ") == word:
                tokens[word] = int(ids[0])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            return _Dialect(None, ends_lines=True)
    blank = data_url(np.zeros((32, 32, 3), np.uint8))
    probe = [{"role": "user", "content": content(("", "yes"), (blank,), ends_lines=False)}]
    body = {"messages": probe, "max_tokens": 1, "temperature": 0, "return_prompt_text": True}
    payload = endpoint.offers(f"{endpoint.url}/chat/completions", body)
    prompt = payload.get("prompt_text") if isinstance(payload, dict) else None
    ends_lines = not isinstance(prompt, str) or prompt.rpartition("yes")[0].endswith("\n")
    return _Dialect(tokens if tokens.keys() & set(YES) and tokens.keys() & set(NO) else None, ends_lines)


def _row(query: Query) -> Row | Answer:
    special = SPECIAL.search("\n".join(query.texts))
    if special:
        return Answer(error=f"the text has {special[0]!r} in it, which a server reads as a token of the chat")
    return query.texts, tuple(map(data_url, query.images))


def content(texts: Sequence[str], urls: Sequence[str], ends_lines: bool) -> str | list[dict[str, Any]]:
    """The content of a chat message: a text, or texts and the images between them.

    ends_lines: the server's template breaks the line after an image; a break that a text begins with is left out.
    """
    if not urls:
        return texts[0]
    parts = [{"type": "text", "text": texts[0]}]
    for url, text in zip(urls, texts[1:], strict=True):
        parts.append({"type": "image_url", "image_url": {"url": url}})
        parts.append({"type": "text", "text": text.removeprefix("\n") if ends_lines else text})
    return [part for part in parts if part.get("text") != ""]


def data_url(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a data URL: PNG, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def first_token(payload: Any) -> dict[str, float]:
    """Text -> log-prob of the first answer token and of those listed beside it; of equal texts the likelier one."""
    try:
        token = payload["choices"][0]["logprobs"]["content"][0]
        given = [(entry["token"], entry["logprob"]) for entry in (*token["top_logprobs"], token)]
    except (KeyError, IndexError, TypeError):
        raise wrong_shape("choices[0].logprobs.content[0].top_logprobs") from None
    listed: dict[str, float] = {}
    for text, logprob in given:
        if not isinstance(text, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise wrong_shape("token and logprob in each of top_logprobs")
        if not math.isfinite(logprob):
            raise not_finite(f"log-prob {logprob} of {text!r}")
        if logprob > 1e-3:  # of rounding; more is a score of another kind
            raise wrong_shape(f"log-prob but {logprob} for {text!r}")
        value = -math.inf if logprob <= UNSAYABLE else float(logprob)
        listed[text] = max(value, listed.get(text, -math.inf))
    return listed


def judged(listed: Mapping[str, float], spellings: Sequence[str], tolerance: float) -> Answer:
    """The answer from some tokens' log-probs, by text, of the whole vocabulary.

    spellings: those of yes and no that are tokens; one that is not listed has an unknown probability between 0 and
               that of the least likely token listed, and all of them together at most what the list leaves.
    A spelling is read with a blank before it where it is not listed without.
    """
    found = {word: listed.get(word, listed.get(f" {word}")) for word in spellings}
    sides = [[word for word in spellings if word in side] for side in (YES, NO)]
    known = [[found[word] for word in side if found[word] is not None] for side in sides]
    if not known[0] and not known[1]:
        likeliest = ", ".join(repr(text) for text in sorted(listed, key=listed.get, reverse=True)[:3])
        return Answer(error=f"neither yes nor no among the {len(listed)} likeliest first tokens ({likeliest}, ...)")
    answer = Answer.from_logprobs(*known)
    if answer.error is not None or None not in found.values():
        return answer
    if answer.mass == 0.0:
        return Answer(error="yes and no have less than a millionth of the probability; is it a question of yes or no?")
    yes, no = (sum(map(math.exp, side)) for side in known)
    least = math.exp(min(listed.values()))
    left = max(0.0, 1.0 - sum(map(math.exp, listed.values())))
    more_yes, more_no = (min((len(s) - len(k)) * least, left) for s, k in zip(sides, known, strict=True))
    low, high = yes / (yes + no + more_no), (yes + more_yes) / (yes + more_yes + no)
    if high - low > tolerance:
        return Answer(
            error=f"P(yes) is only known to be in [{low:.4f}, {high:.4f}] by {len(listed)} log-probs; raise "
            "engine.top_logprobs as far as the server allows, or engine.tolerance"
        )
    return Answer(p_yes=(low + high) / 2, mass=answer.mass)
