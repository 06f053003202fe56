"""A rank of the learner: assembles its share of a batch from references, steps, publishes, saves."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from ray import ObjectRef

from rlpipe.config import Config
from rlpipe.learn.checkpoint import load_checkpoint
from rlpipe.learn.learner import Learner
from rlpipe.learn.packing import balance, rough_tokens
from rlpipe.learn.saver import Saved, Saver
from rlpipe.policy.adapter import save_adapter
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import add_adapters, merged_weights
from rlpipe.types import Rollout, TrainItem
from roles.weights import Publisher, publish
from roles.work import Channel, Manifest, Share


class LearnerActor:
    """One of `world_size` ranks; every method but `rendezvous` is called on all ranks at the same time.

    ranks = [ray.remote(LearnerActor).remote(config, rank, 2) for rank in range(2)]
    address = await ranks[0].rendezvous.remote()
    await asyncio.gather(*(rank.start.remote(address) for rank in ranks))
    """

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1) -> None:
        torch.set_num_threads(config.learner.threads)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.learner: Learner | None = None
        self.saver: Saver | None = None
        self.items: list[TrainItem] = []
        self.publisher = Publisher(getattr(torch, config.policy.dtype), config.sync.bucket_mib << 20)

    def ready(self) -> int:
        return self.rank

    def rendezvous(self) -> str:
        """Where the ranks of this learner meet: this node's address with a free port."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def start(self, address: str) -> int:
        """Join the process group (if there are other ranks) and load the policy; returns its policy version."""
        if self.saver is not None:
            self.saver.close()
        if self.world_size > 1:
            if address.startswith("127."):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.config.learner.num_gpus > 0 and torch.cuda.is_available() else "gloo",
                init_method=f"tcp://{address}",
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.config.learner.timeout_s),
            )
        self.learner = Learner(self.config, self.rank, self.world_size)
        self.saver = Saver(self.learner, self.config.train.checkpoint_async, self.config.learner.timeout_s)
        return self.learner.policy_version

    def assemble(self, shares: list[Share]) -> float:
        """Fetch this rank's part of a batch and hold it for `step`; returns seconds.

        Raises Ray's ObjectLostError if a group is gone; nothing has been trained then.
        """
        started = time.monotonic()
        timeout = self.config.learner.timeout_s
        self.items = []
        for share in shares:
            rollouts: tuple[Rollout, ...] = ray.get(share.rollouts, timeout=timeout)
            logprobs = [()] * len(rollouts)
            if share.ref_logprobs is not None:
                logprobs = ray.get(share.ref_logprobs, timeout=timeout)
            for rollout, credits, reference in zip(rollouts, share.credits, logprobs, strict=True):
                if credits is not None:
                    self.items.append(TrainItem(rollout.trajectory, rollout.images, credits, tuple(reference)))
        return time.monotonic() - started

    def assemble_items(self, items: list[ObjectRef], count: int) -> float:
        """Fetch a batch of ready-made items (one reference in a list, `count` items) and keep this rank's part."""
        started = time.monotonic()
        batch: list[TrainItem] = ray.get(items[0], timeout=self.config.learner.timeout_s)
        tokens = [rough_tokens(item, self.learner.options) for item in batch]
        self.items = [batch[index] for index in balance(tokens, self.world_size)[self.rank]]
        return time.monotonic() - started

    def step(
        self,
        denominator: float,
        step: int,
        total_steps: int,
        fresh: bool,
        lr_scale: float = 1.0,
        kl_scale: float = 1.0,
        entropy_weights: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """One optimiser step on the batch that was assembled; the metrics of all ranks together, and seconds.

        Raises LearnerError, with the weights untouched, if the step is refused.
        """
        started = time.monotonic()
        items, self.items = self.items, []
        scales = (lr_scale, kl_scale, entropy_weights)
        metrics = self.learner.step(items, denominator, step, total_steps, fresh, *scales)
        return {**metrics, "time/learn": time.monotonic() - started}

    def publish(self, version: int, channel: Channel | None = None) -> Manifest | None:
        """Put the weights, in the compute type, into the object store or on their way by a channel.

        The manifest on rank 0, None on others.
        """
        weights = self.learner.whole_weights()
        if self.rank == 0:
            return self.publisher.publish(weights, version, channel)
        for _ in weights:
            pass
        return None

    def share(self) -> Manifest:
        """What was published last, in the object store (rank 0 alone)."""
        return self.publisher.share()

    def publish_initial(self, version: int) -> Manifest | None:
        """Put what is trained, as it was before any step, into the object store (rank 0)."""
        if self.rank != 0:
            return None
        dtype, section = getattr(torch, self.config.policy.dtype), self.config.policy
        policy = JanusPolicy.from_config(self.config, dtype)
        if section.lora.path is None:
            parameters = dict(policy.janus.named_parameters())
            return publish({name: parameters[name] for name in self.learner.weight_names()}, version)
        add_adapters(policy, section)
        return publish({name: tensor.to(dtype) for name, tensor in merged_weights(policy)}, version)

    def save(self, checkpoints: str, step: int, driver: dict) -> None:
        """Begin the checkpoint of a step, with the driver's state; `saved` tells how it ends."""
        if step != self.learner.policy_version:
            raise RuntimeError(f"checkpoint: asked for step {step}, the learner is at {self.learner.policy_version}")
        self.saver.save(checkpoints, step, driver)

    def saved(self, wait: bool) -> Saved | None:
        """How the last save ended, once; None while it is under way (and nobody waits) or if there is none."""
        return self.saver.ended(wait)

    def load(self, folder: str) -> dict:
        """Restore a checkpoint, whatever number of ranks wrote it; returns the driver's state."""
        return load_checkpoint(folder, self.learner)

    def export(self, folder: str) -> None:
        """Write the whole policy in the transformers layout (rank 0)."""
        dtype = getattr(torch, self.config.policy.dtype)
        weights = self.learner.weights(dtype)
        if self.rank == 0:
            policy = JanusPolicy.from_config(self.config, dtype)
            parameters = dict(policy.janus.named_parameters())
            with torch.no_grad():
                for name, tensor in weights.items():
                    parameters[name].copy_(tensor)
            policy.save(folder)

    def export_adapter(self, folder: str) -> None:
        """Write the adapters in peft's format (rank 0)."""
        tensors = {name: self.learner.strategy.whole(p) for name, p in self.learner.parameters.items()}
        if self.rank == 0:
            save_adapter(folder, tensors, self.config.policy)

    def stop(self) -> None:
        """Leave the process group."""
        self.saver.close()
        if self.world_size > 1:
            dist.destroy_process_group()
