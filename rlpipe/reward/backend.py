"""What answers a judge's questions: one contract, whether the model is in this process, in vLLM or behind HTTP.

    backend = build_backend("transformers", "rlpipe/world/assets/judge", batch_size=64)
    backend.answer([Query.about("Is the circle red?", image)])[0].p_yes          # 0.97

A backend is a class that is constructed as

    Class(path, *, batch_size=128, device="auto", dtype="float32", system="", max_tiles=12, **engine)

    path:       checkpoint folder; what a server calls its model may stand in `engine` instead, then path is None.
    batch_size: most queries that are in the model at once.
    device:     "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1". dtype: "float32" or "bfloat16".
    system:     text of a system message; empty leaves it out.
    max_tiles:  most tiles that an image is cut into, its thumbnail not counted.
    engine:     settings that only this backend has.

and that checks all of these without building anything, reading weights or touching a network, with

    @staticmethod
    def check(path, *, batch_size=128, device="auto", dtype="float32", system="", max_tiles=12, **engine) -> None

ValueError "setting: value ..., way out" names what is wrong.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

BACKENDS = {
    "transformers": "rlpipe.reward.internvl:InternVLBackend",
    "vllm": "rlpipe.reward.vllm:VLLMBackend",
    "http": "rlpipe.reward.http:HTTPBackend",
}
Item = TypeVar("Item")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What is asked: texts with an image (uint8 [H, W, 3]) between each two of them; no image, one text.

    Query(texts=("", "\\nIs it red?"), images=(image,))             # the same as Query.about("Is it red?", image)
    """

    texts: tuple[str, ...]
    images: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.images) + 1:
            raise ValueError(f"texts: {len(self.texts)} around {len(self.images)} images; give one more than images")

    @classmethod
    def about(cls, question: str, image: np.ndarray) -> Query:
        """A question about one image, which stands on a line before it."""
        return cls(("", f"\n{question}"), (image,))

    @property
    def key(self) -> tuple[str | bytes | tuple[int, ...], ...]:
        """Equal for queries with equal texts and pixels."""
        pixels = [part for i in self.images for part in (i.shape, hashlib.sha256(np.ascontiguousarray(i)).digest())]
        return (*self.texts, *pixels)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge said of one query, or the reason why it said nothing.

    p_yes: P(yes) against no, over {yes, Yes, YES} and {no, No, NO}; mass: what these six have of the whole
           vocabulary. A low mass tells of a chat format or a question that this model does not understand.
    text:  the words of `Backend.write`; cut: whether they end at the length limit, as far as the backend tells.
    """

    p_yes: float | None = None
    mass: float | None = None
    text: str | None = None
    cut: bool = False
    error: str | None = None

    @classmethod
    def from_logprobs(cls, yes: Sequence[float], no: Sequence[float]) -> Answer:
        """The answer from the log-probs, of the whole vocabulary, of the spellings of yes and of no.

        A spelling without a log-prob is left out; -inf is one that cannot be said. No probability in either, or NaN,
        is an error and no answer. Rounded to six digits: what lies behind depends on the batch that a query shared.
        """
        given = [*yes, *no]
        if any(math.isnan(v) or v == math.inf for v in given):
            return cls(error=f"log-probs of yes and no are not finite: {given}")
        top = max(given, default=-math.inf)
        if top == -math.inf:
            return cls(error="neither yes nor no has any probability")
        yes_share, no_share = (sum(math.exp(v - top) for v in values) for values in (yes, no))
        p_yes, mass = yes_share / (yes_share + no_share), min(1.0, math.exp(top) * (yes_share + no_share))
        return cls(p_yes=round(p_yes, 6), mass=round(mass, 6))


class Backend(Protocol):
    """Methods may be called from several threads at once; answers are in the order of the queries.

    prepare_seconds: float, seconds spent so far on images and texts before the model sees them (all threads together).
    """

    prepare_seconds: float

    def prepare(self, queries: Sequence[Query]) -> Any:
        """What `answer` needs of the queries: CPU work, to be done while the model is busy with other queries."""
        ...

    def answer(self, queries: Sequence[Query], prepared: Any = None) -> list[Answer]:
        """P(yes) and its mass, from the first answer token: raw logits, no sampling. Equal queries are asked once."""
        ...

    def write(self, queries: Sequence[Query], max_tokens: int) -> list[Answer]:
        """The greedy words of each answer, in `Answer.text` and `Answer.cut`."""
        ...


def build_backend(name: str, path: str | Path | None, **settings: Any) -> Backend:
    """The backend of that name; ValueError names the setting that is wrong, before anything is loaded."""
    check_backend(name, path, settings)
    return _class(name)(path, **settings)


def check_backend(name: str, path: str | Path | None, settings: Mapping[str, Any]) -> None:
    """The checks of `build_backend` without building: the shared settings here, the backend's own in its class."""
    if name not in BACKENDS:
        raise ValueError(f"backend: {name!r} is unknown; take one of {', '.join(BACKENDS)}")
    for key in ("batch_size", "max_tiles"):
        value = settings.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key}: {value!r} is no whole number of at least 1")
    dtype = settings.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    for key in ("device", "system"):
        if not isinstance(settings.get(key, ""), str):
            raise ValueError(f"{key}: {settings[key]!r} is no text")
    check = _class(name).check
    try:
        inspect.signature(check).bind(path, **settings)
    except TypeError as error:
        raise ValueError(f"engine: backend {name} {error}") from None
    check(path, **settings)


def distinct(queries: Sequence[Query]) -> tuple[list[Query], list[int]]:
    """The queries without repetitions, and for each query the index of its equal among them."""
    first: dict[tuple, int] = {}
    kept, places = [], []
    for query in queries:
        place = first.setdefault(query.key, len(kept))
        if place == len(kept):
            kept.append(query)
        places.append(place)
    return kept, places


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The items, none of which is None; while one is being used, the next is made on another thread."""
    with ThreadPoolExecutor(1, "prepare") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _class(name: str) -> type:
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
