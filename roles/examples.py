"""The supervised side's only actor: builds batches of examples while the learner works on the one before."""

from __future__ import annotations

import time

import torch

from rlpipe.config import Config
from rlpipe.data.sft import build_mixture
from rlpipe.types import TrainItem
from roles.rollout import actor_device
from roles.work import ExamplesRecord, sampling_of


class ExampleActor:
    """Batches of one sub-task each; a batch is a function of the seed and the step alone.

    actor = ray.remote(ExampleActor).remote(config)
    record, items = actor.batch.options(num_returns=2).remote(step)
    """

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.sft.threads)
        self.mixture = build_mixture(config, sampling_of(config.rollout, 0), actor_device(config.sft.num_gpus))

    def ready(self) -> str:
        return "examples"

    def batch(self, step: int) -> tuple[ExamplesRecord, list[TrainItem]]:
        """What optimiser step `step` trains on; call with num_returns=2."""
        started = time.monotonic()
        items = self.mixture.batch(step)
        return ExamplesRecord(time.monotonic() - started, self.mixture.task(step), len(items)), items
