"""The pools of a run, built from its configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import ray

from rlpipe.config import Config, ScorerSection
from rlpipe.data.prompts import PromptError
from rlpipe.types import Prompt
from roles.examples import ExampleActor
from roles.group import ActorPool
from roles.placement import Demand
from roles.reference import ReferenceActor
from roles.reward import RewardActor, calls_at_once, slots
from roles.rollout import RolloutWorker


def rollout_pool(config: Config, demands: dict[str, Demand]) -> ActorPool:
    """The rollout workers."""
    actor = ray.remote(RolloutWorker).options(**demands["rollout"].options)
    return ActorPool("rollout", lambda index: actor.remote(config, index), config.rollout.workers)


def scorer_pools(config: Config, demands: dict[str, Demand]) -> list[ActorPool]:
    """One pool per scorer of the configuration, in order."""
    return [scorer_pool(section, demands[f"reward/{section.name}"]) for section in config.reward]


def scorer_pool(section: ScorerSection, demand: Demand) -> ActorPool:
    """The replicas of one scorer."""
    actor = ray.remote(RewardActor).options(**demand.options, **calls_at_once(section))
    return ActorPool(demand.role, lambda index: actor.remote(section), section.replicas, slots=slots(section))


async def refuse_prompts(
    sections: Sequence[ScorerSection], prompts: Sequence[Prompt], pools: Sequence[ActorPool]
) -> None:
    """Raises PromptError naming prompts that a scorer says it cannot score; its pool has been started."""
    pairs = zip(sections, pools, strict=True)
    calls = [pool.call("check", list(prompts), timeout_s=section.timeout_s) for section, pool in pairs]
    problems = [line for lines in await asyncio.gather(*calls) for line in lines]
    if problems:
        raise PromptError(problems)


def reference_pool(config: Config, demands: dict[str, Demand]) -> ActorPool | None:
    """The reference actors; None where no KL is asked, or the learner has the reference itself."""
    if "reference" not in demands:
        return None
    actor = ray.remote(ReferenceActor).options(**demands["reference"].options)
    return ActorPool("reference", lambda index: actor.remote(config), config.reference.replicas)


def examples_pool(config: Config, demands: dict[str, Demand]) -> ActorPool:
    """The actor that builds supervised batches."""
    actor = ray.remote(ExampleActor).options(**demands["examples"].options)
    return ActorPool("examples", lambda index: actor.remote(config))
