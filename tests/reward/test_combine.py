"""One image's rewards out of several scorers."""

from __future__ import annotations

import pytest

from rlpipe.config import ScorerSection
from rlpipe.reward.combine import combine, looks_at, usable
from rlpipe.types import ImageScore, Score

LOST = Score("x", None, error="timeout after 30 s")


def judge(**changes) -> ScorerSection:
    return ScorerSection(name="judge", **changes)


def style(**changes) -> ScorerSection:
    return ScorerSection(**{"name": "style", "rewards": ["generation"], "weight": 0.5, **changes})


def test_the_reward_is_the_weighted_sum_and_keeps_its_parts():
    total = combine([judge(), style()], [Score("x", 0.75), Score("x", 0.5, {"line": 0.1})])
    assert total == ImageScore("x", 1.0, {"judge": 0.75, "style": 0.5, "style/line": 0.1}, match=0.75)


def test_verdicts_are_held_against_the_mean_of_the_scorers_that_say_whether_an_image_matches():
    both = [judge(weight=3.0), style(rewards=["generation", "comprehension"], weight=1.0)]
    total = combine(both, [Score("x", 0.8), Score("x", 0.4)])
    assert total.match == pytest.approx(0.7) and total.value == pytest.approx(2.8)
    assert combine([style()], [Score("x", 0.4)]).match is None


def test_a_reward_is_missing_if_a_score_that_counts_is():
    total = combine([judge(), style()], [Score("x", 0.75), LOST], final=True)
    assert (total.value, total.final, total.match) == (None, None, 0.75)
    assert total.parts == {"judge": 0.75} and total.error == "style: timeout after 30 s"
    assert not usable([judge(), style()], [total])
    canary = [judge(), style(weight=0.0)]
    total = combine(canary, [Score("x", 0.75), LOST])
    assert total == ImageScore("x", 0.75, {"judge": 0.75}, match=0.75) and usable(canary, [total])


def test_a_canary_s_score_is_nothing_to_compare():
    canary = [judge(sees=["final_image"]), style(weight=0.0)]
    passing, last = combine(canary, [None, Score("x", 0.5)]), combine(canary, [LOST, Score("x", 0.5)], final=True)
    assert not usable(canary, [passing, last])


def test_a_scorer_of_the_final_image_adds_to_that_place_alone():
    ends = [judge(), style(sees=["final_image"])]
    assert [looks_at(section, first=True, final=False) for section in ends] == [True, False]
    passing = combine(ends, [Score("x", 0.5), None])
    assert (passing.value, passing.final, passing.match) == (0.5, None, 0.5)
    last = combine(ends, [Score("x", 0.5), Score("x", 1.0)], final=True)
    assert (last.value, last.final) == (0.5, 1.0)


def test_a_scorer_of_the_first_image_says_nothing_of_it_as_the_final_one():
    begins = [judge(weight=0.5), style(sees=["first_image"])]
    only = combine(begins, [Score("x", 0.5), Score("x", 1.0)], final=True)
    assert (only.value, only.final) == (0.75, 0.25)


def test_an_image_that_nobody_looks_at_has_no_reward_and_nothing_is_missing():
    unseen = combine([style(sees=["final_image"])], [None])
    assert (unseen.value, unseen.match, unseen.error) == (0.0, None, None)
    assert not usable([style(sees=["final_image"])], [unseen])


def test_scores_of_different_images_are_not_combined():
    with pytest.raises(ValueError, match="several images"):
        combine([judge(), style()], [Score("x", 0.5), Score("y", 0.5)])
