"""The reward actor: one scorer of the configuration, answering requests for as long as the job runs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from rlpipe.config import ScorerSection
from rlpipe.reward.scorer import build_scorer
from rlpipe.reward.service import LONGEST_PAUSE_S, ScoreService
from rlpipe.types import Prompt, ScoreRequest
from roles.replica import ActorHangs
from roles.rollout import actor_device
from roles.work import ScoreRecord


class RewardActor:
    """Builds the scorer that its section names (registry name or import path) and answers several calls at once.

    actor = ray.remote(RewardActor).options(**calls_at_once(section)).remote(section)
    record = await actor.score.remote(requests)             # a list of ScoreRequest, or a reference to one
    """

    def __init__(self, section: ScorerSection) -> None:
        torch.set_num_threads(section.threads)
        self.section = section
        self.service = ScoreService(build_scorer(section, device=actor_device(section.num_gpus)), section)

    def ready(self) -> str:
        return self.section.name

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """One line for each prompt that the scorer cannot score."""
        check = getattr(self.service.scorer, "check", None)
        return [] if check is None else [f"reward[{self.section.name}]: {line}" for line in check(prompts)]

    def score(self, requests: Sequence[ScoreRequest]) -> ScoreRecord:
        """One score per request, in order; what the scorer fails to give is missing, with the reason.

        Raises ActorHangs where calls of the scorer that do not return leave no room for others.
        """
        started = time.monotonic()
        scores, counts = self.service.score(requests)
        if self.service.stuck:
            raise ActorHangs(f"the scorer has not returned within {self.section.timeout_s:g} s")
        return ScoreRecord(time.monotonic() - started, tuple(scores), counts)


def slots(section: ScorerSection) -> int:
    """Calls that one replica is sent at once: while its scorer is busy with some, the next one's pixels arrive and are
    prepared."""
    return section.concurrency + 1


def calls_at_once(section: ScorerSection) -> dict[str, Any]:
    """Ray's options of a reward actor: its slots, and a thread for whoever asks something else."""
    return {"max_concurrency": slots(section) + 1}


def longest_s(section: ScorerSection, count: int) -> float:
    """Seconds in which `count` requests are answered or missing, though every replica's slot has as many to answer.

    The service keeps the time of each call of its scorer; this is for an actor that keeps no time any more.
    """
    batches = math.ceil(count / section.batch_size)
    in_turn = math.ceil(batches * slots(section) / section.concurrency)
    pauses = sum(min(1.5 * section.backoff_s * 2**i, 1.5 * LONGEST_PAUSE_S) for i in range(section.retries))
    return (1 + section.retries) * (in_turn + 1) * section.timeout_s + pauses
