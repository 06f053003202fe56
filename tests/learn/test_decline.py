"""The rule for a declining reward curve, on curves made by hand."""

from __future__ import annotations

import json
import math

import pytest

from rlpipe.learn.decline import Decline, Reaction
from rlpipe.learn.learner import Learner
from rlpipe.schema import DeclineSection
from tests.learn.builders import config, item, with_logprobs


def section(**settings) -> DeclineSection:
    return DeclineSection(**{"action": "react", "window": 4, "patience": 3, "cooldown": 2, **settings})


def follow(decline: Decline, rewards: list[float], first: int = 1) -> dict[int, Reaction]:
    """Reactions by step."""
    seen = ((step, decline.observe(step, reward)) for step, reward in enumerate(rewards, start=first))
    return {step: reaction for step, reaction in seen if reaction is not None}


def test_a_rising_or_level_curve_with_noise_changes_nothing():
    decline = Decline(section(slow_fall=0.05))
    rising = [0.5 + 0.01 * step + 0.01 * math.sin(2.3 * step) for step in range(60)]
    assert follow(decline, rising + [rising[-1]] * 40) == {}
    assert (decline.lr_scale, decline.kl_scale, decline.reference_step) == (1.0, 1.0, 0)


def test_a_sharp_fall_lowers_the_learning_rate():
    decline = Decline(section(sharp_fall=0.15))
    ((step, reaction),) = follow(decline, [0.8] * 20 + [0.4] * 8).items()
    # Means of four: 0.8 before, (0.8 + 0.8 + 0.4 + 0.4) / 4 = 0.6 at the second low step; the first gives 0.7.
    assert (step, reaction.kind, decline.lr_scale, decline.kl_scale) == (22, "lower_lr", 0.5, 1.0)
    assert reaction.line == (
        "decline: after step 22 the reward fell by 25.0% within a window of 4 steps (sharp: over 15.0%): "
        "learning rate x 0.5, 0.5 of its schedule"
    )


def slow(steps: int, level: float = 0.8) -> list[float]:
    return [level * (1 - 0.01 * step) for step in range(steps)]


def test_a_slow_decline_lowers_the_kl_weight_under_a_young_reference():
    decline = Decline(section(reference_age=100))
    reactions = follow(decline, [0.8] * 10 + slow(12))
    ((step, reaction),) = reactions.items()
    # The mean is below 0.95 of its best from the 8th falling step on; the third such step counts.
    assert (step, reaction.kind, decline.kl_scale, decline.lr_scale) == (20, "lower_kl", 0.5, 1.0)
    assert "for 3 steps" in reaction.line and "KL weight x 0.5" in reaction.line
    assert decline.metrics()["decline/kl_scale"] == 0.5


def test_a_slow_decline_under_an_old_reference_renews_it():
    decline = Decline(section(reference_age=20))
    reactions = follow(decline, [0.8] * 10 + slow(11))
    assert {step: r.kind for step, r in reactions.items()} == {20: "renew_reference"}
    assert decline.reference_step == 20 and decline.kl_scale == 1.0
    # The new reference is young.
    more = follow(decline, slow(20, 0.7), first=22)
    assert [r.kind for r in more.values()] == ["lower_kl"]


def test_a_reaction_starts_the_curve_anew_after_its_pause():
    decline = Decline(section(cooldown=5))
    reactions = follow(decline, [0.8] * 8 + [0.4] * 40)
    assert list(reactions) == [10], "the low level is the new normal"
    assert list(follow(decline, [0.2] * 10, first=49)) == [50]
    assert decline.lr_scale == 0.25


def test_what_was_decided_is_a_metric_of_its_step():
    decline = Decline(section())
    follow(decline, [0.8] * 8 + [0.4] * 2)
    told = decline.metrics()
    assert told["decline/lower_lr"] == 1 and told["decline/sharp_fall"] == pytest.approx(0.25)
    decline.observe(11, 0.4)
    assert decline.metrics()["decline/lower_lr"] == 0 and decline.metrics()["decline/lr_scale"] == 0.5


def test_without_the_action_nothing_happens_and_steps_without_reward_do_not_count():
    silent = Decline(section(action="none"))
    assert follow(silent, [0.8] * 20 + [0.1] * 20) == {} and silent.metrics() == {}
    gaps = [reward for reward in [0.8] * 8 + [0.4] * 2 for reward in (reward, math.nan)]
    assert [r.kind for r in follow(Decline(section()), gaps).values()] == ["lower_lr"]


def test_a_restored_rule_goes_on_as_the_one_that_was_saved():
    curve = [0.8] * 9 + [0.4] * 12 + slow(30, 0.4)
    whole, expected = Decline(section()), {}
    for cut in (3, 9, 11, 17, 30):
        whole = Decline(section())
        expected = follow(whole, curve)
        saved = Decline(section())
        before = follow(saved, curve[:cut])
        restored = Decline(section())
        restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
        assert before | follow(restored, curve[cut:], first=cut + 1) == expected
        assert restored.state_dict() == whole.state_dict()
    assert {r.kind for r in expected.values()} == {"lower_lr", "lower_kl"}


def test_the_learner_takes_the_scales_of_its_step(tiny_policy, tiny_policy_path):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 2) for i in range(2)])

    def step(**scales: float) -> dict[str, float]:
        return Learner(config(tiny_policy_path)).step(items, 6.0, 1, 10, **scales)

    whole, scaled = step(), step(lr_scale=0.25, kl_scale=0.5)
    assert whole["train/lr"] == 1e-3 and scaled["train/lr"] == 0.25e-3
    assert whole["loss/kl"] > 0 and scaled["loss/kl"] == pytest.approx(0.5 * whole["loss/kl"])
    assert scaled["loss/policy"] == pytest.approx(whole["loss/policy"])
