"""The pools of a run, built from its configuration."""

from __future__ import annotations

import ray

from rlpipe.config import Config
from roles.examples import ExampleActor
from roles.group import ActorPool
from roles.placement import Demand
from roles.reference import ReferenceActor
from roles.reward import RewardActor
from roles.rollout import RolloutWorker


def rollout_pool(config: Config, demands: dict[str, Demand]) -> ActorPool:
    """The rollout workers."""
    actor = ray.remote(RolloutWorker).options(**demands["rollout"].options)
    return ActorPool("rollout", lambda index: actor.remote(config, index), config.rollout.workers)


def scorer_pools(config: Config, demands: dict[str, Demand]) -> list[ActorPool]:
    """One pool per scorer of the configuration, in order."""
    pools = []
    for section in config.reward:
        role = f"reward/{section.name}"
        actor = ray.remote(RewardActor).options(**demands[role].options)
        pools.append(ActorPool(role, lambda index, a=actor, s=section: a.remote(s), section.replicas))
    return pools


def reference_pool(config: Config, demands: dict[str, Demand]) -> ActorPool | None:
    """The reference actors; None where no KL is asked."""
    if "reference" not in demands:
        return None
    actor = ray.remote(ReferenceActor).options(**demands["reference"].options)
    return ActorPool("reference", lambda index: actor.remote(config), config.reference.replicas)


def examples_pool(config: Config, demands: dict[str, Demand]) -> ActorPool:
    """The actor that builds supervised batches."""
    actor = ray.remote(ExampleActor).options(**demands["examples"].options)
    return ActorPool("examples", lambda index: actor.remote(config))
