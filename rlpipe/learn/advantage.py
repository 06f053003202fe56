"""Credit: scores of a group -> an advantage per span -> what the learner does with each segment.

Three spans: the first image, the reflection on it, the final image. Rewards (paper 3.3, official code):
    first       P(yes | image 1)
    reflection  1 - |P(yes | image 1) - [said Yes]|
    final       P(yes | final image)
Each span is normalised in its own group. The rules differ in what the final image is, and where it stands:
    v1  "Yes": image 1, its own tokens once more; "No": image 2
    v2  "Yes": image 1, its tokens teacher-forced behind the redraw context; "No": image 2
    v3  image 2, always drawn
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlpipe.schema import CreditSection
from rlpipe.types import Rollout, Segment, SegmentCredit, TrainBatch, TrainItem, Trajectory

SPANS = ("first", "reflection", "final")

References = Sequence[tuple[np.ndarray | None, ...]]


@dataclass(frozen=True)
class FinalSpan:
    """Where a rule finds the final image: its index among the drawn images and among the segments."""

    image: int
    segment: int


def final_v1(trajectory: Trajectory) -> FinalSpan:
    """The accepted image: an accepted first image is credited twice, on the same tokens."""
    image = _accepted(trajectory)
    return FinalSpan(image, trajectory.images[image])


def final_v2(trajectory: Trajectory) -> FinalSpan:
    """The accepted image; an accepted first image by its copy behind the redraw context (see `extend`)."""
    return FinalSpan(_accepted(trajectory), trajectory.images[-1])


def final_v3(trajectory: Trajectory) -> FinalSpan:
    """The second image, whatever was said of the first."""
    if len(trajectory.images) < 2:
        raise ValueError(
            f"trajectory {trajectory.id}: credit.rule v3 credits a second image and there is none; "
            "set rollout.redraw=always and rollout.max_images=2"
        )
    return FinalSpan(1, trajectory.images[1])


RULES: dict[str, Callable[[Trajectory], FinalSpan]] = {"v1": final_v1, "v2": final_v2, "v3": final_v3}


def _accepted(trajectory: Trajectory) -> int:
    """Index of the final image among the images that were drawn."""
    said_yes = bool(trajectory.verdicts) and trajectory.verdicts[0]
    return 0 if said_yes else len(trajectory.images) - 1


def extend(rollouts: Sequence[Rollout], rule: str) -> list[Rollout]:
    """The rollouts with the segments that a rule adds; call it before the reference scores them.

    v2 gives a trajectory that ends with "Yes" its first image once more, as a teacher-forced second one.
    """
    if rule not in RULES:
        raise ValueError(f"credit.rule: {rule!r} is none of {', '.join(RULES)}")
    if rule != "v2":
        return list(rollouts)
    return [_forced(rollout) for rollout in rollouts]


def _forced(rollout: Rollout) -> Rollout:
    trajectory = rollout.trajectory
    if trajectory.verdicts[:1] != (True,) or len(trajectory.images) > 1:
        return rollout
    first = trajectory.segments[0]
    if trajectory.sampling.redraw_context == "reencoded" and first.context_ids is None:
        raise ValueError(
            f"trajectory {trajectory.id}: credit.rule v2 needs the first image as it is while redrawing; "
            "set rollout.redraw_context=sampled or rollout.redraw=always"
        )
    copy = Segment("image", first.token_ids)
    return replace(rollout, trajectory=replace(trajectory, segments=(*trajectory.segments, copy)))


def reference_items(rollouts: Sequence[Rollout]) -> list[TrainItem]:
    """The rollouts as a reference policy scores them: every segment."""
    whole = SegmentCredit(kl=1.0)
    return [TrainItem(r.trajectory, r.images, (whole,) * len(r.trajectory.segments)) for r in rollouts]


@dataclass(frozen=True)
class Credited:
    """What `assign_credit` makes of a step's rollouts.

    batch:      one item per rollout, in order; the denominator is the number of rollouts times three.
    rewards, advantages: by span name, float64 [N], NaN where a score is missing.
    metrics:    reward/<span>/{mean,std} and failures/*.
    """

    batch: TrainBatch
    rewards: dict[str, np.ndarray]
    advantages: dict[str, np.ndarray]
    metrics: dict[str, float]


def assign_credit(
    rollouts: Sequence[Rollout],
    probabilities: Sequence[Sequence[float | None]],
    groups: Sequence[int],
    section: CreditSection,
    references: References | None = None,
) -> Credited:
    """Credit the segments of rollouts that went through `extend`.

    probabilities: per rollout P(yes) of each of its images, None where the score failed. That takes the
                   credit (and the KL) of the spans that needed it and is counted, never read as a zero.
    groups:        per rollout the number of its group; rollouts of one group compete.
    references:    per rollout the reference log-probs of its segments; without them no KL is asked.
    """
    if not len(rollouts) == len(probabilities) == len(groups):
        raise ValueError(f"credit: {len(rollouts)} rollouts, {len(probabilities)} rows of scores, {len(groups)} groups")
    finals = [RULES[section.rule](rollout.trajectory) for rollout in rollouts]
    rewards = span_rewards([r.trajectory for r in rollouts], probabilities, finals)
    advantages = {name: group_advantages(rewards[name], groups, section.std_eps) for name in SPANS}
    if section.balance_verdicts:
        advantages["reflection"] = advantages["reflection"] * verdict_weights(rewards["first"])
    items = []
    for index, (rollout, final) in enumerate(zip(rollouts, finals, strict=True)):
        own = {name: float(advantages[name][index]) for name in SPANS}
        credits = _credits(rollout.trajectory, own, final, section, references is not None)
        stored = tuple(references[index]) if references is not None else ()
        items.append(TrainItem(rollout.trajectory, rollout.images, credits, stored))
    batch = TrainBatch(tuple(items), float(len(SPANS) * len(items)))
    return Credited(batch, rewards, advantages, _metrics(rewards, advantages, groups, probabilities))


def verdict_weights(probabilities: np.ndarray) -> np.ndarray:
    """Weights [N], of mean 1, under which images that match and images that do not count alike; NaN stays NaN.

    probabilities: float64 [N], P(yes) of the images that were looked at. A class that is rarer than one in ten counts
                   as one in ten.
    """
    share = float(np.clip(np.nanmean(probabilities), 0.1, 0.9)) if not np.isnan(probabilities).all() else 0.5
    return 0.5 * (probabilities / share + (1.0 - probabilities) / (1.0 - share))


def span_rewards(
    trajectories: Sequence[Trajectory],
    probabilities: Sequence[Sequence[float | None]],
    finals: Sequence[FinalSpan],
) -> dict[str, np.ndarray]:
    """Reward of each span, float64 [N] by span name; NaN where its score is missing."""
    rewards = {name: np.full(len(trajectories), np.nan) for name in SPANS}
    for index, (trajectory, scores, final) in enumerate(zip(trajectories, probabilities, finals, strict=True)):
        known = [np.nan if score is None else float(score) for score in scores]
        if final.image >= len(known):
            raise ValueError(f"trajectory {trajectory.id}: {len(known)} scores, the rule needs {final.image + 1}")
        rewards["first"][index] = known[0]
        rewards["final"][index] = known[final.image]
        if trajectory.verdicts:
            rewards["reflection"][index] = 1.0 - abs(known[0] - float(trajectory.verdicts[0]))
    return rewards


def group_advantages(rewards: np.ndarray, groups: Sequence[int], std_eps: float = 1e-4) -> np.ndarray:
    """(reward - mean) / (std + std_eps) within each group, std with n - 1; float64 [N].

    Statistics are those of the scores that are there. A missing score stays NaN, and so does the only score
    of a group, which has nothing to be compared with. A group of equal scores has advantage 0.
    """
    advantages = np.full(len(rewards), np.nan)
    for members, values in _members(rewards, groups):
        if len(values) > 1:
            advantages[members] = (values - values.mean()) / (values.std(ddof=1) + std_eps)
    return advantages


def _members(rewards: np.ndarray, groups: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per group the indices of its scores that are there, and the scores."""
    groups = np.asarray(groups)
    present = ~np.isnan(rewards)
    indices = [np.flatnonzero((groups == group) & present) for group in dict.fromkeys(groups.tolist())]
    return [(members, rewards[members]) for members in indices]


def _credits(
    trajectory: Trajectory,
    advantages: dict[str, float],
    final: FinalSpan,
    section: CreditSection,
    with_kl: bool,
) -> tuple[SegmentCredit, ...]:
    """Credits of the segments: each span adds its weighted advantage and its weight of KL to its segment."""
    places = {"first": 0, "final": final.segment}
    if trajectory.texts:
        places["reflection"] = trajectory.texts[0]
    weights = {
        "first": section.first_weight,
        "reflection": section.reflection_weight,
        "final": section.final_weight,
    }
    sums = np.zeros((len(trajectory.segments), 2))
    for name, place in places.items():
        if not np.isnan(advantages[name]):
            sums[place] += weights[name] * np.array([advantages[name], float(with_kl)])
    return tuple(SegmentCredit(advantage=float(a), kl=float(kl)) for a, kl in sums)


def _metrics(
    rewards: dict[str, np.ndarray],
    advantages: dict[str, np.ndarray],
    groups: Sequence[int],
    probabilities: Sequence[Sequence[float | None]],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, values in rewards.items():
        spreads = [scores.std(ddof=1) for _, scores in _members(values, groups) if len(scores) > 1]
        if spreads:
            metrics[f"reward/{name}/mean"] = float(np.nanmean(values))
            metrics[f"reward/{name}/std"] = float(np.mean(spreads))
    scores = [score for row in probabilities for score in row]
    metrics["failures/scores"] = float(sum(score is None for score in scores))
    lost = [g for g in set(groups) if np.isnan(advantages["first"][np.asarray(groups) == g]).all()]
    metrics["failures/groups"] = float(len(lost))
    return metrics
