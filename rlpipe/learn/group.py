"""What rewards say of trajectories that compete: advantages within a group, weights between classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def leave_one_out(values: np.ndarray) -> np.ndarray:
    """What each reward is compared with in RLOO (Ahmadian et al. 2024): the mean of the others."""
    return (values.sum() - values) / (len(values) - 1)


BASELINES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": np.mean, "leave_one_out": leave_one_out}


def group_advantages(
    rewards: np.ndarray, groups: Sequence[int], std_eps: float = 1e-4, std: str = "sample", baseline: str = "mean"
) -> np.ndarray:
    """(reward - baseline) / (std + std_eps) within each group; float64 [N].

    std:      "sample" divides squares by n - 1 (official code), "population" by n, "none" leaves reward - baseline as
              it is (Dr. GRPO, RLOO).
    baseline: "mean" of the group, or "leave_one_out".

    Statistics are those of the scores that are there. A missing score stays NaN, and so does the only score
    of a group, which has nothing to be compared with. A group of equal scores has advantage 0.
    """
    advantages = np.full(len(rewards), np.nan)
    for members, values in members_of(rewards, groups):
        if len(values) > 1:
            scale = 1.0 if std == "none" else values.std(ddof=int(std == "sample")) + std_eps
            advantages[members] = (values - BASELINES[baseline](values)) / scale
    return advantages


def members_of(rewards: np.ndarray, groups: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per group the indices of its scores that are there, and the scores."""
    groups = np.asarray(groups)
    present = ~np.isnan(rewards)
    indices = [np.flatnonzero((groups == group) & present) for group in dict.fromkeys(groups.tolist())]
    return [(members, rewards[members]) for members in indices]


def verdict_weights(probabilities: np.ndarray) -> np.ndarray:
    """Weights [N] under which images that match and images that do not count alike; NaN stays NaN.

    probabilities: float64 [N], P(yes) of the images that were looked at; what is beyond 0 or 1 counts as that. A class
                   that is rarer than one in ten counts as one in ten; otherwise the weights have mean 1.
    """
    probabilities = np.clip(probabilities, 0.0, 1.0)
    share = float(np.clip(np.nanmean(probabilities), 0.1, 0.9)) if not np.isnan(probabilities).all() else 0.5
    return 0.5 * (probabilities / share + (1.0 - probabilities) / (1.0 - share))
