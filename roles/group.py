"""Calling a set of equal actors: by name, with a timeout, with replacement of those that die.

The driver (one asyncio loop) sees no Ray errors from here but `RoleError`, which names the role, the replica, the call
and the last cause. Exceptions that an actor's own code raises come through unchanged: they are bugs or bad input, and
asking again would not help.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, TimeoutError)
"""What a call raises when its actor is gone or hangs, as against an error of the actor's own code."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0


class RoleError(RuntimeError):
    """A role that cannot do its work any more; the message names it and its last error."""


class Replica:
    """One actor of a pool; `handle` changes when it is replaced."""

    def __init__(self, role: str, index: int) -> None:
        self.name = f"{role}[{index}]"
        self.index = index
        self.handle: ActorHandle | None = None
        self.busy_s = 0.0
        self.queued = False
        self.revival: asyncio.Task | None = None

    async def ask(self, method: str, *args: Any, timeout_s: float, num_returns: int = 1) -> Any:
        """The value of one call. With several returns: the first one's value, then references to the others."""
        started = time.monotonic()
        remote = getattr(self.handle, method)
        if num_returns > 1:
            remote = remote.options(num_returns=num_returns)
        refs = remote.remote(*args)
        try:
            first = await asyncio.wait_for(refs[0] if num_returns > 1 else refs, timeout_s)
        except RayTaskError:
            raise
        except TimeoutError:
            raise TimeoutError(f"{self.name}.{method}: no answer within {timeout_s:g} s") from None
        finally:
            self.busy_s += time.monotonic() - started
        return (first, *refs[1:]) if num_returns > 1 else first


