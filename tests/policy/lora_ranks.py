"""What one rank of a two-rank learner with adapters does in the tests; runs in a process of its own."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlpipe.learn.learner import Learner
from rlpipe.policy.janus import JanusPolicy
from tests.policy.test_lora import lora_config, train


def rank_main(rank: int, path: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for dtype, own_reference in product(("float32", "bfloat16"), (False, True)):
        learner = Learner(lora_config(path, dtype), rank, 2)
        metrics = train(learner, JanusPolicy.load(path), slice(0, 4) if rank == 0 else slice(4, 5), 2, own_reference)
        weights = learner.weights()
        if rank == 0:
            torch.save({"metrics": metrics, "weights": weights}, out / f"{dtype}_{own_reference}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(rank_main, (Path(sys.argv[1]), Path(sys.argv[2])), nprocs=2)
