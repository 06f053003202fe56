"""A learner of random weights and workers that hold them, in modules that an actor imports in no time."""

from __future__ import annotations

import asyncio
import os
import time

import numpy as np
import ray
import torch

from roles.group import ActorPool
from roles.weight_sync import WeightSync
from roles.weights import Publisher, Receiver
from roles.work import Ack, Channel, Invitation, Manifest


def weights_of(version: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(version)
    shapes = {"a": (5, 3), "b": (), "c": (300, 70), "d": (64,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in weights_of(0).items()}


class Source:
    """A learner that publishes random weights."""

    def __init__(self) -> None:
        self.publisher = Publisher(None, 1000)

    def publish(self, version: int, channel: Channel | None) -> Manifest:
        return self.publisher.publish(weights_of(version).items(), version, channel)

    def share(self) -> Manifest:
        return self.publisher.share()


class Deadly(dict):
    """A model whose process ends when tensor d is to be written, or hangs."""

    def __init__(self, *args, hangs: bool) -> None:
        super().__init__(*args)
        self.hangs = hangs

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == "d" and self.hangs:
            time.sleep(60)
        elif name == "d":
            os._exit(1)
        return super().__getitem__(name)


class Holder:
    """Holds weights as a rollout worker does."""

    def __init__(self, fate: str = "") -> None:
        self.model = Deadly(blank(), hangs=fate == "hangs") if fate else blank()
        self.receiver, self.ack = Receiver(20.0), None

    def ready(self) -> None:
        pass

    def load_weights(self, source: Manifest | Invitation) -> Ack:
        self.ack = self.receiver.take(source, self.model)
        return self.ack

    def held(self) -> tuple[Ack, dict[str, np.ndarray]]:
        return self.ack, {name: tensor.numpy() for name, tensor in self.model.items()}


class Crew:
    """Two holders, of which the first one's first process may have a fate, and their learner."""

    def __init__(self, fate: str = "", timeout_s: float = 20.0, size: int = 2, **options) -> None:
        holder = ray.remote(Holder).options(num_cpus=0.1)
        fates = [fate]
        self.pool = ActorPool(
            "rollout", lambda i: holder.remote(fates.pop() if i == 0 and fates else ""), size, **options
        )
        self.learner = ray.remote(Source).options(num_cpus=0.1).remote()
        self.sync = WeightSync(self.pool, timeout_s, "gloo", lambda: self.learner)

    async def update(self, version: int) -> Channel | None:
        channel = self.sync.invite(version)
        await self.sync.send(await self.learner.publish.remote(version, channel))
        return channel

    async def check(self, version: int, as_asked: list[bool]) -> None:
        """Whether all hold a version, bit for bit, and got it as they were to."""
        held = await self.pool.broadcast("held", timeout_s=20)
        assert [(ack.version, ack.as_asked) for ack, _ in held] == [(version, asked) for asked in as_asked]
        for _, model in held:
            assert all(np.array_equal(model[name], t.numpy()) for name, t in weights_of(version).items())
        assert [self.sync.version_of(replica) for replica in self.pool.replicas] == [version] * len(held)

    def run(self, scenario) -> None:
        async def within() -> None:
            await self.pool.start()
            await scenario()

        try:
            asyncio.run(asyncio.wait_for(within(), 280))
        finally:
            self.pool.close()
            ray.kill(self.learner)
