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


def test_a_wrong_schedule_is_named():
    with pytest.raises(ValueError, match="learner.schedule: 'cosinus'"):
        rates("cosinus", 0)
    with pytest.raises(ValueError, match="learner.convert_steps: 5 "):
        rates("linear_then_linear", 20, convert_steps=5)
