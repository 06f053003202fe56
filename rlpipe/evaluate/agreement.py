"""How well a yes/no verdict (of the policy or of a judge) agrees with the truth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def accuracy(said: Sequence[bool], truth: Sequence[bool]) -> float | None:
    """Share of verdicts equal to the truth; None without any."""
    said, truth = _pair(said, truth)
    return float((said == truth).mean()) if len(said) else None


def balanced_accuracy(said: Sequence[bool], truth: Sequence[bool]) -> float | None:
    """Mean of the accuracy on the true and on the false cases; None where one of the two kinds is absent."""
    said, truth = _pair(said, truth)
    if truth.all() or not truth.any():
        return None
    return float((said[truth].mean() + (~said[~truth]).mean()) / 2)


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> float | None:
    """Chance that a true case scores above a false one, ties counting half; None if one kind is absent."""
    values, truth = np.asarray(scores, dtype=float), np.asarray(truth, dtype=bool)
    if values.shape != truth.shape:
        raise ValueError(f"scores and truth must have one length, got {values.shape} and {truth.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite; leave missing scores out together with their truth")
    if truth.all() or not truth.any():
        return None
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]
    num_true = int(truth.sum())
    wins = ranks[truth].sum() - num_true * (num_true + 1) / 2
    return float(wins / (num_true * (len(truth) - num_true)))


def wilson(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default; (0, 1) without any trial."""
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie in 0..{total}, got {successes}")
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def _pair(said: Sequence[bool], truth: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    said, truth = np.asarray(said, dtype=bool), np.asarray(truth, dtype=bool)
    if said.shape != truth.shape:
        raise ValueError(f"said and truth must have one length, got {said.shape} and {truth.shape}")
    return said, truth
