"""The reward actor: one scorer of the configuration, answering for the images of drawn groups."""

from __future__ import annotations

import time

import ray
import torch
from ray import ObjectRef

from rlpipe.config import ScorerSection
from rlpipe.reward.scorer import build_scorer, score_all
from rlpipe.types import Rollout, Score, ScoreRequest
from roles.rollout import actor_device
from roles.work import ScoreRecord


class RewardActor:
    """Builds the scorer that its section names (registry name or import path) and fetches the pixels itself.

    actor = ray.remote(RewardActor).remote(section)
    record = await actor.score.remote([group_ref])       # record.scores[group][member][image]
    """

    def __init__(self, section: ScorerSection) -> None:
        torch.set_num_threads(section.threads)
        self.section = section
        self.scorer = build_scorer(section, device=actor_device(section.num_gpus))

    def ready(self) -> str:
        return self.section.name

    def score(self, groups: list[ObjectRef]) -> ScoreRecord:
        """Scores of every image of every rollout; what the scorer fails to give is missing, with the reason.

        A scorer that raises is asked `retries` times more. Raises Ray's ObjectLostError if a group is gone.
        """
        started = time.monotonic()
        fetched: list[tuple[Rollout, ...]] = ray.get(groups, timeout=self.section.timeout_s)
        requests = [
            ScoreRequest(f"{rollout.trajectory.id}/{number}", rollout.trajectory.prompt, image, rollout.source)
            for group in fetched
            for rollout in group
            for number, image in enumerate(rollout.images)
        ]
        scores = iter(self._score(requests))
        nested = tuple(tuple(tuple(next(scores) for _ in rollout.images) for rollout in group) for group in fetched)
        return ScoreRecord(time.monotonic() - started, nested)

    def score_images(self, requests: list[ScoreRequest]) -> list[Score]:
        """Scores of images that are at hand, in order."""
        return self._score(requests)

    def _score(self, requests: list[ScoreRequest]) -> list[Score]:
        """Ask again for what is missing: a scorer behind a network may fail once."""
        scores = score_all(self.scorer, requests)
        for _ in range(self.section.retries):
            missing = [i for i, score in enumerate(scores) if score.missing]
            if not missing:
                break
            again = score_all(self.scorer, [requests[i] for i in missing])
            for i, score in zip(missing, again, strict=True):
                scores[i] = score
        return scores
