"""One actor of a set: its calls, each with a timeout, and how busy they keep it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import ObjectRef, ObjectRefGenerator
from ray.actor import ActorHandle
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError


class ActorHangs(RuntimeError):
    """Raised by an actor whose work does not return: only another process can go on."""


LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, TimeoutError, ActorHangs)
"""What a call raises when its actor is gone or hangs, as against an error of the actor's own code."""

Take = Callable[[Any, ObjectRef], None]
"""Called with each record of a stream and the reference to the object that the record is about."""


class Replica:
    """One actor of a pool; `handle` changes when it is replaced.

    free:   calls that it may be sent now.
    losses: actors in a row that were lost, without any call that succeeded in between.
    given_up: why its pool goes on without it.
    """

    def __init__(self, role: str, index: int) -> None:
        self.name = f"{role}[{index}]"
        self.index = index
        self.handle: ActorHandle | None = None
        self.free = 0
        self.losses = 0
        self.given_up: BaseException | None = None
        self.revival: asyncio.Task | None = None
        self._busy_s = 0.0
        self._under_way, self._busy_since = 0, 0.0

    async def ask(self, method: str, *args: Any, timeout_s: float, num_returns: int = 1) -> Any:
        """The value of one call. With several returns: the first one's value, then references to the others."""
        remote = getattr(self.handle, method)
        if num_returns > 1:
            remote = remote.options(num_returns=num_returns)
        with self._busy():
            refs = remote.remote(*args)
            first = await self._within(refs[0] if num_returns > 1 else refs, method, timeout_s)
        return (first, *refs[1:]) if num_returns > 1 else first

    async def follow(self, method: str, *args: Any, timeout_s: float, take: Take, threads: ThreadPoolExecutor) -> None:
        """One call of a method that yields, in turn, an object and a small record about it, to the end.

        The record comes second, so that whoever has it knows that the object is there. No object is fetched.
        """
        with self._busy():
            items = getattr(self.handle, method).options(num_returns="streaming").remote(*args)
            await self._within(_pairs(items, take, threads), method, timeout_s)

    async def _within(self, answer: Awaitable, method: str, timeout_s: float) -> Any:
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, ActorHangs):
                raise error.cause from None
            raise
        except TimeoutError:
            raise TimeoutError(f"{self.name}.{method}: no answer within {timeout_s:g} s") from None

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        if not self._under_way:
            self._busy_since = time.monotonic()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._busy_s += time.monotonic() - self._busy_since

    def busy_s(self) -> float:
        """Seconds so far in which it had at least one call to answer."""
        return self._busy_s + (time.monotonic() - self._busy_since if self._under_way else 0.0)


async def _pairs(items: ObjectRefGenerator, take: Take, threads: ThreadPoolExecutor) -> None:
    """Hand on the pairs of a stream. An error comes in the place of an item and ends the stream."""
    loop = asyncio.get_running_loop()

    async def following() -> ObjectRef | None:
        # Awaiting the stream itself would fetch every object to this process; `next` only waits for it.
        return await loop.run_in_executor(threads, next, items, None)

    while (reference := await following()) is not None:
        record = await following()
        take(await (reference if record is None else record), reference)
