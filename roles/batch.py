"""The groups of one step, on their way from requests to a batch, and what can be told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from ray import ObjectRef

from rlpipe.config import ScorerSection
from rlpipe.reward.scorer import NO_REQUEST
from rlpipe.types import Score
from roles.trainer import Stopwatch
from roles.work import DrawRecord, GroupRecord, GroupRequest, ScoreRecord


class ScoresMissing(RuntimeError):
    """More scores are missing than credit.max_failed_share allows."""


@dataclass(frozen=True)
class ScoredGroup:
    """A group as the driver holds it; `scores[member][image]` are the weighted sums over the scorers."""

    record: GroupRecord
    rollouts: ObjectRef
    scores: tuple[tuple[Score, ...], ...]
    ref_logprobs: ObjectRef | None


@dataclass
class Batch:
    """The groups of one step; `ready` is set when all of them are scored.

    requests:    by ordinal, the prompts that belong to the step (a dropped one no longer does).
    outstanding: groups that are under way.
    drawn, images, dropped, lost: groups and images asked for in all; groups without scores; draws that got lost.
    """

    step: int
    requests: dict[int, GroupRequest] = field(default_factory=dict)
    groups: dict[int, ScoredGroup] = field(default_factory=dict)
    outstanding: int = 0
    drawn: int = 0
    images: int = 0
    dropped: int = 0
    lost: int = 0
    scores: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    def in_order(self) -> list[ScoredGroup]:
        return [self.groups[ordinal] for ordinal in sorted(self.groups)]

    def count(self, scorer: str, record: ScoreRecord) -> None:
        """Take note of a scorer's answers, present and missing."""
        for score in (s for group in record.scores for member in group for s in member):
            self.scores[scorer] = self.scores.get(scorer, 0) + 1
            if score.missing:
                self.missing[scorer] = self.missing.get(scorer, 0) + 1
                self.reasons[scorer] = score.error or "no reason given"

    def check_scores(self, sections: Sequence[ScorerSection], bound: float) -> None:
        """Raise ScoresMissing if a scorer with a weight failed to score more than a share `bound` of the images."""
        for section in sections:
            missing, total = self.missing.get(section.name, 0), self.scores.get(section.name, 0)
            if section.weight and missing > bound * total:
                raise ScoresMissing(
                    f"reward/{section.name}: {missing} of {total} scores of step {self.step + 1} are missing, a larger "
                    f"share than credit.max_failed_share={bound:g}; last reason: {self.reasons[section.name]}"
                )

    def metrics(self, sections: Sequence[ScorerSection]) -> dict[str, float]:
        groups = self.in_order()
        metrics = {
            "rollout/images": float(sum(sum(g.record.num_images) for g in groups)),
            "rollout/images_per_s": self.images / max(self.watch.seconds.get("draw", 0.0), 1e-9),
            "failures/scores": float(sum(self.missing.values())),
            "failures/groups": float(self.dropped),
            "failures/lost_draws": float(self.lost),
        }
        verdicts = [o.trajectory.verdicts for g in groups for o in g.record.outlines if o.trajectory.verdicts]
        if verdicts:
            reflections = sum(map(len, verdicts))
            metrics["rollout/share_yes"] = sum(said[0] for said in verdicts) / len(verdicts)
            metrics["rollout/reflection_tokens"] = sum(sum(g.record.num_text_tokens) for g in groups) / reflections
            metrics["rollout/truncated"] = sum(g.record.truncated for g in groups) / reflections
        for section in sections:
            parts = [s.parts for g in groups for member in g.scores for s in member if section.name in s.parts]
            if parts:
                metrics[f"reward/{section.name}/mean"] = sum(p[section.name] for p in parts) / len(parts)
        return metrics | {f"time/{phase}": seconds for phase, seconds in self.watch.seconds.items()}


@dataclass(frozen=True)
class Chunk:
    """Requests of one step that a worker draws in one call."""

    batch: Batch
    requests: tuple[GroupRequest, ...]


def missing_scores(drawn: DrawRecord, reason: str) -> ScoreRecord:
    """Answers for drawn groups without any score."""
    none = Score(NO_REQUEST, None, error=reason)
    return ScoreRecord(0.0, tuple(tuple((none,) * n for n in record.num_images) for record in drawn.groups))
