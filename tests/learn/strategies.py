"""What one rank of a two-rank learner does in the tests of its strategies; runs in a process of its own."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlpipe.learn.checkpoint import load_checkpoint, save_checkpoint
from rlpipe.learn.learner import Learner, LearnerError
from rlpipe.types import TrainItem
from tests.learn.builders import config
from tests.learn.ranks import TOTAL, batches

WHOLE_TO_NONE = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""ZeRO-3 leaves small tensors whole, which a tiny policy's all are."""
FSDP2 = {
    "fsdp2": {},
    "replicas": {"replicas": 2},
    "full": {"activation_checkpointing": "full"},
    "selective": {"activation_checkpointing": "selective"},
    "moments offloaded": {"offload": "optimizer"},
    "all offloaded": {"offload": "parameters"},
    "lora": {"lora": 4},
    "bfloat16": {"dtype": "bfloat16"},
}
ZERO = {
    "zero-1": {"zero_stage": 1},
    "zero-2": {"zero_stage": 2},
    "zero-3": {"zero_stage": 3},
    "zero-3 full": {"zero_stage": 3, "activation_checkpointing": "full"},
    "zero-2 moments offloaded": {"zero_stage": 2, "offload": "optimizer", "activation_checkpointing": "selective"},
    "zero-3 all offloaded": {"zero_stage": 3, "offload": "parameters"},
    "zero-2 lora": {"zero_stage": 2, "lora": 4},
    "zero-3 lora": {"zero_stage": 3, "lora": 4},
    "zero-2 bfloat16": {"zero_stage": 2, "dtype": "bfloat16"},
    "zero-3 bfloat16": {"zero_stage": 3, "dtype": "bfloat16"},
}
VARIANTS = FSDP2 | {name: {"strategy": "deepspeed", "deepspeed": WHOLE_TO_NONE, **v} for name, v in ZERO.items()}
STEPS = 5


def build(path: Path, variant: str, rank: int = 0, world_size: int = 1) -> Learner:
    options = dict(VARIANTS[variant])
    dtype, lora = options.pop("dtype", "float32"), options.pop("lora", 0)
    settings = config(path, micro_batch=2, eps=1e-3, ranks=world_size, **options)
    settings.policy.dtype, settings.policy.lora.rank = dtype, lora
    return Learner(settings, rank, world_size)


def items_of(path: Path, variant: str) -> list[TrainItem]:
    items = batches(path, "uneven")[0]
    # With adapters the learner finds out itself what the base thinks.
    return [replace(item, ref_logprobs=()) for item in items] if "lora" in variant else items


def train(learner: Learner, items: list[TrainItem], steps: range = range(STEPS)) -> list[dict]:
    return [learner.step(items, 15.0, step, TOTAL, fresh=step == 0) for step in steps]


def crossed(path: Path, variant: str, folder: Path, rank: int = 0, world_size: int = 1) -> dict:
    """The metrics of one step after a checkpoint that a run of any variant saved."""
    learner = build(path, variant, rank, world_size)
    load_checkpoint(folder, learner)
    return train(learner, share(items_of(path, variant), rank, world_size), range(STEPS, STEPS + 1))[0]


def share(items: list[TrainItem], rank: int, world_size: int) -> list[TrainItem]:
    """Rank 1 of two has one item against four, so that it makes up a micro-batch and lacks kinds of tokens."""
    if world_size == 1:
        return items
    return items[:4] if rank == 0 else items[4:]


def rank_main(rank: int, path: Path, out: Path, crossing: str, variants: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    for variant in variants:
        items = share(items_of(path, variant), rank, 2)
        learner = build(path, variant, rank, 2)
        record = {"refused": refused(learner, items, rank)}
        record["metrics"] = train(learner, items)
        record["weights"] = learner.weights()
        folder = save_checkpoint(out / variant, STEPS, learner, {})
        record["next"] = train(learner, items, range(STEPS, STEPS + 1))[0]
        record["resumed"] = crossed(path, variant, folder, rank, 2)
        if crossing != "None" and variant in ("zero-1", "zero-2", "zero-3"):
            record["crossed"] = crossed(path, variant, Path(crossing), rank, 2)
        torch.save(record, out / f"{variant}_{rank}.pt")
    dist.destroy_process_group()


def refused(learner: Learner, items: list[TrainItem], rank: int) -> tuple[str, bool]:
    """The reason of a refused step whose items are broken on rank 0 alone, and whether the weights are as before."""
    before = learner.weights()
    logprobs = items[0].trajectory.segments[0].logprobs
    known = logprobs.copy()
    if rank == 0:
        logprobs[0] = -float("inf")
    try:
        learner.step(items, 15.0, 0, TOTAL)
        reason = ""
    except LearnerError as error:
        reason = str(error)
    logprobs[:] = known
    after = learner.weights()
    return reason, all(torch.equal(after[name], before[name]) for name in before)


if __name__ == "__main__":
    policy, folder, checkpoint, *names = sys.argv[1:]
    mp.spawn(rank_main, (Path(policy), Path(folder), checkpoint, names), nprocs=2)
