"""The jobs that launch scripts run: build the roles, train, measure; and how a job ends."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from rlpipe.config import Config, ConfigError
from rlpipe.data.prompts import PromptError, load_prompts
from rlpipe.learn.checkpoint import CheckpointError
from rlpipe.learn.learner import LearnerError
from rlpipe.learn.strategy import StrategyError
from rlpipe.paths import resolve_path
from rlpipe.policy import checkpoint
from rlpipe.policy.adapter import AdapterError
from rlpipe.policy.templates import Templates, check_prompts
from rlpipe.reward.scorer import check_scorers
from roles.batch import ScoresMissing
from roles.buckets import WeightError
from roles.evaluation import Evaluation, measure_run, show
from roles.group import ActorPool, RoleError
from roles.pipeline import GrpoPipeline
from roles.placement import (
    Demand,
    PlacementError,
    connect,
    grpo_demands,
    learner_demands,
    with_absolute_paths,
)
from roles.pools import examples_pool, reference_pool, refuse_prompts, rollout_pool, scorer_pools
from roles.trainer import Stopped, Stopwatch, Trainer

EXPECTED = (
    ConfigError,
    PromptError,
    PlacementError,
    RoleError,
    ScoresMissing,
    LearnerError,
    StrategyError,
    WeightError,
    AdapterError,
    CheckpointError,
    checkpoint.CheckpointError,
)
"""Errors that a person can act on: told in one line, without a traceback."""


def run_job(job: Callable[[Config], Coroutine], config: Config) -> int:
    """Run a job on Ray to its end and return the process's exit status."""
    try:
        asyncio.run(job(config))
    except Stopped as stopped:
        print(f"{stopped}; go on with the same command (resume=auto)", file=sys.stderr)
        return 128 + stopped.signum
    except EXPECTED as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        print(f"error: {cause}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


async def sft(config: Config) -> None:
    """Supervised fine-tuning of the three sub-tasks; leaves a policy in the run folder."""
    config = with_absolute_paths(config)
    demands = learner_demands(config) | {
        "examples": Demand("examples", 1, config.sft.num_cpus, config.sft.num_gpus, "sft.num_gpus")
    }
    connect(config, demands)
    trainer, examples = Trainer(config, demands["learner"]), examples_pool(config, demands)
    try:
        with trainer.signals():
            await asyncio.gather(trainer.start(), examples.start())
            await train_supervised(config, trainer, examples)
            await export_run(config, trainer)
    finally:
        examples.close()
        trainer.close()
    show(config, None)


async def train_supervised(config: Config, trainer: Trainer, examples: ActorPool) -> None:
    """One batch after the other, each built while the one before is trained.

    consumes:     batches of examples, in the order of their steps.
    waits for:    the next batch; the learner.
    unblocked by: the example actor.
    """

    def fetch(step: int) -> asyncio.Task:
        batch = examples.call("batch", step, timeout_s=config.learner.timeout_s, num_returns=2)
        return asyncio.ensure_future(batch)

    async with trainer.saving(dict):
        coming = fetch(trainer.step)
        while trainer.step < config.train.steps:
            watch = Stopwatch()
            with watch("wait"):
                record, items = await trainer.unless_halted(coming)
            coming = fetch(trainer.step + 1)
            with watch("assemble"):
                await trainer.assemble_items(items, record.count)
            metrics = await trainer.train(float(record.count))
            metrics |= {f"loss/{record.task}": metrics["loss/total"], "time/examples": record.seconds}
            if trainer.step % config.train.checkpoint_every == 0 or trainer.step == config.train.steps:
                with watch("checkpoint"):
                    await trainer.save({})
                    await trainer.export_if_due()
            trainer.log(metrics | examples.counts() | watch.metrics())
        coming.cancel()


async def export_run(config: Config, trainer: Trainer) -> None:
    """The trained policy in the run folder, and the adapters by themselves if there are any."""
    await trainer.export(Path(config.run.dir) / "policy")
    if config.policy.lora.rank:
        await trainer.export_adapter(Path(config.run.dir) / "adapter")


async def grpo(config: Config) -> None:
    """Reinforcement learning, then the table of the held-out prompts."""
    started = time.monotonic()
    check_scorers(config.reward)
    prompts = load_prompts(config.data.prompts)
    tokenizer, *_ = checkpoint.read_configs(resolve_path(config.policy.path))
    for rows in (prompts, load_prompts(config.evaluate.prompts)):
        check_prompts(rows, Templates(tokenizer).configured(config), config.rollout.program)
    config = with_absolute_paths(config)
    demands = grpo_demands(config)
    connect(config, demands)
    trainer = Trainer(config, demands["learner"])
    rollout, scorers = rollout_pool(config, demands), scorer_pools(config, demands)
    reference = reference_pool(config, demands)
    pools = [rollout, *scorers, *([reference] if reference else [])]
    try:
        with trainer.signals():
            state, *_ = await asyncio.gather(trainer.start(), *(pool.start() for pool in pools))
            await refuse_prompts(config.reward, prompts, scorers)
            pipeline = GrpoPipeline(config, prompts, trainer, rollout, scorers, reference)
            await pipeline.run(state)
            await export_run(config, trainer)
            evaluation = Evaluation(config, trainer, rollout, scorers, pipeline.sync)
            summary = await measure_run(evaluation, started)
    finally:
        for pool in pools:
            pool.close()
        trainer.close()
    show(config, summary)
