"""A job that is cut into shards: several under way at a time, and an end when a person asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator

from roles.trainer import Stopped


async def in_lanes(lane: Callable[[], Awaitable[None]], count: int) -> None:
    """Run `count` of the same loop at once, each of which takes the next shard; the first error ends all of them."""
    tasks = [asyncio.ensure_future(lane()) for _ in range(count)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within: SIGTERM and ctrl-C end the job with Stopped; shards that are not finished are made again."""
    loop, task, stopped = asyncio.get_running_loop(), asyncio.current_task(), []

    def stop(signum: int) -> None:
        stopped.append(signum)
        task.cancel()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop, signum)
    try:
        yield
    except asyncio.CancelledError:
        if stopped:
            raise Stopped(stopped[0]) from None
        raise
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
