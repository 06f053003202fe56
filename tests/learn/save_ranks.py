"""What one rank of a learner does that saves while it trains; two of them run in processes of their own."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlpipe.learn.checkpoint import latest_checkpoint, load_checkpoint
from rlpipe.learn.learner import Learner
from rlpipe.learn.saver import Saver
from rlpipe.policy.janus import JanusPolicy
from tests.learn.builders import config, item, with_logprobs

TOTAL = 10


def build(path: Path, rank: int, world_size: int) -> Learner:
    return Learner(config(path, micro_batch=2, eps=1e-3), rank, world_size)


def steps(learner: Learner, path: Path, numbers: range) -> list[dict]:
    policy = JanusPolicy.load(path)
    items = with_logprobs(policy, [item(policy, i, 1 + i % 3) for i in range(5)])
    # The second rank has fewer than the first.
    mine = items if learner.world_size == 1 else items[:3] if learner.rank == 0 else items[3:]
    return [learner.step(mine, 15.0, step, TOTAL, fresh=False) for step in numbers]


def train(path: Path, out: Path, rank: int = 0, world_size: int = 1) -> None:
    """Two steps, a checkpoint in the background, two steps meanwhile; leaves checkpoints/ and metrics.pt."""
    learner = build(path, rank, world_size)
    saver = Saver(learner, "always", 60)
    metrics = steps(learner, path, range(2))
    saver.save(out / "checkpoints", 2, {})
    metrics += steps(learner, path, range(2, 4))
    assert saver.ended(wait=True).error is None
    saver.close()
    if rank == 0:
        torch.save(metrics, out / "metrics.pt")


def resumed_metrics(path: Path, out: Path, rank: int = 0, world_size: int = 1) -> list[dict]:
    """The third and fourth step, from the checkpoint that `train` has left."""
    learner = build(path, rank, world_size)
    load_checkpoint(latest_checkpoint(out / "checkpoints"), learner)
    return steps(learner, path, range(2, 4))


def rank_main(rank: int, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    train(path, out / "two", rank, 2)
    metrics = resumed_metrics(path, out / "one", rank, 2)
    if rank == 0:
        torch.save(metrics, out / "resumed.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (Path(sys.argv[1]), Path(sys.argv[2])), nprocs=2)
