"""Numbers of a calibration against values computed by hand, and what must hold of any."""

from __future__ import annotations

import numpy as np
import pytest

from rlpipe.evaluate.agreement import accuracy, auroc, balanced_accuracy
from rlpipe.evaluate.calibration import Case, Sorted, bootstrap, calibrate, curve

SCORES = np.array([0.9, 0.8, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1])
RIGHT = np.array([True, True, False, True, False, True, False, False])


def cases(scores=SCORES, right=RIGHT, **more) -> list[Case]:
    return [
        Case(float(s), bool(r), f"prompt {i // 2}", **more) for i, (s, r) in enumerate(zip(scores, right, strict=True))
    ]


def sample(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and labels that follow them with noise."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 21, count) / 20
    return scores, rng.random(count) < scores


def test_the_numbers_are_those_computed_by_hand() -> None:
    numbers = Sorted(SCORES, RIGHT, threshold=0.5, bins=2).numbers()
    # Yes: 0.9 (right), 0.8 (right), 0.8 (wrong), 0.6 (right); no: 0.4 (wrong), 0.3 (right), 0.2, 0.1 (wrong).
    assert numbers["accuracy"] == pytest.approx(6 / 8) and numbers["always_yes"] == pytest.approx(1 / 2)
    assert numbers["yes_of_right"] == pytest.approx(3 / 4) and numbers["no_of_wrong"] == pytest.approx(3 / 4)
    assert numbers["balanced_accuracy"] == pytest.approx(3 / 4)
    # Pairs won by the right one of 16: 0.9 wins 4; 0.8 wins 3 and ties 1; 0.6 wins 3; 0.3 wins 2.
    assert numbers["auroc"] == pytest.approx(12.5 / 16)
    # Precision times recall gained at 0.9, 0.8, 0.6, 0.3: (1/1 + 2/3 + 3/4 + 4/6) / 4.
    assert numbers["average_precision"] == pytest.approx((1 + 2 / 3 + 3 / 4 + 4 / 6) / 4)
    # Agreement by chance is 1/2 * 1/2 + 1/2 * 1/2.
    assert numbers["kappa"] == pytest.approx((0.75 - 0.5) / 0.5)
    squares = [0.1, 0.2, 0.8, 0.4, 0.4, 0.7, 0.2, 0.1]
    assert numbers["brier"] == pytest.approx(sum(x * x for x in squares) / 8)
    # Below one half: mean score 0.25, right 1/4; above: 0.775 and 3/4; half of the cases in each.
    assert numbers["ece"] == pytest.approx(0.5 * abs(0.25 - 0.25) + 0.5 * abs(0.775 - 0.75))


def test_the_numbers_are_those_of_the_plain_definitions() -> None:
    scores, right = sample(300)
    numbers = Sorted(scores, right).numbers()
    said = scores > 0.5
    assert numbers["accuracy"] == pytest.approx(accuracy(said, right))
    assert numbers["balanced_accuracy"] == pytest.approx(balanced_accuracy(said, right))
    assert numbers["auroc"] == pytest.approx(auroc(scores, right))
    precision, gained = 0.0, 0
    for level in np.unique(scores)[::-1]:
        found = right[scores >= level]
        precision += (found.sum() - gained) * found.mean()
        gained = found.sum()
    assert numbers["average_precision"] == pytest.approx(precision / right.sum())


def test_a_case_of_weight_two_is_the_same_case_twice() -> None:
    scores, right = sample(60)
    weights = np.random.default_rng(1).integers(0, 4, 60)
    weighted = Sorted(scores, right).numbers(weights)
    repeated = Sorted(np.repeat(scores, weights), np.repeat(right, weights)).numbers()
    assert weighted == pytest.approx(repeated)


def test_the_order_of_the_cases_does_not_matter() -> None:
    scores, right = sample(80)
    order = np.random.default_rng(2).permutation(80)
    assert Sorted(scores, right).numbers() == pytest.approx(Sorted(scores[order], right[order]).numbers())


def test_a_judge_that_always_says_yes_is_as_right_as_the_base_rate_and_has_no_kappa_beyond_chance() -> None:
    right = np.array([True] * 9 + [False])
    numbers = Sorted(np.full(10, 0.9), right).numbers()
    assert numbers["accuracy"] == numbers["always_yes"] == pytest.approx(0.9)
    assert numbers["balanced_accuracy"] == 0.5 and numbers["auroc"] == 0.5 and numbers["kappa"] == pytest.approx(0)
    assert numbers["average_precision"] == pytest.approx(0.9) and numbers["ece"] == pytest.approx(0)


def test_what_needs_both_labels_is_none_where_one_is_absent() -> None:
    numbers = Sorted(np.array([0.2, 0.9]), np.array([True, True])).numbers()
    assert numbers["accuracy"] == 0.5 and numbers["yes_of_right"] == 0.5
    assert numbers["balanced_accuracy"] is None and numbers["auroc"] is None and numbers["no_of_wrong"] is None
    assert Sorted(np.array([0.2, 0.9]), np.array([True, True])).best_threshold(0.5) is None


def test_the_curve_has_every_case_in_one_bin_and_the_ends_in_the_outer_ones() -> None:
    scores, right = np.array([0.0, 0.05, 0.5, 0.99, 1.0]), np.array([False, True, True, True, True])
    rows = curve(scores, right, 4)
    assert [row["count"] for row in rows] == [2, 0, 1, 2]
    assert rows[0]["mean_score"] == pytest.approx(0.025) and rows[0]["share_right"] == 0.5
    assert rows[1]["mean_score"] is None and rows[1]["ci95"] is None
    assert rows[3]["ci95"][0] < 1 and rows[3]["ci95"][1] == 1


def test_the_best_threshold_lies_between_scores_and_no_other_does_better() -> None:
    scores, right = sample(200, seed=3)
    best = Sorted(scores, right).best_threshold(0.5)
    assert best["balanced_accuracy"] == pytest.approx(balanced_accuracy(scores > best["threshold"], right))
    others = [balanced_accuracy(scores > level, right) for level in np.linspace(0, 1, 101)]
    assert best["balanced_accuracy"] >= max(others) - 1e-12
    apart = Sorted(np.array([0.1, 0.2, 0.6, 0.7]), np.array([False, False, True, True]))
    assert apart.best_threshold(0.5) == {"threshold": pytest.approx(0.4), "balanced_accuracy": 1.0}


def test_intervals_draw_prompts_so_that_repeating_every_image_narrows_nothing() -> None:
    scores, right = sample(80, seed=4)
    prompts = [str(i) for i in range(80)]
    once = bootstrap(Sorted(scores, right), prompts, 400)["accuracy"]
    again = bootstrap(Sorted(np.tile(scores, 9), np.tile(right, 9)), prompts * 9, 400)["accuracy"]
    assert once == pytest.approx(again)
    spread = np.sqrt(np.mean((scores > 0.5) == right) * np.mean((scores > 0.5) != right) / 80)
    assert once[1] - once[0] == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(60):
        scores, right = sample(120, seed)
        low, high = bootstrap(Sorted(scores, right), [str(i) for i in range(120)], 200, seed)["accuracy"]
        # Said yes above one half, right with probability `score`: of 21 levels, the mean of max(score, 1 - score).
        held += low <= np.mean([max(level, 1 - level) for level in np.arange(21) / 20]) <= high
    assert held >= 51


def test_a_calibration_counts_kinds_and_masses_and_leaves_probabilities_out_where_scores_are_none() -> None:
    rows = cases(kind="counting", mass=0.9) + cases(kind="colors", mass=0.5)
    result = calibrate(rows, resamples=50)
    assert result["cases"] == 16 and result["prompts"] == 4 and result["base_rate"] == 0.5
    assert list(result["by_kind"]) == ["counting", "colors"]
    assert result["by_kind"]["colors"]["numbers"]["auroc"]["value"] == pytest.approx(12.5 / 16)
    assert result["mass"]["mean"] == pytest.approx(0.7)
    assert sum(result["histogram"]["right"]) == sum(result["histogram"]["wrong"]) == 8
    low, high = result["numbers"]["auroc"]["ci95"]
    assert low <= result["numbers"]["auroc"]["value"] <= high

    logits = calibrate(cases(scores=10 * SCORES - 5), threshold=0.0, resamples=0)
    assert logits["curve"] == [] and logits["numbers"]["brier"]["value"] is None
    assert logits["numbers"]["auroc"] == {"value": pytest.approx(12.5 / 16), "ci95": None} and logits["mass"] is None


def test_no_cases_and_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="no cases"):
        calibrate([])
    with pytest.raises(ValueError, match="must be finite"):
        Sorted(np.array([0.1, np.nan]), np.array([True, False]))
