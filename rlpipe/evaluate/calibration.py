"""How far a judge's scores can be trusted: against labels, with intervals, by kind of prompt. Numbers alone, no files.

Every number is a function of the labels sorted by score, with a weight for each case. A bootstrap sample is such a
set of weights, so that 1,000 of them need no sorting. Intervals draw prompts, with all their images: images of one
prompt resemble each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlpipe.evaluate.agreement import wilson

HISTOGRAM_BINS = 20
NUMBERS = (
    "accuracy",
    "always_yes",
    "balanced_accuracy",
    "yes_of_right",
    "no_of_wrong",
    "auroc",
    "average_precision",
    "kappa",
    "brier",
    "ece",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A judge's score of one image, and whether the image is right.

    prompt: what the bootstrap draws. kind: of the prompt ("counting"), "" if it has none.
    mass:   P(yes) + P(no) in the judge's whole vocabulary, if it tells.
    """

    score: float
    right: bool
    prompt: str
    kind: str = ""
    mass: float | None = None


class Sorted:
    """Scores in increasing order with their labels; `numbers` are those of any weights of the cases.

    scores float64 [N], right bool [N], in one order; threshold: above it the judge says yes.
    bins: of the calibration error; None for scores that are no probabilities.
    """

    def __init__(self, scores: np.ndarray, right: np.ndarray, threshold: float = 0.5, bins: int | None = 10) -> None:
        if len(scores) != len(right) or not len(scores):
            raise ValueError(f"calibration: {len(scores)} scores and {len(right)} labels; give as many, and some")
        if not np.isfinite(scores).all():
            raise ValueError("calibration: scores must be finite; leave missing scores out together with their labels")
        self.order = np.argsort(scores, kind="stable")
        self.scores, self.right = scores[self.order].astype(float), right[self.order].astype(bool)
        self.said = self.scores > threshold
        self.bins = bins
        self.bin = None if bins is None else _bin(self.scores, bins)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the runs of equal scores begin."""
        return np.flatnonzero(np.concatenate([[True], np.diff(self.scores) > 0]))

    def numbers(self, weights: np.ndarray | None = None) -> dict[str, float | None]:
        """All of NUMBERS; None where a kind of label is absent, or for scores that are no probabilities."""
        w = np.ones(len(self.scores)) if weights is None else weights[self.order].astype(float)
        yes, no = w * self.right, w * ~self.right
        total, num_right, num_wrong = w.sum(), yes.sum(), no.sum()
        true_yes, false_yes = yes[self.said].sum(), no[self.said].sum()
        values: dict[str, float | None] = dict.fromkeys(NUMBERS)
        if not total:
            return values
        right_verdicts = true_yes + num_wrong - false_yes
        values["accuracy"], values["always_yes"] = right_verdicts / total, num_right / total
        values["kappa"] = _kappa(right_verdicts / total, (true_yes + false_yes) / total, num_right / total)
        if num_right:
            values["yes_of_right"] = true_yes / num_right
            values["average_precision"] = self._average_precision(yes, no)
        if num_wrong:
            values["no_of_wrong"] = 1 - false_yes / num_wrong
        if num_right and num_wrong:
            values["balanced_accuracy"] = (values["yes_of_right"] + values["no_of_wrong"]) / 2
            values["auroc"] = self._auroc(yes, no)
        if self.bin is not None:
            values["brier"] = (w * (self.scores - self.right) ** 2).sum() / total
            gaps = np.bincount(self.bin, w * (self.scores - self.right), self.bins)
            values["ece"] = np.abs(gaps).sum() / total
        return {key: None if value is None else float(value) for key, value in values.items()}

    def _auroc(self, yes: np.ndarray, no: np.ndarray) -> float:
        """Chance that a right case scores above a wrong one, ties counting half."""
        right, wrong = np.add.reduceat(yes, self.starts), np.add.reduceat(no, self.starts)
        below = np.cumsum(wrong) - wrong
        return (right * (below + wrong / 2)).sum() / (right.sum() * wrong.sum())

    def _average_precision(self, yes: np.ndarray, no: np.ndarray) -> float:
        """Sum over the distinct thresholds, from the highest, of precision times the recall gained there."""
        right = np.add.reduceat(yes, self.starts)[::-1]
        said = np.cumsum(right + np.add.reduceat(no, self.starts)[::-1])
        found = np.cumsum(right)
        # A sample may leave out the highest scores: nothing is said yes to there, and no recall is gained.
        precision = np.divide(found, said, out=np.zeros_like(said), where=said > 0)
        return (right * precision).sum() / found[-1]

    def best_threshold(self, threshold: float) -> dict[str, float] | None:
        """The threshold of the highest balanced accuracy on these very cases, the nearest to `threshold` of several.

        Halfway between two neighbouring scores; None where a kind of label is absent.
        """
        right = np.add.reduceat(self.right.astype(float), self.starts)
        wrong = np.add.reduceat((~self.right).astype(float), self.starts)
        if not right.sum() or not wrong.sum() or len(self.starts) < 2:
            return None
        balanced = (1 - np.cumsum(right) / right.sum() + np.cumsum(wrong) / wrong.sum())[:-1] / 2
        distinct = self.scores[self.starts]
        between = (distinct[:-1] + distinct[1:]) / 2
        best = np.flatnonzero(np.isclose(balanced, balanced.max(), rtol=0, atol=1e-12))
        choice = best[np.argmin(np.abs(between[best] - threshold))]
        return {"threshold": float(between[choice]), "balanced_accuracy": float(balanced[choice])}


def is_probability(scores: np.ndarray) -> bool:
    return bool(scores.min() >= 0 and scores.max() <= 1)


def _bin(scores: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((scores * bins).astype(int), bins - 1)


def _kappa(agreed: float, said_yes: float, right: float) -> float | None:
    """Cohen's: agreement beyond what two independent raters of these shares reach; None where that is all."""
    by_chance = said_yes * right + (1 - said_yes) * (1 - right)
    return None if by_chance >= 1 else (agreed - by_chance) / (1 - by_chance)


