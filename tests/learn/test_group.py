"""Baselines and weightings computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlpipe.learn.advantage import assign_credit, tells_nothing
from rlpipe.learn.group import group_advantages
from rlpipe.schema import CreditSection
from rlpipe.types import ImageScore
from tests.learn.test_advantage import NAN, three_rounds, trajectory_of


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = np.array([1.0, 0.0, 0.5, NAN, 0.3])
    found = group_advantages(rewards, [0, 0, 0, 0, 1], std="none", baseline="leave_one_out")
    np.testing.assert_allclose(found[:3], [1.0 - 0.25, 0.0 - 0.75, 0.5 - 0.5])
    assert np.isnan(found[3:]).all(), "a missing score, and one without others"


SPANS = {
    # Tokens of the spans: 16 + 4 for "one", 16 + 6 + 16 + 4 for "two", 16 + 6 + 16 + 8 + 16 for "three".
    "segment": ([[1 / 2] * 2, [1 / 4] * 4, [1 / 5] * 5], 3.0),
    "sequence": (
        [[16 / 20, 4 / 20], [n / 42 for n in (16, 6, 16, 4)], [n / 62 for n in (16, 6, 16, 8, 16)]],
        3.0,
    ),
    "token": ([[16, 4], [16, 6, 16, 4], [16, 6, 16, 8, 16]], 20 + 42 + 62.0),
    # Three images of 16 tokens and two reflections of at most 24.
    "constant": ([[16, 4], [16, 6, 16, 4], [16, 6, 16, 8, 16]], 3 * (3 * 16 + 2 * 24.0)),
}


@pytest.mark.parametrize("weighting", SPANS)
def test_weightings_of_whole_trajectories(weighting):
    drawn, scores = three_rounds()
    section = CreditSection(rule="summed", weighting=weighting)
    credited = assign_credit(drawn, scores, [0, 0, 0], section, [(np.zeros(1),) * 5] * 3, entropy=True)
    shares, denominator = SPANS[weighting]
    assert credited.batch.denominator == denominator
    advantages = credited.advantages["trajectory"]
    for example, advantage, row in zip(credited.batch.items, advantages, shares, strict=True):
        assert [c.advantage for c in example.credits] == pytest.approx([advantage * share for share in row])
        assert [c.kl for c in example.credits] == [c.entropy for c in example.credits] == pytest.approx(row)


def test_an_image_that_v1_pays_twice_counts_as_two_spans():
    """16 tokens an image: "yes" has spans of 16, 4, 16 tokens, "no" of 16, 6, 16."""
    drawn = [trajectory_of(16, 4, verdicts=(True,), rounds=2), trajectory_of(16, 6, 16, verdicts=(False,), rounds=2)]
    scores = [[0.9], [0.3, 0.6]]

    def credits(weighting: str, **changes):
        section = CreditSection(weighting=weighting, std="none", **changes)
        credited = assign_credit(drawn, scores, [0, 0], section)
        rows = [[c.advantage for c in example.credits] for example in credited.batch.items]
        return [[value / credited.batch.denominator for value in row] for row in rows]

    first, said, final = 0.3, 0.1, 0.15  # (0.9 - 0.3) / 2, (0.9 - 0.7) / 2, (0.9 - 0.6) / 2
    yes, no = credits("token")
    total = 36 + 38
    assert yes == pytest.approx([16 * (first + final) / total, 4 * said / total])
    assert no == pytest.approx([-16 * first / total, -6 * said / total, -16 * final / total])
    assert credits("sequence")[0] == pytest.approx([16 * (first + final) / 36 / 2, 4 * said / 36 / 2])
    constant = 2 * (2 * 16 + 24)
    assert credits("constant", final_weight=0.5)[1] == pytest.approx(
        [-16 * first / constant, -6 * said / constant, -16 * 0.5 * final / constant]
    )
    assert np.concatenate(credits("segment")).tolist() == pytest.approx(np.concatenate(credits("rule")).tolist())


@pytest.mark.parametrize("weighting", ["rule", *SPANS])
def test_a_missing_score_moves_no_denominator_under_any_weighting(weighting):
    drawn, scores = three_rounds()
    section = CreditSection(rule="segments", weighting=weighting)
    whole = assign_credit(drawn, scores, [0, 0, 0], section)
    scores[1][1] = None
    credited = assign_credit(drawn, scores, [0, 0, 0], section)
    assert credited.batch.denominator == whole.batch.denominator
    second = [c.advantage for c in credited.batch.items[1].credits]
    assert second[2:] == [0.0, 0.0] and second[0] == pytest.approx(whole.batch.items[1].credits[0].advantage)


def test_a_group_tells_nothing_only_where_no_reward_that_is_compared_differs():
    drawn = [trajectory_of(16, 4, verdicts=(yes,), rounds=1) for yes in (True, False)]

    def score(*values: float | None) -> list[list[ImageScore]]:
        return [[ImageScore(str(i), v, final=v, match=v)] for i, v in enumerate(values)]

    section = CreditSection()
    assert tells_nothing(drawn, score(0.5, 0.5), section)  # 1 - |0.5 - 1| = 1 - |0.5 - 0|
    assert not tells_nothing(drawn, score(1.0, 1.0), section), "one of them saw that it was right"
    assert not tells_nothing(drawn, score(0.5, 0.6), section)
    assert tells_nothing(drawn, score(0.5, 0.5 + 1e-9), section)
    assert tells_nothing(drawn, score(0.5, 0.505), CreditSection(redraw_spread=0.01))
    assert tells_nothing(drawn, score(None, 0.6), section), "one score has nothing to be compared with"