class ActorPool:
    """`size` replicas of one actor class, each doing one call at a time for whoever asks.

    role:     its name in errors and metrics.
    create:   makes the actor of a replica index; the class has a method `ready()`, answered once it can work.
    on_start: awaited with each replica that starts or starts again, before it gets any work.
    failures: losses in a row, without any call that succeeds in between, after which the pool gives up.
    attempts: times that one call may be sent; more losses than that point to the call, not to the machines.

        pool = ActorPool("rollout", create, size=2)
        await pool.start()
        record, group = await pool.call("generate", work, timeout_s=600, num_returns=2)
    """

    def __init__(
        self,
        role: str,
        create: Callable[[int], ActorHandle],
        size: int = 1,
        *,
        start_timeout_s: float = 600.0,
        failures: int = 8,
        attempts: int = 4,
        on_start: Callable[[Replica], Awaitable[None]] | None = None,
    ) -> None:
        self.role = role
        self.replicas = [Replica(role, i) for i in range(size)]
        self.restarts = 0
        self.retries = 0
        self.on_start = on_start
        self._create, self._start_timeout_s = create, start_timeout_s
        self._failures, self._attempts = failures, attempts
        self._losses_in_a_row = 0
        self._free: asyncio.Queue[Replica] = asyncio.Queue()
        self._broken: asyncio.Future | None = None
        self._read_at, self._read_busy_s = time.monotonic(), 0.0

    async def start(self) -> None:
        """Create all replicas and wait until each is ready; a pool that has been started stays as it is."""
        if self._broken is not None:
            return
        self._broken = asyncio.get_running_loop().create_future()
        await asyncio.gather(*(self.revive(replica) for replica in self.replicas))
        self._read_at = time.monotonic()

    async def call(
        self,
        method: str,
        *args: Any,
        timeout_s: float,
        num_returns: int = 1,
        before: Callable[[Replica], tuple] = lambda replica: (),
    ) -> Any:
        """Ask whichever replica is free first; asked again elsewhere if that one is lost. One result, or an error.

        before: further arguments, in front of `args`, that depend on the replica.
        """
        for attempt in range(1, self._attempts + 1):
            replica = await self._next_free(method)
            handle = replica.handle
            try:
                every = (*before(replica), *args)
                result = await replica.ask(method, *every, timeout_s=timeout_s, num_returns=num_returns)
            except RayTaskError:
                self._release(replica)
                raise
            except LOST as error:
                if attempt == self._attempts:
                    self.revive_later(replica, handle, error)
                    message = f"{self.role}.{method}: lost {attempt} times; last: {_line(error)}"
                    raise RoleError(message) from error
                self.retries += 1
                self.revive_later(replica, handle, error)
            except BaseException:
                # Cancelled: it still does what nobody waits for; who comes next stands in line behind that.
                self._release(replica)
                raise
            else:
                self._losses_in_a_row = 0
                self._release(replica)
                return result
        raise AssertionError("unreachable")

    async def broadcast(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Ask every replica at once, in its turn behind the work it has; a lost one breaks the pool."""
        return await self.gather(method, [args] * len(self.replicas), timeout_s)

    async def gather(self, method: str, arguments: Sequence[tuple], timeout_s: float) -> list[Any]:
        """Ask the first so many replicas, each with arguments of its own; a lost one breaks the pool."""
        if self._broken.done():
            self._broken.result()
        pairs = zip(self.replicas, arguments, strict=False)
        try:
            return await asyncio.gather(*(r.ask(method, *args, timeout_s=timeout_s) for r, args in pairs))
        except RayTaskError:
            raise
        except LOST as error:
            broken = RoleError(f"{self.role}.{method}: {_line(error)}")
            broken.__cause__ = error
            self._break(broken)
            raise broken from error

    def revive_later(self, replica: Replica, lost: ActorHandle, error: BaseException) -> None:
        """Replace a lost replica in the background; it serves again when it is ready."""
        task = asyncio.ensure_future(self.revive(replica, lost, error))
        task.add_done_callback(_mark_read)

    async def revive(
        self, replica: Replica, lost: ActorHandle | None = None, error: BaseException | None = None
    ) -> None:
        """(Re)create a replica, bring it up to date and let it serve; whoever asks meanwhile waits for the same.

        lost: the actor that `error` came from; one that has been replaced since is not replaced once more.
        """
        if replica.revival is None:
            if replica.handle is not lost:
                return
            replica.revival = asyncio.ensure_future(self._revive(replica, error))
        await asyncio.shield(replica.revival)

    async def _revive(self, replica: Replica, error: BaseException | None) -> None:
        try:
            while True:
                if error is not None:
                    await self._count_loss(replica, error)
                try:
                    replica.handle = self._create(replica.index)
                    await replica.ask("ready", timeout_s=self._start_timeout_s)
                    if self.on_start is not None:
                        await self.on_start(replica)
                    break
                except RayTaskError:
                    raise
                except LOST as lost:
                    if getattr(lost, "actor_init_failed", False):
                        raise RoleError(f"{replica.name} did not start: {_last_line(lost)}") from lost
                    error = lost
        except BaseException as fatal:
            if not isinstance(fatal, asyncio.CancelledError):
                self._break(fatal)
            raise
        finally:
            replica.revival = None
        self._release(replica)

    def _break(self, error: BaseException) -> None:
        """From now on every call of this pool raises `error`."""
        if not self._broken.done():
            self._broken.set_exception(error)
            _mark_read(self._broken)

    def _release(self, replica: Replica) -> None:
        if not replica.queued:
            replica.queued = True
            self._free.put_nowait(replica)

    async def _count_loss(self, replica: Replica, error: BaseException) -> None:
        """One more loss: the old actor is ended, and after a pause that grows the next one may be made."""
        self.restarts += 1
        self._losses_in_a_row += 1
        with contextlib.suppress(Exception):
            ray.kill(replica.handle, no_restart=True)
        if self._losses_in_a_row > self._failures:
            raise RoleError(f"{replica.name}: {self._losses_in_a_row} losses in a row; last: {_line(error)}") from error
        await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (self._losses_in_a_row - 1), LONGEST_PAUSE_S))

    async def _next_free(self, method: str) -> Replica:
        """Wait for a replica; every one of them is either at work under a timeout or being revived."""
        if self._broken is None:
            raise RoleError(f"{self.role}.{method}: the pool was not started")
        while not self._broken.done():
            getter = asyncio.ensure_future(self._free.get())
            try:
                await asyncio.wait({getter, self._broken}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not getter.done():
                    getter.cancel()
            if getter.done() and not getter.cancelled():
                replica = getter.result()
                replica.queued = False
                if replica.revival is None:
                    return replica
        return self._broken.result()

    def idle_share(self) -> float:
        """Share of the time since the last reading in which the replicas waited for work."""
        now, busy_s = time.monotonic(), sum(r.busy_s for r in self.replicas)
        elapsed = max(now - self._read_at, 1e-9) * len(self.replicas)
        share = 1.0 - (busy_s - self._read_busy_s) / elapsed
        self._read_at, self._read_busy_s = now, busy_s
        return min(max(share, 0.0), 1.0)

    def counts(self) -> dict[str, float]:
        """What went wrong so far, as metrics."""
        return {
            f"failures/{self.role}/restarts": self.restarts,
            f"failures/{self.role}/retries": self.retries,
        }

    def close(self) -> None:
        """End all actors."""
        for replica in self.replicas:
            if replica.revival is not None:
                replica.revival.cancel()
            if replica.handle is not None:
                with contextlib.suppress(Exception):
                    ray.kill(replica.handle, no_restart=True)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _last_line(error: BaseException) -> str:
    """The last line of an actor's own traceback is the error that its constructor raised."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _mark_read(future: asyncio.Future) -> None:
    """Whoever waits for the pool gets the error; nobody needs a second message about an unread one."""
    if not future.cancelled():
        future.exception()
