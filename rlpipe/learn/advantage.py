"""Credit: scores of a group -> an advantage per reward -> what the learner does with each segment.

An image i is worth R(I_i), its reward; the reflection on it 1 - |P(I_i) - [said Yes]|, where P(I_i) is the probability
that the image matches (paper 3.3, where R and P are the same number). The rules:

v1, v2, v3 (official code) reward three spans, the first image, the reflection on it and the final image, each compared
within its group by itself; the loss is the mean over spans. They differ in what the final image is and where it stands:
    v1  "Yes": image 1, its own tokens once more; "No": image 2
    v2  "Yes": image 1, its tokens teacher-forced behind the redraw context; "No": image 2
    v3  image 2, always drawn
`summed` (paper 3.3) gives all tokens of a trajectory one advantage. With at most T images, of which it drew K,
    R = sum_{i<K} R(I_i) + (T - K + 1) R(I_K) + T/n sum_i (1 - |P(I_i) - [said Yes]_i|)
over the n reflections there are: an image that ends a trajectory for want of rounds is not looked at.
`segments` rewards every image and reflection, compared with those at the same place in the group's trajectories.
`single` rewards the only image of a drawing or an edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from rlpipe.learn.group import group_advantages, members_of, verdict_weights
from rlpipe.learn.weighting import Part, Plan, num_trained, rounds, weigh
from rlpipe.schema import CreditSection
from rlpipe.types import ImageScore, Rollout, Segment, SegmentCredit, TrainBatch, TrainItem, Trajectory

SPANS = ("first", "reflection", "final")
ACCEPTING = ("v1", "v2", "summed")
"""Rules for which a trajectory ends with the image that was said to match, even if more were drawn."""

References = Sequence[tuple[np.ndarray | None, ...]]


@dataclass(frozen=True)
class FinalSpan:
    """Where a rule finds the final image: its index among the drawn images and among the segments."""

    image: int
    segment: int


def final_v1(trajectory: Trajectory) -> FinalSpan:
    """The accepted image: an accepted first image is credited twice, on the same tokens."""
    image = accepted_image(trajectory)
    return FinalSpan(image, trajectory.images[image])


def final_v2(trajectory: Trajectory) -> FinalSpan:
    """The accepted image; an accepted first image by its copy behind the redraw context (see `extend`)."""
    return FinalSpan(accepted_image(trajectory), trajectory.images[-1])


def final_v3(trajectory: Trajectory) -> FinalSpan:
    """The second image, whatever was said of the first."""
    if len(trajectory.images) < 2:
        raise ValueError(
            f"trajectory {trajectory.id}: credit.rule v3 credits a second image and there is none; "
            "set rollout.redraw=always and rollout.max_images=2"
        )
    return FinalSpan(1, trajectory.images[1])


FINALS: dict[str, Callable[[Trajectory], FinalSpan]] = {"v1": final_v1, "v2": final_v2, "v3": final_v3}


def accepted_image(trajectory: Trajectory) -> int:
    """Number of the image that the trajectory stops at: the first that was said to match, else the last."""
    return trajectory.images.index(trajectory.final_image)


def final_image_of(trajectory: Trajectory, rule: str) -> int:
    """Number of the image that a rule rewards as the final one."""
    return FINALS[rule](trajectory).image if rule in FINALS else accepted_image(trajectory)


def reflection_rewards(trajectory: Trajectory, matches: Sequence[float | None]) -> list[float]:
    """1 - |P(I_i) - [said Yes]_i| of each reflection, in order; NaN where the image's P is missing."""
    known = _known(matches)
    return [1.0 - abs(known[i] - float(yes)) for i, yes in enumerate(trajectory.verdicts)]


def _known(scores: Sequence[float | None]) -> list[float]:
    return [float("nan") if score is None else float(score) for score in scores]


class Row(NamedTuple):
    """The scores of one trajectory's images; NaN where one is missing.

    values, finals: rewards of each image wherever it stands, and as the final one. matches: P that it shows the prompt.
    """

    values: list[float]
    finals: list[float]
    matches: list[float]

    @staticmethod
    def of(scores: Sequence[ImageScore | float | None]) -> Row:
        """Of what the scorers said; a plain number is all three."""
        whole = [s if isinstance(s, ImageScore) else ImageScore("", s, final=s, match=s) for s in scores]
        return Row(*(_known([getattr(s, name) for s in whole]) for name in ("value", "final", "match")))


