"""The groups of one step, on their way from requests to a batch, and what can be told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from ray import ObjectRef

from rlpipe.config import CreditSection, ScorerSection
from rlpipe.learn.advantage import tells_nothing
from rlpipe.reward.service import ScoreCounts
from rlpipe.types import ImageScore
from roles.trainer import Stopwatch
from roles.work import GroupRecord, GroupRequest, ScoreRecord


class ScoresMissing(RuntimeError):
    """More scores are missing than credit.max_failed_share allows."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group as the driver holds it; `scores[member][image]` are what all scorers together say."""

    record: GroupRecord
    rollouts: ObjectRef
    scores: tuple[tuple[ImageScore, ...], ...]
    ref_logprobs: ObjectRef | None


@dataclass
class Batch:
    """The groups of one step; `ready` is set when all of them are scored.

    requests:    by ordinal, the prompts that belong to the step (a dropped one no longer does).
    outstanding: groups that are under way.
    drawn, images, dropped, lost: groups and images asked for in all; groups without scores; draws that got lost.
    equal:       groups replaced because their rewards were all equal.
    counts:      by scorer, what its scores took.
    """

    step: int
    requests: dict[int, GroupRequest] = field(default_factory=dict)
    groups: dict[int, ScoredGroup] = field(default_factory=dict)
    outstanding: int = 0
    drawn: int = 0
    images: int = 0
    dropped: int = 0
    lost: int = 0
    equal: int = 0
    counts: dict[str, ScoreCounts] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def in_order(self) -> list[ScoredGroup]:
        return [self.groups[ordinal] for ordinal in sorted(self.groups)]

    def drop_equal(self, section: CreditSection, limit: int) -> None:
        """Take out groups that tell nothing, in the order of their prompts, until `limit` have gone in all.

        To be called when no group is under way: what goes then depends on the groups alone, not on their arrival.
        """
        for ordinal in sorted(self.groups) if limit > self.equal else ():
            group = self.groups[ordinal]
            if self.equal < limit and tells_nothing(group.record.outlines, group.scores, section):
                del self.groups[ordinal], self.requests[ordinal]
                self.equal += 1

    def count(self, scorer: str, record: ScoreRecord) -> None:
        """Take note of a scorer's answers, present and missing."""
        self.counts[scorer] = self.counts.get(scorer, ScoreCounts()) + record.counts
        for score in record.scores:
            if score.missing:
                self.reasons[scorer] = score.error or "no reason given"

    def metrics(self, sections: Sequence[ScorerSection]) -> dict[str, float]:
        groups = self.in_order()
        metrics = {
            "rollout/images": float(sum(g.record.num_drawn for g in groups)),
            "rollout/images_per_s": self.images / max(self.watch.seconds.get("draw", 0.0), 1e-9),
            "failures/scores": float(sum(counts.missing for counts in self.counts.values())),
            "failures/groups": float(self.dropped),
            "failures/lost_draws": float(self.lost),
            "rollout/equal_groups": float(self.equal),
        }
        for scorer, counts in self.counts.items():
            metrics[f"failures/{scorer}/missing"] = float(counts.missing)
            metrics[f"failures/{scorer}/attempts"] = float(counts.failed)
            metrics[f"failures/{scorer}/timeouts"] = float(counts.timeouts)
            metrics[f"failures/{scorer}/retries"] = float(counts.retries)
            metrics[f"cached/{scorer}"] = counts.cached / max(counts.requests, 1)
        verdicts = [o.trajectory.verdicts for g in groups for o in g.record.outlines if o.trajectory.verdicts]
        if verdicts:
            reflections = sum(map(len, verdicts))
            metrics["rollout/share_yes"] = sum(said[0] for said in verdicts) / len(verdicts)
            metrics["rollout/reflection_tokens"] = sum(sum(g.record.num_text_tokens) for g in groups) / reflections
            metrics["rollout/truncated"] = sum(g.record.truncated for g in groups) / reflections
        metrics |= part_means(sections, [score for g in groups for member in g.scores for score in member])
        return metrics | {f"time/{phase}": seconds for phase, seconds in self.watch.seconds.items()}


@dataclass(frozen=True)
class Chunk:
    """Requests of one step that a worker draws in one call."""

    batch: Batch
    requests: tuple[GroupRequest, ...]


def part_means(sections: Sequence[ScorerSection], scores: Sequence[ImageScore]) -> dict[str, float]:
    """Mean of each scorer's values, and of each part of them, over the images that have one."""
    metrics = {}
    for section in sections:
        where = "canary" if section.canary else "reward"
        names = dict.fromkeys(name for s in scores for name in s.parts if name.split("/")[0] == section.name)
        for name in names:
            values = [s.parts[name] for s in scores if name in s.parts]
            metrics[f"{where}/{name if name != section.name else f'{name}/mean'}"] = sum(values) / len(values)
    return metrics


def canary_correlations(
    sections: Sequence[ScorerSection], groups: Sequence[ScoredGroup], rewards: np.ndarray
) -> dict[str, float]:
    """Correlation over a step's trajectories of each canary (mean over the images that it scored) with the reward.

    rewards: float64 [N], of the groups' members in order; NaN where one is missing. Without two trajectories that
             differ in both there is none.
    """
    metrics = {}
    members = [member for group in groups for member in group.scores]
    for section in (s for s in sections if s.canary):
        values = [[s.parts[section.name] for s in member if section.name in s.parts] for member in members]
        canary = np.array([np.mean(v) if v else np.nan for v in values])
        both = ~(np.isnan(canary) | np.isnan(rewards))
        if both.sum() > 1 and canary[both].std() > 0 and rewards[both].std() > 0:
            metrics[f"canary/{section.name}/correlation"] = float(np.corrcoef(canary[both], rewards[both])[0, 1])
    return metrics
