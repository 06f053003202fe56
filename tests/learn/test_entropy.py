"""The weights of entropies, moved by hand."""

from __future__ import annotations

import math

import pytest

from rlpipe.learn.entropy import Adaptive, EntropyControl
from rlpipe.schema_learn import EntropySection


def test_a_weight_moves_as_adam_moves_psi():
    control, psi, mean, square = Adaptive(target=2.0, lr=0.01, bound=1.0), 0.0, 0.0, 0.0
    for count, entropy in enumerate((3.0, 2.5, 1.0), start=1):
        gradient = -math.cosh(psi) * (entropy - 2.0)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        psi -= 0.01 * (mean / (1 - 0.9**count)) / (math.sqrt(square / (1 - 0.999**count)) + 1e-8)
        control.observe(entropy)
        assert control.weight == pytest.approx(math.sinh(psi), rel=1e-9)
    # The first step alone is of size lr, whatever the gap: sinh(0.01).
    first = Adaptive(target=2.0, lr=0.01, bound=1.0)
    first.observe(2.1)
    assert first.weight == pytest.approx(math.sinh(0.01), rel=1e-6)


def test_entropy_above_its_target_is_penalised_below_it_rewarded_within_the_bound():
    section = EntropySection("adaptive", image_target=7.0, text_target=2.0, weight_lr=0.01, max_weight=0.025)
    control = EntropyControl(section)
    assert control.weights == (0.0, 0.0)
    for _ in range(5):
        control.observe({"entropy/image": 9.0, "entropy/text": 0.5})
    assert control.weights == pytest.approx((0.025, -0.025))
    control.observe({"entropy/image": 9.0})
    assert control.adaptive["text"].count == 5, "a step without reflections says nothing about them"


def test_a_kind_without_a_target_and_the_other_modes_have_fixed_weights():
    control = EntropyControl(EntropySection("adaptive", text_target=2.0))
    control.observe({"entropy/image": 9.0, "entropy/text": 3.0})
    assert control.weights == (0.0, pytest.approx(5e-5))
    assert control.metrics() == {"entropy/image_weight": 0.0, "entropy/text_weight": control.weights[1]}
    assert EntropyControl(EntropySection("bonus", weight=0.01)).weights == (-0.01, -0.01)
    assert EntropyControl(EntropySection()).weights is None and EntropyControl(EntropySection()).metrics() == {}


def test_a_restored_control_goes_on_as_if_nothing_was():
    section = EntropySection("adaptive", image_target=7.0, text_target=2.0)
    one, two = EntropyControl(section), EntropyControl(section)
    one.observe({"entropy/image": 9.0, "entropy/text": 0.5})
    two.load_state_dict(one.state_dict())
    for control in (one, two):
        control.observe({"entropy/image": 6.0, "entropy/text": 1.0})
    assert one.weights == two.weights and one.weights != (0.0, 0.0)