def extend(rollouts: Sequence[Rollout], rule: str) -> list[Rollout]:
    """The rollouts with the segments that a rule credits; call it before anything scores them.

    Where a rule ends a trajectory with its accepted image, what was drawn after that one (rollout.redraw=always) is
    left out. v2 then gives a trajectory that ends with "Yes" its first image once more, as a teacher-forced second one.
    """
    if rule not in RULES:
        raise ValueError(f"credit.rule: {rule!r} is none of {', '.join(RULES)}")
    if rule in ACCEPTING:
        rollouts = [_until_accepted(rollout) for rollout in rollouts]
    return [_forced(rollout) for rollout in rollouts] if rule == "v2" else list(rollouts)


def _until_accepted(rollout: Rollout) -> Rollout:
    trajectory = rollout.trajectory
    kept = accepted_image(trajectory) + 1
    if kept == len(trajectory.images):
        return rollout
    trajectory = replace(
        trajectory,
        segments=trajectory.segments[: trajectory.images[kept]],
        verdicts=trajectory.verdicts[:kept],
        truncated=trajectory.truncated[:kept],
    )
    return replace(rollout, trajectory=trajectory, images=rollout.images[:kept], texts=rollout.texts[:kept])


def _forced(rollout: Rollout) -> Rollout:
    trajectory = rollout.trajectory
    if trajectory.verdicts[:1] != (True,):
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

    batch:      one item per rollout, in order; its denominator is the number of rollouts, for v1 to v3 times three,
                or that of `credit.weighting`.
    rewards:    by name, float64 [N], NaN where a score is missing or the trajectory has no such segment. Every rule
                has `trajectory`, one number for all of it, and of `first`, `reflection`, `final` what there is.
    advantages: of the rewards that the rule compares, by name, float64 [N], NaN where there is none.
    metrics:    reward/<name>/{mean,std} and credit/*.
    """

    batch: TrainBatch
    rewards: dict[str, np.ndarray]
    advantages: dict[str, np.ndarray]
    metrics: dict[str, float]


def assign_credit(
    rollouts: Sequence[Rollout],
    scores: Sequence[Sequence[ImageScore | float | None]],
    groups: Sequence[int],
    section: CreditSection,
    references: References | None = None,
    train_eos: bool = True,
    entropy: bool = False,
) -> Credited:
    """Credit the segments of rollouts that went through `extend`.

    scores:     per rollout what was said of each of its images (a plain number is reward and probability at once). What
                is missing takes the credit (and the KL) of the rewards that needed it and is counted, never read as a
                zero.
    groups:     per rollout the number of its group; rollouts of one group compete.
    references: per rollout the reference log-probs of its segments; without them no KL is asked.
    train_eos:  whether end-of-sentence tokens are in the loss, where tokens are counted.
    entropy:    whether the loss has a term of entropies, weighted as the KL is.
    """
    if not len(rollouts) == len(scores) == len(groups):
        raise ValueError(f"credit: {len(rollouts)} rollouts, {len(scores)} rows of scores, {len(groups)} groups")
    trajectories = [rollout.trajectory for rollout in rollouts]
    rows = [Row.of(row) for row in scores]
    plan = RULES[section.rule](trajectories, rows, section, train_eos)
    settings = (section.std_eps, section.std, section.baseline)
    advantages = {n: group_advantages(plan.rewards[n], groups, *settings) for n in plan.compared}
    if section.balance_verdicts:
        for name in (n for n in advantages if n.startswith("reflection")):
            image = int(name.partition("_")[2] or 1) - 1
            looked_at = [row.matches[image] if image < len(row.matches) else np.nan for row in rows]
            advantages[name] = advantages[name] * verdict_weights(np.array(looked_at))
    weights, denominator = weigh(plan, trajectories, section.weighting, train_eos)
    items = []
    for index, (rollout, parts) in enumerate(zip(rollouts, plan.parts, strict=True)):
        own = {name: float(values[index]) for name, values in advantages.items()}
        shared = (float(references is not None), float(entropy))
        credits = _credits(len(rollout.trajectory.segments), parts, weights[index], own, shared)
        stored = tuple(references[index]) if references is not None else ()
        items.append(TrainItem(rollout.trajectory, rollout.images, credits, stored))
    batch = TrainBatch(tuple(items), denominator)
    return Credited(batch, plan.rewards, advantages, _metrics(plan.rewards, advantages, groups, rows))


def tells_nothing(rollouts: Sequence[Rollout], scores: Sequence[Sequence[ImageScore]], section: CreditSection) -> bool:
    """Whether no reward that the rule compares differs by more than `redraw_spread` within this group (DAPO 3.2)."""
    plan = RULES[section.rule]([r.trajectory for r in rollouts], [Row.of(row) for row in scores], section, True)
    present = [plan.rewards[name][~np.isnan(plan.rewards[name])] for name in plan.compared]
    return all(not len(values) or np.ptp(values) <= section.redraw_spread for values in present)


def _span_rule(finals: Callable[[Trajectory], FinalSpan]) -> Callable[..., Plan]:
    """A rule of three spans: three rewards, three terms of equal weight in the loss."""

    def rule(trajectories: Sequence[Trajectory], rows: Sequence[Row], section: CreditSection, train_eos: bool) -> Plan:
        spans = [finals(trajectory) for trajectory in trajectories]
        rewards = span_rewards(trajectories, rows, [span.image for span in spans], first_only=True)
        rewards["trajectory"] = sum(rewards[name] for name in SPANS)
        parts = []
        for trajectory, span in zip(trajectories, spans, strict=True):
            places = {"first": 0, "reflection": 1, "final": span.segment}
            weights = (section.first_weight, section.reflection_weight, section.final_weight)
            row = [Part(places[name], name, w) for name, w in zip(SPANS, weights, strict=True)]
            parts.append(row if trajectory.texts else [row[0], row[2]])
        return Plan(rewards, parts, terms=len(SPANS))

    return rule


def _summed(trajectories: Sequence[Trajectory], rows: Sequence[Row], section: CreditSection, train_eos: bool) -> Plan:
    """One reward for a trajectory; each segment's weight is its share of the tokens, so that the loss is their mean."""
    finals = [accepted_image(trajectory) for trajectory in trajectories]
    rewards = span_rewards(trajectories, rows, finals)
    totals = [summed_reward(t, row) for t, row in zip(trajectories, rows, strict=True)]
    rewards["generation"], rewards["comprehension"] = np.array(totals, np.float64).reshape(-1, 2).T
    rewards["trajectory"] = rewards["generation"] + rewards["comprehension"]
    parts = []
    for trajectory in trajectories:
        counts = num_trained(trajectory, train_eos)
        parts.append([Part(i, "trajectory", 1.0, count / sum(counts)) for i, count in enumerate(counts)])
    return Plan(rewards, parts, longest=rounds(trajectories))


def summed_reward(trajectory: Trajectory, row: Row) -> tuple[float, float]:
    """The paper's R_gen and R_comp of one trajectory; NaN where a score that one needs is missing."""
    rounds, stop = trajectory.sampling.max_images, accepted_image(trajectory)
    generation = sum(row.values[:stop]) + (rounds - stop) * row.finals[stop]
    said = reflection_rewards(trajectory, row.matches)
    return generation, rounds * float(np.mean(said)) if said else 0.0


def _segments(trajectories: Sequence[Trajectory], rows: Sequence[Row], section: CreditSection, train_eos: bool) -> Plan:
    """A reward for each place of a trajectory (image_1, reflection_1, image_2, ...), equally weighted in each."""
    ends = [accepted_image(trajectory) for trajectory in trajectories]
    rewards = span_rewards(trajectories, rows, ends)
    rewards["trajectory"] = np.full(len(trajectories), np.nan)
    weights = {"image_1": section.first_weight}
    parts = []
    for index, (trajectory, row, end) in enumerate(zip(trajectories, rows, ends, strict=True)):
        of_images = iter([*row.values[:end], row.finals[end], *row.values[end + 1 :]])
        of_texts = iter(reflection_rewards(trajectory, row.matches))
        values, parts_of = [], []
        for segment, kind in enumerate(s.kind for s in trajectory.segments):
            name = f"{'image' if kind == 'image' else 'reflection'}_{segment // 2 + 1}"
            values.append(next(of_images) if kind == "image" else next(of_texts))
            rewards.setdefault(name, np.full(len(trajectories), np.nan))[index] = values[-1]
            weight = section.final_weight if kind == "image" else section.reflection_weight
            parts_of.append(Part(segment, name, weights.get(name, weight), 1.0 / len(trajectory.segments)))
        rewards["trajectory"][index] = np.mean(values)
        parts.append(parts_of)
    return Plan(rewards, parts, longest=rounds(trajectories))


def _single(trajectories: Sequence[Trajectory], rows: Sequence[Row], section: CreditSection, train_eos: bool) -> Plan:
    """The reward of the one image."""
    for trajectory in trajectories:
        if len(trajectory.segments) != 1:
            raise ValueError(
                f"trajectory {trajectory.id}: credit.rule single credits one image and there are "
                f"{len(trajectory.segments)} segments; set rollout.program=draw, or another credit.rule"
            )
    values = np.array([row.finals[0] for row in rows], np.float64)
    parts = [[Part(0, "final", 1.0)] for _ in trajectories]
    return Plan({"final": values, "trajectory": values}, parts, longest=(1, 0))


RULES: dict[str, Callable[..., Plan]] = {
    **{name: _span_rule(finals) for name, finals in FINALS.items()},
    "summed": _summed,
    "segments": _segments,
    "single": _single,
}


def span_rewards(
    trajectories: Sequence[Trajectory],
    rows: Sequence[Row],
    finals: Sequence[int],
    first_only: bool = False,
) -> dict[str, np.ndarray]:
    """Rewards of first image, reflections and final image, float64 [N] by span name; NaN where there is none.

    finals:     per trajectory the number of its final image.
    first_only: the reflection's reward is that of the first one, not the mean of all.
    """
    rewards = {name: np.full(len(trajectories), np.nan) for name in SPANS}
    for index, (trajectory, row, final) in enumerate(zip(trajectories, rows, finals, strict=True)):
        if final >= len(row.values):
            raise ValueError(f"trajectory {trajectory.id}: {len(row.values)} scores, the rule needs {final + 1}")
        rewards["first"][index], rewards["final"][index] = row.values[0], row.finals[final]
        said = reflection_rewards(trajectory, row.matches)
        if said:
            rewards["reflection"][index] = said[0] if first_only else np.mean(said)
    return rewards


def _credits(
    num_segments: int,
    parts: Sequence[Part],
    weights: Sequence[float],
    advantages: Mapping[str, float],
    shared: tuple[float, float],
) -> tuple[SegmentCredit, ...]:
    """Credits of the segments: each part adds its weighted advantage, and its weight of KL and entropy (`shared`)."""
    sums = np.zeros((num_segments, 3))
    for part, weight in zip(parts, weights, strict=True):
        if not np.isnan(advantages[part.reward]):
            sums[part.segment] += weight * np.array([advantages[part.reward], *shared])
    return tuple(SegmentCredit(float(a), float(kl), entropy=float(entropy)) for a, kl, entropy in sums)


def _metrics(
    rewards: Mapping[str, np.ndarray],
    advantages: Mapping[str, np.ndarray],
    groups: Sequence[int],
    rows: Sequence[Row],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, values in rewards.items():
        spreads = [scores.std(ddof=1) for _, scores in members_of(values, groups) if len(scores) > 1]
        if spreads:
            metrics[f"reward/{name}/mean"] = float(np.nanmean(values))
            metrics[f"reward/{name}/std"] = float(np.mean(spreads))
    metrics["credit/images_without_reward"] = float(sum(np.isnan(row.values).sum() for row in rows))
    compared = ~np.isnan(np.stack(list(advantages.values()))).all(axis=0)
    groups = np.asarray(groups)
    lost = [group for group in set(groups.tolist()) if not compared[groups == group].any()]
    metrics["credit/groups_without_comparison"] = float(len(lost))
    return metrics
