"""Agreement of verdicts with the truth, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from rlpipe.evaluate.agreement import accuracy, auroc, balanced_accuracy, wilson


def test_balanced_accuracy_does_not_reward_the_common_answer() -> None:
    said, truth = [True] * 10, [True] * 8 + [False] * 2
    assert accuracy(said, truth) == 0.8
    assert balanced_accuracy(said, truth) == 0.5
    assert balanced_accuracy([True, False, False, False], [True, True, False, False]) == 0.75


def test_what_cannot_be_measured_is_missing_not_zero() -> None:
    assert accuracy([], []) is None
    assert balanced_accuracy([True, False], [True, True]) is None
    assert auroc([0.1, 0.2], [False, False]) is None


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    assert auroc([0.9, 0.8, 0.3, 0.1], [True, True, False, False]) == 1.0
    assert auroc([0.1, 0.9], [True, False]) == 0.0
    # pairs (true, false): 0.8>0.5, 0.8>0.2, 0.5=0.5, 0.5>0.2 -> 3.5 of 4
    assert auroc([0.8, 0.5, 0.5, 0.2], [True, True, False, False]) == 0.875
    assert auroc([0.5] * 6, [True, False] * 3) == 0.5


def test_wilson_intervals_are_those_of_the_textbook() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        balanced_accuracy([True], [True, False])
    with pytest.raises(ValueError, match="finite"):
        auroc([0.5, float("nan")], [True, False])
    with pytest.raises(ValueError, match="0..3"):
        wilson(4, 3)
