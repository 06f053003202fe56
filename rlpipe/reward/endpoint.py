"""A server that speaks the OpenAI protocol (`vllm serve` and others): requests that are repeated, limited and counted.

endpoint = Endpoint(EndpointSettings(url="http://127.0.0.1:8000/v1", model="judge"))
endpoint.chat("Name a colour.", max_tokens=4)               # "Red."
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

T = TypeVar("T")
LONGEST_PAUSE_S = 30.0
TRY_AGAIN = (408, 425, 429)
"""Statuses below 500 that may go away by themselves."""
AWAY = (*TRY_AGAIN, 502, 503, 504)
"""Statuses of a server that says nothing of the question itself."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class ServerError(RuntimeError):
    """No usable answer after all attempts. The message says why and never has the key in it.

    status: of the last answer where that was an HTTP error, else 0.
    away:   whether the server was not reached, or was too busy to look at the request.
    """

    def __init__(self, reason: str, status: int = 0, away: bool = False) -> None:
        super().__init__(reason, status, away)
        self.reason, self.status, self.away = reason, status, away

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where the server is and how it is asked; ValueError "setting: value ..., way out".

    url:          up to and with /v1.
    model:        the name that the server knows it by.
    api_key_env:  environment variable that holds the key, sent as `Authorization: Bearer`; None sends none.
    concurrency:  most requests at once, over all threads of this process.
    timeout_s:    of one request, from its sending to the end of its answer.
    retries:      times that a request is repeated after a failure that may pass.
    backoff_s:    pause before the first of them, doubled before each further one up to 30 s, a random half of it off.
    top_logprobs: length of the list of first tokens that is asked for (OpenAI and vLLM allow 20 by default).
    tolerance:    widest interval in which a P(yes) may be known only, where that list does not have every spelling.
    extra:        further fields of every request's body, such as {"mm_processor_kwargs": {...}}.
    """

    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 16
    timeout_s: float = 30.0
    retries: int = 2
    backoff_s: float = 0.5
    top_logprobs: int = 20
    tolerance: float = 1e-3
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model: {self.model!r} is no name; give the one that the server lists under /v1/models")
        name = self.api_key_env
        # A name in small letters is refused too: it may be a key, and then it must not be in the error.
        if name is not None and (not isinstance(name, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name)):
            raise ValueError(
                "api_key_env: not the name of an environment variable in capitals, such as JUDGE_KEY; give that, never "
                "the key itself"
            )
        for name, smallest in (("concurrency", 1), ("retries", 0), ("top_logprobs", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"{name}: {value!r} is no whole number of at least {smallest}")
        for name in ("timeout_s", "backoff_s", "tolerance"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0 or (name == "timeout_s" and value == 0):
                raise ValueError(
                    f"{name}: {value!r} is no number {'above' if name == 'timeout_s' else 'of at least'} 0"
                )
        if not isinstance(self.extra, Mapping):
            raise ValueError(f"extra: {self.extra!r} is no mapping; give fields of the request's body by name")


def _check_url(url: Any) -> None:
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"url: {url!r} is no address ({error}); give one like http://127.0.0.1:8000/v1") from None
    if parsed.userinfo:
        raise ValueError("url: has a user or a password in it; name an environment variable in api_key_env instead")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"url: {url!r} is no http address; give one like http://127.0.0.1:8000/v1")


class _Failure(Exception):
    """One attempt that gave nothing. `passing`: whether another may succeed, `pause_s`: after that long at least."""

    def __init__(self, kind: str, reason: str, passing: bool = True, pause_s: float = 0.0, status: int = 0) -> None:
        super().__init__(reason)
        self.kind, self.passing, self.pause_s, self.status = kind, passing, pause_s, status


def wrong_shape(what: str) -> Exception:
    """What a reader of `Endpoint.complete` raises about an answer without `what`: counted and asked again."""
    return _Failure("wrong_shape", f"the answer has no {what}")


def not_finite(what: str) -> Exception:
    """The same, about a number that is NaN or infinite."""
    return _Failure("not_finite", f"the answer has {what}, not a finite number")


class Endpoint:
    """The client of one server; all methods may be called from several threads at once.

    ValueError if the variable `api_key_env` is not set or holds no key.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self._key = _read_key(settings.api_key_env)
        url = httpx2.URL(settings.url)
        self.url = str(url).rstrip("/")
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else None,
            timeout=httpx2.Timeout(settings.timeout_s),
            limits=httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency),
            trust_env=url.host not in LOOPBACK,  # a proxy's own loopback is not ours
        )
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._random = random.Random()

    @property
    def counts(self) -> dict[str, int]:
        """So far: requests, retries, and failed/<kind> for each failed attempt: timeout, connection, http_<status>,
        malformed_json, wrong_shape, not_finite."""
        with self._lock:
            return dict(self._counts)

    def chat(self, messages: str | Sequence[Mapping[str, Any]], max_tokens: int) -> str:
        """The greedy answer to a text, or to a list of messages; ServerError if there is none."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.write(messages, max_tokens)[0]

    def write(self, messages: Sequence[Mapping[str, Any]], max_tokens: int) -> tuple[str, bool]:
        """The same of a list of messages, and whether the server says that it was cut at `max_tokens`."""
        return self.complete(messages, _words, max_tokens=max_tokens)

    def complete(self, messages: Sequence[Mapping[str, Any]], read: Callable[[Any], T], **fields: Any) -> T:
        """`read` of the server's answer to the messages at temperature 0; ServerError after the last attempt."""
        body = {"messages": messages, "temperature": 0, **fields}
        return self._repeat(lambda: read(self._exchange("POST", f"{self.url}/chat/completions", body)))

    def offers(self, url: str, body: Mapping[str, Any]) -> Any:
        """The JSON that the server answers with; None where it refuses such a request (HTTP 4xx). ServerError."""

        def once() -> Any:
            try:
                return self._exchange("POST", url, body)
            except _Failure as failure:
                if failure.passing:
                    raise
                return None

        return self._repeat(once)

    def problems(self) -> list[str]:
        """One line if the server cannot be reached, refuses the key or does not serve the model; to be asked before a
        run. A server that does not list its models is taken at its word."""
        where, model = self.url, self.settings.model
        try:
            payload = self._repeat(lambda: self._exchange("GET", f"{where}/models"))
        except ServerError as error:
            if error.status in (401, 403):
                named = f"the key in {self.settings.api_key_env}" if self._key else "a request without a key"
                return [f"engine.api_key_env: {where} refuses {named} ({error}); set it to the name of the right one"]
            if error.status in (404, 405):
                return []
            reason = str(error).removeprefix(f"{where}: ")
            return [f"engine.url: {where} gives no answer ({reason}); is the server running?"]
        try:
            names = [entry["id"] for entry in payload["data"]]
        except (KeyError, TypeError):
            return [f"engine.url: {where}/models is no list of models; is this an OpenAI-compatible server?"]
        if model not in names:
            return [f"engine.model: {where} does not serve {model!r}; take one of {', '.join(map(str, names))}"]
        return []

    def close(self) -> None:
        self._client.close()

    def _repeat(self, attempt: Callable[[], T]) -> T:
        for number in range(self.settings.retries + 1):
            try:
                with self._slots:
                    self._count("requests")
                    return attempt()
            except _Failure as caught:
                failure = caught
            self._count(f"failed/{failure.kind}")
            if not failure.passing or number == self.settings.retries:
                raise self._given_up(failure, number)
            pause = min(self.settings.backoff_s * 2**number, LONGEST_PAUSE_S) * self._random.uniform(0.5, 1.0)
            if failure.pause_s > max(LONGEST_PAUSE_S, self.settings.timeout_s):
                raise self._given_up(failure, number)
            self._count("retries")
            # The slot is free meanwhile: who waits keeps nobody from asking.
            time.sleep(max(pause, failure.pause_s))
        raise AssertionError("the last attempt returns or raises")

    def _given_up(self, failure: _Failure, number: int) -> ServerError:
        """One short line, the key taken out: servers quote what they refuse."""
        line = self._without_key(" ".join(str(failure).split()))[:300]
        if failure.pause_s:
            line += f"; asked to wait {failure.pause_s:.0f} s"
        away = failure.kind in ("timeout", "connection") or failure.status in AWAY
        return ServerError(f"{line}; attempts: {number + 1}" if number else line, failure.status, away)

    def _without_key(self, text: str) -> str:
        """To be asked for before a text is cut: a part of the key would no longer be found."""
        return text.replace(self._key, "[key]") if self._key else text

    def _exchange(self, method: str, url: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request and the JSON it is answered with."""
        if body is not None:
            body = {"model": self.settings.model, **body, **self.settings.extra}
        try:
            response, content = self._send(method, url, body)
        except httpx2.TimeoutException:
            raise _Failure("timeout", f"{self.url}: no answer within {self.settings.timeout_s:g} s") from None
        except httpx2.HTTPError as error:
            raise _Failure("connection", f"{self.url}: {type(error).__name__}: {error}") from None
        status = response.status_code
        if status != 200:
            passing = status >= 500 or status in TRY_AGAIN
            pause = _pause_asked(response.headers.get("retry-after")) if passing else 0.0
            raise _Failure(f"http_{status}", f"HTTP {status}: {_message(content)}", passing, pause, status)
        try:
            return json.loads(content)
        except ValueError:
            text = self._without_key(content.decode("utf-8", errors="replace"))
            raise _Failure("malformed_json", f"the answer is no JSON: {text[:80]!r}") from None

    def _send(self, method: str, url: str, body: Mapping[str, Any] | None) -> tuple[httpx2.Response, bytes]:
        deadline = time.monotonic() + self.settings.timeout_s
        content = bytearray()
        with self._client.stream(method, url, json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                # The library's timeout is of each read; an answer that trickles in would never meet it.
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout("the answer did not end in time")
        return response, bytes(content)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"api_key_env: the environment variable {variable} is not set; set it where this actor runs")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"api_key_env: {variable} holds blanks or characters that no key has; set it to the key alone")
    return key


def _words(payload: Any) -> tuple[str, bool]:
    try:
        choice = payload["choices"][0]
        words, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (KeyError, IndexError, TypeError, AttributeError):
        words, cut = None, False
    if not isinstance(words, str):
        raise wrong_shape("text in choices[0].message.content")
    return words, cut


def _message(content: bytes) -> str:
    """What a server says of an error: `message` of its JSON where it has one, else its words."""
    text = content.decode("utf-8", errors="replace")
    try:
        payload = json.loads(text)
        said = payload.get("error", payload)
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, AttributeError, KeyError):
        return text or "no message"


def _pause_asked(header: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 without one."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
