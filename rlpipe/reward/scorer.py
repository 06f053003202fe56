"""What a scorer is, how a configuration names one, and what becomes of its answers.

A scorer of a third party needs no change here: any class with `score(requests) -> list[Score]` is named by
its import path; its constructor gets those of `path`, `question`, `batch_size` that it has, and `options`.

    reward: [{name: style, scorer: "mypackage.style:StyleScorer", weight: 0.5, options: {level: 3}}]

Beyond `score` a scorer may have:

    needs = ("source_image",)             what its section's `sees` has to name besides the images
    check(prompts) -> list[str]           one line for each prompt that it cannot score, asked before a run starts
    check_keywords(**keywords)            static; ValueError "key: what is wrong; way out" before anything is built
    paths = {"weights": None}             options that are paths, "inner.key" inside a mapping, and their defaults: made
                                          absolute where a run is started, whatever folder its actors are in
    prepare(requests) -> prepared         work for another thread, done while it scores the batch before;
    score_prepared(requests, prepared)    then called in place of `score`
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.paths import resolve_path
from rlpipe.reward.question import check_question
from rlpipe.types import Score, ScoreRequest


class Scorer(Protocol):
    """Answers requests, at most `batch_size` of its section at once: as many scores, in their order, with their ids."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...


SCORERS: dict[str, str] = {
    "internvl": "rlpipe.reward.internvl:InternVLJudge",
    "editing": "rlpipe.reward.editing:EditingJudge",
    "decomposed": "rlpipe.reward.decomposed:DecomposedJudge",
    "boxed": "rlpipe.reward.boxed:BoxedJudge",
    "detector": "rlpipe.reward.detector:DetectorScorer",
    "brightness": "rlpipe.reward.simple:Brightness",
    "redness": "rlpipe.reward.simple:Redness",
    "jpeg_size": "rlpipe.reward.simple:JpegSize",
}
"""Registry name -> import path; paths, so that one scorer's dependencies are not everybody's."""

STANDARD_KEYWORDS = ("path", "question", "batch_size")


def resolve_scorer(section: ScorerSection) -> tuple[Callable[..., Scorer], dict[str, Any]]:
    """The scorer's class and its constructor's keywords, nothing built; ConfigError where they do not fit."""
    field = f"reward[{section.name}]"
    target = _import(SCORERS.get(section.scorer, section.scorer), f"{field}.scorer")
    if not callable(getattr(target, "score", None)):
        raise ConfigError(f"{field}.scorer: {section.scorer} has no method score(requests)")
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    clash = sorted(set(section.options) & set(STANDARD_KEYWORDS))
    if clash:
        raise ConfigError(f"{field}.options: {clash[0]} is a key of its own; set {field}.{clash[0]}")
    keywords = {
        key: getattr(section, key)
        for key in STANDARD_KEYWORDS
        if (open_ended or key in parameters) and getattr(section, key) is not None
    }
    if "question" in keywords:
        try:
            check_question(section.question, f"{field}.question")
        except ValueError as error:
            raise ConfigError(str(error)) from None
    keywords |= section.options
    try:
        inspect.signature(target).bind(**keywords)
    except TypeError as error:
        accepted = ", ".join(parameters) or "nothing"
        raise ConfigError(f"{field}: {section.scorer} {error}; it takes {accepted}") from None
    for needed in getattr(target, "needs", ()):
        if needed not in section.sees:
            raise ConfigError(f"{field}.sees: {section.scorer} needs {needed}; add it to {section.sees}")
    if hasattr(target, "check_keywords"):
        try:
            target.check_keywords(**keywords)
        except ValueError as error:
            raise ConfigError(_at(section, error, parameters)) from None
    return target, keywords


def check_scorers(sections: Sequence[ScorerSection]) -> None:
    """ConfigError if a scorer cannot be found or its constructor does not take its section's keywords.

    Beyond what `rlpipe.config.validate` checks, because it imports the scorers' modules (torch with them).
    """
    for section in sections:
        resolve_scorer(section)


def scorers_fit(sections: Sequence[ScorerSection]) -> bool:
    """`check_scorers` for a dry run: whether they can be built; what is wrong is told in one line on stderr."""
    try:
        check_scorers(sections)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def build_scorer(section: ScorerSection, device: str | None = None) -> Scorer:
    """The scorer of a section, loaded and ready; ConfigError names the section's field that is at fault.

    device: handed to a scorer that takes one, unless its options name another.
    """
    target, keywords = resolve_scorer(section)
    if device is not None and "device" in inspect.signature(target).parameters:
        keywords.setdefault("device", device)
    try:
        return target(**keywords)
    except (ValueError, OSError) as error:
        raise ConfigError(_at(section, error, inspect.signature(target).parameters)) from error


