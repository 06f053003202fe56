"""The paper's table: accuracy on held-out prompts without and with introspection, after SFT and after RL.

Pure functions from records to the structure of summary.json; shares lie in 0..1. Accuracy is the plain mean
over GenEval's kinds of prompt, as GenEval's own overall score is. Intervals are 95 % percentile bootstraps
that draw prompts anew within each kind, seeded; differences are paired by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlpipe.evaluate.agreement import accuracy, auroc, balanced_accuracy, wilson

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one held-out prompt, by the exact checker.

    final_correct: of the image that the policy ends with: the first after "Yes", the redrawn one after "No".
    fresh_correct: the control: after "No" an independent first draw stands in for the redraw (equal number of
                   images), else the first image.
    *_score:       the learned judge's score of the first, redrawn and fresh image, None where there is none.
    reason:        the policy's words; `true_reason` the checker's on the first image.

        Outcome("7", "colors", first_correct=False, said_yes=False, final_correct=True, fresh_correct=False)
    """

    prompt_id: str
    tag: str
    first_correct: bool
    said_yes: bool
    final_correct: bool
    fresh_correct: bool
    first_score: float | None = None
    redraw_score: float | None = None
    fresh_score: float | None = None
    reason: str = ""
    true_reason: str = ""


@dataclass(frozen=True, slots=True)
class NearMiss:
    """The policy's verdict on a right image, under its own prompt (`truth`) or one that it just misses."""

    prompt_id: str
    tag: str
    truth: bool
    said_yes: bool


@dataclass(frozen=True)
class Measured:
    """All records of one policy at one guidance scale."""

    outcomes: Sequence[Outcome]
    near_misses: Sequence[NearMiss] = ()
    guidance: float = 1.0


def summarise(
    sft: Measured | None,
    rl: Measured | None,
    sweep: Mapping[float, Sequence[Outcome]] | None = None,
    seconds: float = 0.0,
    seed: int = 0,
) -> dict:
    """The structure of summary.json from the records of the policy after SFT, after RL, or both.

    `sweep` holds the SFT policy's outcomes at other guidance scales. The top-level rates are RL's, or SFT's
    where there is no RL.
    """
    measured = {name: records for name, records in (("sft", sft), ("rl", rl)) if records is not None}
    if not measured:
        raise ValueError("summarise: give the records of at least one policy")
    table = {name: policy_row(records, seed) for name, records in measured.items()}
    main, row = list(measured.items())[-1][1], list(table.values())[-1]
    summary = {
        "table": table,
        "repaired": row["repaired"],
        "damaged": row["damaged"],
        "verdict": row["verdict"],
        "judge": row["judge"],
        "guidance": main.guidance,
        "prompts": len(main.outcomes),
        "prompts_by_tag": {tag: len(rows) for tag, rows in _by_tag(main.outcomes).items()},
        "seconds": seconds,
    }
    if sft is not None:
        summary["best_guidance"] = {"sft": best_guidance({sft.guidance: sft.outcomes, **(sweep or {})})}
    if sft is not None and rl is not None:
        summary["rl_gain"] = _rl_gain(sft.outcomes, rl.outcomes, seed)
        best = summary["best_guidance"]["sft"]["with"]
        summary["rl_gain"]["with_over_best_sft"] = table["rl"]["with"]["accuracy"] - best
    return summary


def policy_row(measured: Measured, seed: int = 0) -> dict:
    """One policy's row: accuracies, gains, repair and damage, verdict, agreement of the learned judge."""
    outcomes = measured.outcomes
    if not outcomes:
        raise ValueError("table: no outcomes; evaluate.prompts gave no rows")
    return {
        "without": _cell(outcomes, lambda o: o.first_correct, seed),
        "with": _cell(outcomes, lambda o: o.final_correct, seed),
        "fresh": _cell(outcomes, lambda o: o.fresh_correct, seed),
        "gain": _difference(outcomes, lambda o: o.final_correct - o.first_correct, seed),
        "gain_over_fresh": _difference(outcomes, lambda o: o.final_correct - o.fresh_correct, seed),
        "guidance": measured.guidance,
        **_rates(outcomes),
        "verdict": _verdict(outcomes, measured.near_misses),
        "judge": _judge(outcomes),
    }


def best_guidance(sweep: Mapping[float, Sequence[Outcome]]) -> dict:
    """The guidance scale with the highest accuracy with introspection, and the whole sweep in order."""
    rows = [
        {
            "guidance": scale,
            "without": _mean_over_tags(outcomes, lambda o: o.first_correct),
            "with": _mean_over_tags(outcomes, lambda o: o.final_correct),
        }
        for scale, outcomes in sorted(sweep.items())
    ]
    return {**max(rows, key=lambda row: row["with"]), "sweep": rows}


