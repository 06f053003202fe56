"""The roles of many small runs: pools that outlive a run, because starting actors is what takes time."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

from rlpipe.config import Config
from rlpipe.data.prompts import load_prompts
from rlpipe.observe.tracker import read_metrics
from roles.group import ActorPool
from roles.pipeline import GrpoPipeline
from roles.placement import grpo_demands
from roles.pools import reference_pool, rollout_pool, scorer_pools
from roles.trainer import Trainer

TIMED = ("time/", "idle/", "cached/", "rollout/images_per_s")
LIMIT_S = 280
COUNTED = ("restarts", "retries", "given_up")


class Office:
    """Pools that outlive a run, and the event loop that they belong to."""

    def __init__(self, config: Config) -> None:
        self.runner = asyncio.Runner()
        self.base = config
        demands = grpo_demands(config)
        self.rollout, self.scorers = rollout_pool(config, demands), scorer_pools(config, demands)
        self.reference, self.ranks = (
            reference_pool(config, demands),
            Trainer(config, demands["learner"]).ranks,
        )
        self.trained: list[list[tuple[int, int]]] = []

    def pools(self) -> list[ActorPool]:
        return [self.rollout, *self.scorers, *([self.reference] if self.reference else []), self.ranks]

    def config(self, run_dir: Path, **changes) -> Config:
        config = copy.deepcopy(self.base)
        config.run.dir = str(run_dir)
        for key, value in changes.items():
            section, _, name = key.rpartition("__")
            setattr(getattr(config, section) if section else config, name, value)
        return config

    def train(
        self, config: Config, on_step=lambda step, office, trainer: None, before_step=lambda step, batch: None
    ) -> list[dict[str, float]]:
        """Run to the end; `on_step` is called when a step's batch has been trained. Returns the metrics."""
        return self.runner.run(asyncio.wait_for(self._train(config, on_step, before_step), LIMIT_S))

    def close(self) -> None:
        for pool in self.pools():
            pool.close()
        self.runner.close()

    async def _train(self, config: Config, on_step, before_step) -> list[dict[str, float]]:
        await asyncio.gather(*(pool.start() for pool in self.pools()))
        trainer = Trainer(config, grpo_demands(config)["learner"])
        trainer.ranks = self.ranks
        with trainer.signals():
            state = await trainer.start()
            pipeline = GrpoPipeline(
                config, load_prompts(config.data.prompts), trainer, self.rollout, self.scorers, self.reference
            )
            self.trained = []
            optimise = pipeline._optimise

            async def watched(batch, watch):
                self.trained.append([(o, g.record.policy_version) for o, g in sorted(batch.groups.items())])
                before_step(trainer.step, batch)
                result = await optimise(batch, watch)
                on_step(trainer.step, self, trainer)
                return result

            pipeline._optimise = watched
            await pipeline.run(state)
        return metrics_of(config.run.dir)

    def ordinals(self) -> list[int]:
        return [ordinal for step in self.trained for ordinal, _ in step]


def metrics_of(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows without what depends on the clock or on luck."""
    rows = read_metrics(run_dir).rows
    return [{k: v for k, v in row.items() if not k.startswith(TIMED) and not k.endswith(COUNTED)} for row in rows]
