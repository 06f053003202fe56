"""Killing actors so that a test goes on only when they are gone."""

from __future__ import annotations

import asyncio

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError


async def kill(handle: ActorHandle) -> None:
    """`ray.kill` only asks for the end: until it comes, the actor may still answer."""
    ray.kill(handle)
    while True:
        try:
            await handle.ready.remote()
        except RayActorError:
            return
        await asyncio.sleep(0.02)