def absolute_options(section: ScorerSection) -> dict[str, Any]:
    """The section's options with absolute paths, where the scorer's `paths` name some."""
    options = copy.deepcopy(section.options)
    try:
        paths = getattr(_import(SCORERS.get(section.scorer, section.scorer), "scorer"), "paths", {})
    except ConfigError:  # a job may have no use for the scorer; where it is built this is told
        return options
    for name, default in paths.items():
        outer, _, key = name.rpartition(".")
        holder = options.get(outer) if outer else options
        if isinstance(holder, dict) and isinstance(path := holder.get(key, default), str | Path):
            holder[key] = str(resolve_path(path))
    return options


def _at(section: ScorerSection, error: Exception, known: Collection[str]) -> str:
    """A scorer's error in one line, with the field of the section that it begins with, if that is one."""
    line = " ".join(str(error).split())
    key = line.partition(":")[0].partition(".")[0]
    if key in STANDARD_KEYWORDS:
        return f"reward[{section.name}].{line}"
    return f"reward[{section.name}].options.{line}" if key in known else f"reward[{section.name}]: {line}"


def _import(path: str, field: str) -> Any:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        known = ", ".join(sorted(SCORERS))
        raise ConfigError(f"{field}: {path!r} is unknown; take one of {known}, or an import path package.module:Class")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"{field}: cannot import {module_name} ({error}); is it installed here?") from error
    except AttributeError:
        raise ConfigError(f"{field}: module {module_name} has no {name}") from None


def score_all(scorer: Scorer, requests: Sequence[ScoreRequest]) -> list[Score]:
    """One score per request, whatever the scorer does: what it fails to give is missing, with the reason.

    Missing are all scores when it raises or returns the wrong number of them, and single ones when the image
    is not uint8 [H, W, 3], the id is another one's, or a value or part is not a finite real number.
    """
    problems = {i: p for i, r in enumerate(requests) if (p := _image_problem(r.image))}
    good = [r for i, r in enumerate(requests) if i not in problems]
    answers = iter(_answers(scorer, good) if good else [])
    return [
        Score(id=r.id, value=None, error=problems[i]) if i in problems else next(answers)
        for i, r in enumerate(requests)
    ]


def _answers(scorer: Scorer, requests: Sequence[ScoreRequest]) -> list[Score]:
    try:
        scores = scorer.score(requests)
        if not isinstance(scores, Sequence) or len(scores) != len(requests):
            got = len(scores) if isinstance(scores, Sequence) else f"a {type(scores).__name__}"
            raise TypeError(f"score(requests) returned {got} for {len(requests)} requests")
        scores = list(scores)
    except (Exception, SystemExit) as error:  # foreign code: its failure is data here, counted by the caller
        return [_failed(r, error) for r in requests]
    return [_checked(r, s) for r, s in zip(requests, scores, strict=True)]


def _image_problem(image: Any) -> str | None:
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and min(shape) > 0:
        return None
    return f"image is {type(image).__name__} {dtype} {shape}, not uint8 [H, W, 3]"


def _failed(request: ScoreRequest, error: BaseException) -> Score:
    return Score(id=request.id, value=None, error=f"{type(error).__name__}: {error}")


def _checked(request: ScoreRequest, score: Any) -> Score:
    """The score with plain floats, or a missing one that says why."""
    try:
        return _plain(request, score)
    except Exception as error:  # of what is in it, such as a whole number beyond all floats
        return _failed(request, error)


def _plain(request: ScoreRequest, score: Any) -> Score:
    if not isinstance(score, Score):
        reason = f"answer is a {type(score).__name__}, not a Score"
    elif score.id != request.id:
        reason = f"answer has id {score.id!r}, asked was {request.id!r}"
    elif score.missing:
        reason = score.error or "no value and no reason given"
    elif not isinstance(score.parts, Mapping):
        reason = f"parts is a {type(score.parts).__name__}, not a mapping"
    else:
        named = {"value": score.value, **{f"part {key}": value for key, value in score.parts.items()}}
        bad = [f"{name} is {value!r}" for name, value in named.items() if not _is_finite(value)]
        if not bad:
            parts = {key: float(value) for key, value in score.parts.items()}
            return Score(id=request.id, value=float(score.value), parts=parts)
        reason = f"{bad[0]}, not a finite number"
    return Score(id=request.id, value=None, error=reason)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
