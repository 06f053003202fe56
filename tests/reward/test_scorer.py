"""Scorers as the pipeline sees them: what they answer, what their failures become, how they are named."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.scorer import absolute_options, build_scorer, check_scorers, score_all
from rlpipe.reward.simple import Brightness
from rlpipe.types import Prompt, Score, ScoreRequest


def plain(value: int = 128, **channels: int) -> np.ndarray:
    image = np.full((8, 8, 3), value, np.uint8)
    for name, level in channels.items():
        image[..., "rgb".index(name)] = level
    return image


def ask(*images: np.ndarray) -> list[ScoreRequest]:
    return [ScoreRequest(id=f"r{i}", prompt=Prompt(str(i), "a circle"), image=im) for i, im in enumerate(images)]


class Threshold:
    """A third party's scorer: no path, no question, an option of its own."""

    def __init__(self, level: float = 0.5) -> None:
        self.level = level

    def score(self, requests):
        return [Score(id=r.id, value=float(r.image.mean() / 255 > self.level)) for r in requests]


class Answering:
    """Returns whatever the function makes of the requests."""

    def __init__(self, function) -> None:
        self.score = function


def test_examples_measure_brightness_and_redness():
    requests = ask(plain(0), plain(255), plain(0, r=255), plain(0, g=255))
    brightness = score_all(build_scorer(ScorerSection(scorer="brightness")), requests)
    redness = score_all(build_scorer(ScorerSection(scorer="redness")), requests)
    assert [s.value for s in brightness] == pytest.approx([0, 1, 1 / 3, 1 / 3])
    assert [s.value for s in redness] == pytest.approx([0, 0, 1, -0.5])
    assert [s.id for s in redness] == ["r0", "r1", "r2", "r3"]
    assert redness[3].parts == {"red": 0.0, "green": 1.0, "blue": 0.0}


def test_a_scorer_of_a_third_party_is_named_by_its_import_path():
    section = ScorerSection(name="mine", scorer=f"{__name__}:Threshold", options={"level": 0.25})
    check_scorers([section])
    scorer = build_scorer(section)
    assert scorer.level == 0.25
    assert [s.value for s in score_all(scorer, ask(plain(10), plain(100)))] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scorer": "interval"},
            r"reward\[mine\].scorer: 'interval' is unknown; take one of boxed, brightness, decomposed",
        ),
        ({"scorer": "no.such.package:Scorer"}, r"reward\[mine\].scorer: cannot import no.such.package"),
        ({"scorer": f"{__name__}:Missing"}, "has no Missing"),
        ({"scorer": "rlpipe.types:Prompt"}, "has no method score"),
        ({"scorer": f"{__name__}:Threshold", "options": {"levle": 1}}, "'levle'; it takes level"),
        ({"options": {"batch_size": 3}}, r"set reward\[mine\].batch_size"),
        ({"path": None}, r"reward\[mine\].path: none; give the folder of an InternVL checkpoint"),
        ({"question": "Is it {promt}?"}, r"reward\[mine\].question: 'Is it {promt}\?' has no {prompt}"),
        ({"question": "Is {it} {prompt}?"}, "unknown placeholder {it}"),
    ],
)
def test_a_wrong_section_is_one_line_that_names_the_field(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_scorers([ScorerSection(**{"name": "mine", **change})])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
def test_a_raising_scorer_gives_missing_scores_with_the_reason(kind):
    def fail(requests):
        raise kind("out of memory")

    scores = score_all(Answering(fail), ask(plain(), plain()))
    assert [(s.id, s.value, s.error) for s in scores] == [
        (f"r{i}", None, f"{kind.__name__}: out of memory") for i in range(2)
    ]


@pytest.mark.parametrize("answer", [None, [], [Score("r0", 0.5)], "ab", 3, iter(())])
def test_an_answer_of_the_wrong_length_or_type_makes_all_scores_missing(answer):
    scores = score_all(Answering(lambda requests: answer), ask(plain(), plain()))
    assert [s.id for s in scores] == ["r0", "r1"]
    assert all(s.missing and s.error for s in scores)


@pytest.mark.parametrize(
    "bad",
    [
        Score("r1", math.nan),
        Score("r1", math.inf),
        Score("r1", "0.5"),
        Score("r1", True),
        Score("r1", None),
        Score("r0", 0.5),
        Score("r1", 0.5, {"detail": math.nan}),
        Score("r1", 0.5, None),
        Score("r1", 0.5, [1.0]),
        Score("r1", 10**400),
        0.5,
    ],
    ids=lambda bad: str(bad)[:60],
)
def test_one_bad_value_is_missing_and_leaves_its_neighbours_alone(bad):
    good = [Score("r0", np.float32(0.25)), bad, Score("r2", 1)]
    scores = score_all(Answering(lambda requests: good), ask(plain(), plain(), plain()))
    assert [s.value for s in scores] == [0.25, None, 1.0]
    assert scores[1].id == "r1" and scores[1].error
    assert all(type(scores[i].value) is float for i in (0, 2))


def test_a_malformed_image_fails_alone_and_never_reaches_the_scorer():
    requests = ask(plain(255), plain().astype(np.float32), plain()[..., 0], plain(0), None)
    scores = score_all(Brightness(), requests)
    assert [s.value for s in scores] == [1.0, None, None, 0.0, None]
    assert "float32" in scores[1].error and "(8, 8)" in scores[2].error


class Weighted(Threshold):
    paths: ClassVar = {"weights": None, "inner.cache": "runs/cache"}

    def __init__(self, weights: str | None = None, inner: dict | None = None) -> None:
        super().__init__()


def test_options_that_are_paths_are_made_absolute_where_the_run_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = ScorerSection(scorer=f"{__name__}:Weighted", options={"weights": "w", "inner": {"model": "m"}})
    there = absolute_options(section)
    assert there == {"weights": str(tmp_path / "w"), "inner": {"model": "m", "cache": str(tmp_path / "runs/cache")}}
    assert section.options == {"weights": "w", "inner": {"model": "m"}}
    assert absolute_options(ScorerSection(scorer=f"{__name__}:Weighted", options={"weights": "/w"})) == {
        "weights": "/w"
    }
    assert absolute_options(ScorerSection(scorer="not.here:Scorer", options={"weights": "w"})) == {"weights": "w"}


def test_no_requests_need_no_scorer():
    assert score_all(Answering(lambda requests: 1 / 0), []) == []
