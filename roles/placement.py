"""Where actors run: joining or starting a cluster, and a clear answer before anything is created that cannot fit."""

from __future__ import annotations

import copy
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlpipe.config import Config
from rlpipe.paths import resolve_path
from rlpipe.policy.lora import base_is_reference
from rlpipe.reward.scorer import absolute_options

ACTOR_ENVIRONMENT = {
    # Threads that spin while they wait would take the cores from the other actors of a machine.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
GIB = 1 << 30


class PlacementError(RuntimeError):
    """A cluster that has no room for the actors asked for."""


@dataclass(frozen=True)
class Demand:
    """`count` actors of a role, each with so many CPUs and GPUs; `keys` are the configuration's names for them."""

    role: str
    count: int
    num_cpus: float
    num_gpus: float
    keys: str

    @property
    def options(self) -> dict[str, Any]:
        """Ray's options of one actor. It is never restarted by Ray: the driver has to bring a new one up to date."""
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
        }


def grpo_demands(config: Config) -> dict[str, Demand]:
    """What a reinforcement run asks of the cluster, by role; a scorer's role is `reward/<name>`."""
    rollout, reference = config.rollout, config.reference
    demands = {
        "rollout": Demand("rollout", rollout.workers, rollout.num_cpus, rollout.num_gpus, "rollout.workers"),
        **learner_demands(config),
    }
    for i, scorer in enumerate(config.reward):
        role = f"reward/{scorer.name}"
        demands[role] = Demand(role, scorer.replicas, scorer.num_cpus, scorer.num_gpus, f"reward.{i}.replicas")
    if config.loss.kl_beta > 0 and not base_is_reference(config):
        demands["reference"] = Demand(
            "reference", reference.replicas, reference.num_cpus, reference.num_gpus, "reference.replicas"
        )
    return demands


def learner_demands(config: Config) -> dict[str, Demand]:
    """What the learner's ranks ask of the cluster: all that supervised training needs."""
    learner = config.learner
    return {"learner": Demand("learner", learner.ranks, learner.num_cpus, learner.num_gpus, "learner.ranks")}


def connect(config: Config, demands: dict[str, Demand]) -> None:
    """Join the cluster of placement.ray_address or RAY_ADDRESS, else start one on this machine alone.

    Raises PlacementError if the demands cannot fit; nothing has been created then.
    """
    address = config.placement.ray_address or os.environ.get("RAY_ADDRESS")
    if not ray.is_initialized():
        common = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address:
            ray.init(address=address, runtime_env={"env_vars": ACTOR_ENVIRONMENT}, **common)
        else:
            # Processes of a local cluster inherit the environment; that is cheaper than a runtime environment.
            os.environ.update({k: os.environ.get(k, v) for k, v in ACTOR_ENVIRONMENT.items()})
            # On a machine of its own the actors' CPUs are book-keeping: fewer cores make it slower, not impossible.
            needed = math.ceil(sum(demand.count * demand.num_cpus for demand in demands.values()))
            ray.init(
                num_cpus=config.placement.local_cpus or max(os.cpu_count() or 1, needed),
                include_dashboard=False,
                object_store_memory=_store_bytes(config),
                _node_ip_address="127.0.0.1",
                **common,
            )
    check(demands, [node["Resources"] for node in ray.nodes() if node["Alive"]], local=not address)


def check(demands: dict[str, Demand], nodes: list[dict[str, float]], local: bool = True) -> None:
    """Raise PlacementError if the nodes' resources cannot hold all demands, naming role, asked, available and key."""
    for resource, field in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        have = sum(node.get(resource, 0.0) for node in nodes)
        largest = max((node.get(resource, 0.0) for node in nodes), default=0.0)
        section = "placement.local_cpus" if local and resource == "CPU" else "the cluster"
        for demand in demands.values():
            each = getattr(demand, field)
            if each > largest:
                raise PlacementError(
                    f"{demand.role}: one actor asks for {each:g} {resource}, the largest node has {largest:g}; "
                    f"lower its {field} or enlarge {section}"
                )
        asked = sum(demand.count * getattr(demand, field) for demand in demands.values())
        if asked > have:
            parts = ", ".join(
                f"{d.role} {d.count} x {getattr(d, field):g} ({d.keys})"
                for d in demands.values()
                if getattr(d, field) > 0
            )
            raise PlacementError(
                f"placement: the actors ask for {asked:g} {resource}, there are {have:g}: {parts}; "
                f"lower a count or its {field}, or enlarge {section}"
            )


def with_absolute_paths(config: Config) -> Config:
    """The configuration as actors get it, whatever their working directory is."""
    config = copy.deepcopy(config)
    config.run.dir = str(Path(config.run.dir).absolute())
    if config.resume not in ("auto", "never"):
        config.resume = str(resolve_path(config.resume))
    config.policy.path = str(resolve_path(config.policy.path))
    if config.policy.lora.path is not None:
        config.policy.lora.path = str(resolve_path(config.policy.lora.path))
    if config.reference.path is not None:
        config.reference.path = str(resolve_path(config.reference.path))
    config.sft.data = str(resolve_path(config.sft.data)) if config.sft.data else ""
    for scorer in config.reward:
        scorer.path = None if scorer.path is None else str(resolve_path(scorer.path))
        scorer.options = absolute_options(scorer)
    return config


def _store_bytes(config: Config) -> int:
    """Object store of a local cluster: two versions of the weights, rollouts in flight, and room to spare."""
    weights = sum(file.stat().st_size for file in Path(resolve_path(config.policy.path)).glob("*.safetensors"))
    return GIB // 2 + 4 * weights
