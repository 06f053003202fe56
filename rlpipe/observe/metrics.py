"""Metric names (a public API), seconds by phase, idle shares, and the check that numbers are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

METRICS = {
    "train/step": "optimiser steps finished",
    "train/lr": "learning rate of the step",
    "train/grad_norm": "gradient norm before clipping",
    "train/policy_version": "version of the weights after the step",
    "train/staleness": "policy versions between drawing a trajectory and training on it, mean",
    "train/staleness_max": "the same, largest",
    "reward/first/mean": "score of the first image, mean over the batch",
    "reward/reflection/mean": "score of the verdict, mean over the batch",
    "reward/final/mean": "score of the last image, mean over the batch",
    "reward/": "scores by segment or by scorer, over the batch",
    "loss/total": "the loss that is minimised",
    "loss/clip_fraction": "share of tokens whose ratio to the sampler is clipped",
    "loss/": "terms of the loss",
    "rollout/share_yes": "share of first images that the policy said match the prompt",
    "rollout/images_per_s": "images drawn per second of drawing",
    "kl/": "KL to the reference policy, k3 estimate, nats per token",
    "mismatch/max_abs": "largest |sampler - learner| log-prob of a sampled token",
    "mismatch/mean_abs": "mean |sampler - learner| log-prob",
    "time/": "seconds of the phase in this step",
    "idle/": "share of the step in which the role waited",
    "failures/": "scores that are missing, groups that were dropped",
}
"""Names (or prefixes, ending in "/") and what they say; the report shows these words."""


def describe(name: str) -> str:
    """The words of `METRICS` for a metric, by its name or else its prefix; "" if neither is known."""
    return METRICS.get(name) or METRICS.get(name.split("/")[0] + "/", "")


class PhaseTimer:
    """Seconds by phase; a phase entered twice in a step adds up.

    with timer("learn"):
        ...
    timer.take()                                  # {"time/learn": 1.52}, and starts anew
    """

    def __init__(self, clock=time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start

    def take(self) -> dict[str, float]:
        seconds, self._seconds = self._seconds, {}
        return {f"time/{phase}": value for phase, value in seconds.items()}


def idle_shares(busy_s: Mapping[str, float], wall_s: float, actors: Mapping[str, int]) -> dict[str, float]:
    """`idle/<role>`: 1 - busy seconds of all the role's actors / (actors * wall seconds), within 0..1."""
    if wall_s <= 0:
        raise ValueError(f"wall_s must be positive, got {wall_s}")
    shares = {role: 1.0 - busy / (wall_s * actors.get(role, 1)) for role, busy in busy_s.items()}
    return {f"idle/{role}": min(max(share, 0.0), 1.0) for role, share in shares.items()}


def not_finite(metrics: Mapping[str, float | None]) -> list[str]:
    """Names whose value is NaN or infinite, sorted."""
    return sorted(name for name, value in metrics.items() if value is not None and not math.isfinite(value))


def require_finite(metrics: Mapping[str, float | None], step: int) -> None:
    """Raise FloatingPointError naming every metric that is NaN or infinite."""
    bad = not_finite(metrics)
    if bad:
        named = ", ".join(f"{name}={metrics[name]}" for name in bad)
        raise FloatingPointError(f"step {step}: not finite: {named}; lower learner.lr or set learner.clip_norm")
