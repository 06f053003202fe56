"""What one rank of a two-rank learner does in the tests; runs in a process of its own."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlpipe.learn.checkpoint import save_checkpoint
from rlpipe.learn.learner import Learner, LearnerError
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Sampling, SegmentCredit, TrainItem
from tests.learn.builders import config, item, with_logprobs

SCENARIOS = ("uneven", "supervised", "recomputed", "bfloat16")
TOTAL = 10


def batches(path: Path, scenario: str) -> list[list[TrainItem]]:
    """Two steps' items. GRPO of mixed lengths, or one supervised task per step."""
    policy = JanusPolicy.load(path)
    if scenario == "supervised":
        draw, judge = (SegmentCredit(ce=1.0),), (SegmentCredit(), SegmentCredit(ce=1.0))
        return [[item(policy, i, len(c), credits=c) for i in range(5)] for c in (draw, judge)]
    sampling = Sampling(guidance=2.0)
    items = [item(policy, i, 1 + i % 3, sampling) for i in range(5)]
    items = with_logprobs(policy, items)
    if scenario == "recomputed":
        items = [replace(i, credits=tuple(replace(c, entropy=0.5) for c in i.credits)) for i in items]
    return [items] * 2


def build(path: Path, scenario: str, rank: int = 0, world_size: int = 1) -> Learner:
    recomputed = scenario == "recomputed"
    settings = config(
        path,
        micro_batch=2,
        token_budget=500 if recomputed else None,
        head_chunk=50 if recomputed else 1024,
        activation_checkpointing="full" if recomputed else "none",
        eps=1e-3,
    )
    settings.policy.dtype = "bfloat16" if scenario == "bfloat16" else "float32"
    return Learner(settings, rank, world_size)


def train(learner: Learner, path: Path, scenario: str, first: slice) -> tuple[list[dict], dict]:
    """Metrics of two steps on this rank's slice of the items, and the weights after them."""
    metrics = []
    for step, items in enumerate(batches(path, scenario)):
        weights = (0.3, -0.2) if scenario == "recomputed" else None
        metrics.append(learner.step(items[first], 15.0, step, TOTAL, fresh=step == 0, entropy_weights=weights))
    return metrics, learner.weights()


def rank_main(rank: int, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for scenario in SCENARIOS:
        learner = build(path, scenario, rank, 2)
        # Rank 1 has one item against four: it must make up passes and whole micro-batches.
        share = slice(0, 4) if rank == 0 else slice(4, 5)
        metrics, weights = train(learner, path, scenario, share)
        torch.save({"metrics": metrics, "weights": weights}, out / f"{scenario}_{rank}.pt")
        if scenario == "uneven":
            save_checkpoint(out / "checkpoints", 2, learner, {"cursor": 7})
            torch.save(refused(learner, path, rank), out / f"refused_{rank}.pt")
    dist.destroy_process_group()


def refused(learner: Learner, path: Path, rank: int) -> str:
    """A step whose items are broken on rank 1 alone."""
    items = batches(path, "uneven")[0][:2]
    if rank == 1:
        items[0].trajectory.segments[0].logprobs[0] = -float("inf")
    try:
        learner.step(items, 15.0, 2, TOTAL)
    except LearnerError as error:
        return str(error)
    return "accepted"


if __name__ == "__main__":
    mp.spawn(rank_main, (Path(sys.argv[1]), Path(sys.argv[2])), nprocs=2)