def _rates(outcomes: Sequence[Outcome]) -> dict:
    """Repair and damage by the redraw and by the fresh draw.

    repaired: share of the wrong first images whose trajectory ended right. damaged: share of the right first
    images whose trajectory ended wrong. *_of_redrawn: among those alone that were said "No".
    """
    wrong = [o for o in outcomes if not o.first_correct]
    right = [o for o in outcomes if o.first_correct]
    wrong_no, right_no = ([o for o in rows if not o.said_yes] for rows in (wrong, right))
    return {
        "repaired": _share(o.final_correct for o in wrong),
        "repaired_ci95": list(wilson(sum(o.final_correct for o in wrong), len(wrong))),
        "repaired_by_fresh": _share(o.fresh_correct for o in wrong),
        "repaired_of_redrawn": _share(o.final_correct for o in wrong_no),
        "repaired_of_redrawn_by_fresh": _share(o.fresh_correct for o in wrong_no),
        "damaged": _share(not o.final_correct for o in right),
        "damaged_ci95": list(wilson(sum(not o.final_correct for o in right), len(right))),
        "damaged_by_fresh": _share(not o.fresh_correct for o in right),
        "damaged_of_redrawn": _share(not o.final_correct for o in right_no),
    }


def _verdict(outcomes: Sequence[Outcome], near_misses: Sequence[NearMiss]) -> dict:
    said, truth = [o.said_yes for o in outcomes], [o.first_correct for o in outcomes]
    near_said, near_truth = [n.said_yes for n in near_misses], [n.truth for n in near_misses]
    words = [o for o in outcomes if o.reason and o.true_reason]
    return {
        "accuracy": accuracy(said, truth),
        "balanced_accuracy": balanced_accuracy(said, truth),
        "yes_of_right": _share(s for s, t in zip(said, truth, strict=True) if t),
        "no_of_wrong": _share(not s for s, t in zip(said, truth, strict=True) if not t),
        "share_yes": _share(said),
        "near_miss_balanced_accuracy": balanced_accuracy(near_said, near_truth),
        "near_miss_cases": len(near_misses),
        "reason_exact": _share(o.reason == o.true_reason for o in words),
    }


def _judge(outcomes: Sequence[Outcome]) -> dict:
    """The learned judge (yes: score above 0.5) against the checker, on every image that the policy drew."""
    cases = [(o.first_score, o.first_correct) for o in outcomes]
    redrawn = [o for o in outcomes if not o.said_yes]
    cases += [(o.redraw_score, o.final_correct) for o in redrawn]
    cases += [(o.fresh_score, o.fresh_correct) for o in redrawn]
    scored = [(score, truth) for score, truth in cases if score is not None]
    scores, truth = [s for s, _ in scored], [t for _, t in scored]
    said = [score > 0.5 for score in scores]
    return {
        "agreement": accuracy(said, truth),
        "balanced": balanced_accuracy(said, truth),
        "auroc": auroc(scores, truth),
        "images": len(scored),
    }


def _rl_gain(sft: Sequence[Outcome], rl: Sequence[Outcome], seed: int) -> dict:
    """RL minus SFT, without and with introspection, paired by prompt."""
    before = {o.prompt_id: o for o in sft}
    if set(before) != {o.prompt_id for o in rl}:
        raise ValueError("table: sft and rl were measured on different prompts; measure both on evaluate.prompts")
    return {
        "without": _difference(rl, lambda o: o.first_correct - before[o.prompt_id].first_correct, seed),
        "with": _difference(rl, lambda o: o.final_correct - before[o.prompt_id].final_correct, seed),
    }


def _cell(outcomes: Sequence[Outcome], value: Callable[[Outcome], bool], seed: int) -> dict:
    return {
        "accuracy": _mean_over_tags(outcomes, value),
        "ci95": _interval(outcomes, value, seed),
        "by_tag": {tag: float(np.mean([value(o) for o in rows])) for tag, rows in _by_tag(outcomes).items()},
    }


def _difference(outcomes: Sequence[Outcome], value: Callable[[Outcome], int], seed: int) -> dict:
    return {"value": _mean_over_tags(outcomes, value), "ci95": _interval(outcomes, value, seed)}


def _mean_over_tags(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    return float(np.mean([np.mean([value(o) for o in rows]) for rows in _by_tag(outcomes).values()]))


def _interval(outcomes: Sequence[Outcome], value: Callable[[Outcome], float], seed: int) -> list[float]:
    """[lo, hi] of the mean over kinds: prompts drawn anew within each kind, 2.5th to 97.5th percentile."""
    rng = np.random.default_rng(seed)
    means = []
    for rows in _by_tag(outcomes).values():
        values = np.array([value(o) for o in rows], dtype=float)
        means.append(values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return [float(low), float(high)]


def _by_tag(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.tag, []).append(outcome)
    return groups


def _share(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None