def bootstrap(
    scored: Sorted, prompts: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, list[float] | None]:
    """[low, high] of each number: 2.5th and 97.5th percentile over samples of prompts; None where it has none.

    Samples in which a number does not exist (one kind of label alone) are left out of its percentiles.
    """
    names, cluster = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {key: [] for key in NUMBERS}
    for _ in range(resamples):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        for key, value in scored.numbers(times[cluster]).items():
            if value is not None:
                found[key].append(value)
    return {key: _percentiles(values) for key, values in found.items()}


def _percentiles(values: Sequence[float]) -> list[float] | None:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])] if values else None


def curve(scores: np.ndarray, right: np.ndarray, bins: int = 10) -> list[dict[str, float | int | list[float] | None]]:
    """The calibration curve of probabilities: per bin its bounds, count, mean score, and the share that is right.

    Bins are [low, high), the last one closed. The share's interval is Wilson's. All are None in an empty bin.
    """
    place, rows = _bin(scores, bins), []
    for i in range(bins):
        chosen, count = right[place == i], int((place == i).sum())
        rows.append(
            {
                "low": i / bins,
                "high": (i + 1) / bins,
                "count": count,
                "mean_score": float(scores[place == i].mean()) if count else None,
                "share_right": float(chosen.mean()) if count else None,
                "ci95": list(wilson(int(chosen.sum()), count)) if count else None,
            }
        )
    return rows


def calibrate(
    cases: Sequence[Case], threshold: float = 0.5, bins: int = 10, resamples: int = 1000, seed: int = 0
) -> dict:
    """The structure of calibration.json. Raises ValueError without cases.

    numbers:   each as {"value", "ci95"}; definitions in docs/judges.md.
    curve:     empty for scores that are no probabilities.
    histogram: edges and, by label, counts of the scores.
    by_kind:   the numbers of each kind of prompt, where kinds are known.
    """
    if not cases:
        raise ValueError("calibration: no cases with a score and a label")
    scores = np.array([case.score for case in cases], dtype=float)
    right = np.array([case.right for case in cases], dtype=bool)
    probable = is_probability(scores)
    asked = (threshold, bins if probable else None)
    masses = [case.mass for case in cases if case.mass is not None]
    span = (0.0, 1.0) if probable else (float(scores.min()), float(scores.max()))
    edges = np.histogram_bin_edges(scores, HISTOGRAM_BINS, span)
    kinds = list(dict.fromkeys(case.kind for case in cases if case.kind))
    return {
        "cases": len(cases),
        "prompts": len({case.prompt for case in cases}),
        "base_rate": float(right.mean()),
        "threshold": threshold,
        "is_probability": probable,
        "numbers": _with_intervals(cases, *asked, resamples, seed),
        "best_threshold": Sorted(scores, right, *asked).best_threshold(threshold),
        "curve": curve(scores, right, bins) if probable else [],
        "histogram": {
            "edges": edges.tolist(),
            "right": np.histogram(scores[right], edges)[0].tolist(),
            "wrong": np.histogram(scores[~right], edges)[0].tolist(),
        },
        "mass": {"mean": float(np.mean(masses)), "p05": float(np.percentile(masses, 5))} if masses else None,
        "by_kind": {
            kind: {"cases": len(rows), "base_rate": float(np.mean([case.right for case in rows]))}
            | {"numbers": _with_intervals(rows, *asked, resamples, seed)}
            for kind in kinds
            if (rows := [case for case in cases if case.kind == kind])
        },
    }


def _with_intervals(cases: Sequence[Case], threshold: float, bins: int | None, resamples: int, seed: int) -> dict:
    scores = np.array([case.score for case in cases], dtype=float)
    scored = Sorted(scores, np.array([case.right for case in cases]), threshold, bins)
    intervals = bootstrap(scored, [case.prompt for case in cases], resamples, seed)
    return {key: {"value": value, "ci95": intervals[key]} for key, value in scored.numbers().items()}
