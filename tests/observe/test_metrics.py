"""Phases, idle shares and the check for finite numbers."""

from __future__ import annotations

import pytest

from rlpipe.observe.metrics import PhaseTimer, describe, idle_shares, not_finite, require_finite


def test_a_phase_entered_twice_adds_up_and_take_starts_anew() -> None:
    times = iter([0.0, 1.5, 2.0, 2.5, 10.0, 14.0])
    timer = PhaseTimer(clock=lambda: next(times))
    for phase in ("learn", "learn", "sync"):
        with timer(phase):
            pass
    assert timer.take() == {"time/learn": 2.0, "time/sync": 4.0}
    assert timer.take() == {}


def test_a_phase_that_fails_is_still_timed() -> None:
    times = iter([0.0, 3.0])
    timer = PhaseTimer(clock=lambda: next(times))
    with pytest.raises(KeyError), timer("learn"):
        raise KeyError
    assert timer.take() == {"time/learn": 3.0}


def test_idle_share_counts_all_actors_of_a_role() -> None:
    shares = idle_shares({"rollout": 6.0, "learner": 10.5}, wall_s=10.0, actors={"rollout": 2})
    assert shares["idle/rollout"] == pytest.approx(0.7)
    assert shares["idle/learner"] == 0.0


def test_infinite_and_nan_metrics_are_named() -> None:
    metrics = {
        "loss/total": float("nan"),
        "kl/image": float("inf"),
        "train/lr": 1e-4,
        "reward/first/mean": None,
    }
    assert not_finite(metrics) == ["kl/image", "loss/total"]
    with pytest.raises(FloatingPointError, match="step 7: not finite: kl/image=inf, loss/total=nan"):
        require_finite(metrics, 7)
    require_finite({"loss/total": 0.0}, 7)


def test_a_name_is_described_by_itself_or_by_its_prefix() -> None:
    assert "seconds" in describe("time/anything")
    assert describe("mismatch/max_abs") != describe("mismatch/mean_abs")
    assert describe("unheard/of") == ""
