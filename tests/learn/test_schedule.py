"""Points of the learning-rate schedules."""

from __future__ import annotations

import pytest

from rlpipe.learn.schedule import learning_rate
from rlpipe.schema import LearnerSection


def rates(schedule: str, *steps: int, total: int = 110, **settings) -> list[float]:
    section = LearnerSection(lr=1.0, min_lr=0.1, warmup_steps=10, schedule=schedule, **settings)
    return [learning_rate(section, step, total) for step in steps]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_linearly_to_the_peak(schedule):
    assert rates(schedule, 0, 4, 9, 10) == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_linear_and_cosine_fall_to_the_minimum():
    assert rates("constant", 60, 110) == [1.0, 1.0]
    assert rates("linear", 35, 60, 110, 200) == pytest.approx([0.775, 0.55, 0.1, 0.1])
    assert rates("cosine", 35, 60, 110, 200) == pytest.approx([0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1, 0.1])


def test_two_part_schedules_pass_through_the_convert_rate():
    settings = {"convert_steps": 50, "convert_lr": 0.4}
    assert rates("linear_then_linear", 30, 50, 80, 110, **settings) == pytest.approx([0.7, 0.4, 0.25, 0.1])
    assert rates("linear_then_cosine", 30, 50, 65, 110, **settings) == pytest.approx(
        [0.7, 0.4, 0.1 + 0.15 * (1 + 0.5**0.5), 0.1]
    )


def official_factor(step: int, total: int) -> float:
    """The official multiplier of the peak rate 3e-7, written down from its three lines."""
    if step < 5:
        return step / 5
    if step < 30:
        return 1 - (step - 5) / 25 * (1 - 1e-7 / 3e-7)
    return 1e-7 / 3e-7 - (step - 30) / (total - 30) * (1e-7 - 5e-8) / 3e-7


def test_the_official_recipe_s_rates():
    section = LearnerSection(
        lr=3e-7, min_lr=5e-8, warmup_steps=5, schedule="linear_then_linear", convert_steps=30, convert_lr=1e-7
    )
    found = [learning_rate(section, step, 230) for step in range(231)]
    assert found == pytest.approx([3e-7 * official_factor(step, 230) for step in range(231)], rel=1e-9)
    # By hand: nothing, a fifth, the peak, 3e-7 - 10/25 * 2e-7, the conversion, half of the way down, the end.
    by_hand = {0: 0.0, 1: 0.6e-7, 5: 3e-7, 15: 2.2e-7, 30: 1e-7, 130: 0.75e-7, 230: 0.5e-7}
    assert {step: found[step] for step in by_hand} == pytest.approx(by_hand)


def test_the_paper_s_rates():
    section = LearnerSection(
        lr=6e-6, min_lr=2e-7, warmup_steps=100, schedule="linear_then_cosine", convert_steps=400, convert_lr=2e-6
    )
    by_hand = {
        0: 0.0,
        50: 3e-6,
        100: 6e-6,
        250: 4e-6,
        400: 2e-6,
        1050: 2e-7 + 1.8e-6 * 0.5 * (1 + 0.5**0.5),  # a quarter of the way: cos 45 degrees
        1700: 1.1e-6,
        3000: 2e-7,
    }
    assert {step: learning_rate(section, step, 3000) for step in by_hand} == pytest.approx(by_hand)


def test_a_wrong_schedule_is_named():
    with pytest.raises(ValueError, match="learner.schedule: 'cosinus'"):
        rates("cosinus", 0)
    with pytest.raises(ValueError, match="learner.convert_steps: 5 "):
        rates("linear_then_linear", 20, convert_steps=5)
