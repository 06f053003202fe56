"""Calling a set of equal actors: by name, with a timeout, with replacement of those that die.

The driver (one asyncio loop) sees no Ray errors from here but `RoleError`, which names the role, the replica, the call
and the last cause. Exceptions that an actor's own code raises come through unchanged: they are bugs or bad input, and
asking again would not help.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from roles.replica import LOST, Replica, Take

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0


class RoleError(RuntimeError):
    """A role that cannot do its work any more; the message names it and its last error."""


class ActorPool:
    """`size` replicas of one actor class, each doing up to `slots` calls at once for whoever asks.

    role:     its name in errors and metrics.
    create:   makes the actor of a replica index; the class has a method `ready()`, answered once it can work.
    on_start: awaited with each replica that starts or starts again, before it gets any work.
    failures: losses in a row after which a replica is given up; the pool goes on with those that are left.
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
        slots: int = 1,
        start_timeout_s: float = 600.0,
        failures: int = 8,
        attempts: int = 4,
        on_start: Callable[[Replica], Awaitable[None]] | None = None,
    ) -> None:
        self.role = role
        self.replicas = [Replica(role, i) for i in range(size)]
        self.restarts = 0
        self.retries = 0
        self.given_up = 0
        self.on_start = on_start
        self._create, self._slots, self._start_timeout_s = create, slots, start_timeout_s
        self._failures, self._attempts = failures, attempts
        self._waiting: deque[asyncio.Future[tuple[Replica, ActorHandle]]] = deque()
        self._broken: asyncio.Future | None = None
        # A stream that is abandoned keeps its thread until its actor has ended.
        self._threads = ThreadPoolExecutor(2 * size * slots, thread_name_prefix=role)
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
        limits = {"timeout_s": timeout_s, "num_returns": num_returns}
        return await self._anywhere(method, lambda r: r.ask(method, *before(r), *args, **limits))

    async def stream(
        self,
        method: str,
        *args: Any,
        timeout_s: float,
        begin: Callable[[], Take],
        before: Callable[[Replica], tuple] = lambda replica: (),
    ) -> None:
        """As `call`, of a method that yields, in turn, an object and a record about it; `timeout_s` is of all of it.

        begin: called whenever the stream starts, again after a loss; what it returns is called with each record and
               the reference to its object as they come.
        """

        def follow(replica: Replica) -> Awaitable[None]:
            every = (*before(replica), *args)
            return replica.follow(method, *every, timeout_s=timeout_s, take=begin(), threads=self._threads)

        await self._anywhere(method, follow)

    async def _anywhere(self, method: str, ask: Callable[[Replica], Awaitable[Any]]) -> Any:
        for attempt in range(1, self._attempts + 1):
            replica = await self._place(method)
            handle = replica.handle
            try:
                result = await ask(replica)
            except RayTaskError:
                self._release(replica, handle)
                raise
            except LOST as error:
                self.revive_later(replica, handle, error)
                if attempt == self._attempts:
                    message = f"{self.role}.{method}: lost {attempt} times; last: {_line(error)}"
                    raise RoleError(message) from error
                self.retries += 1
            except BaseException:
                # Cancelled: it still does what nobody waits for; who comes next stands in line behind that.
                self._release(replica, handle)
                raise
            else:
                replica.losses = 0
                self._release(replica, handle)
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
        self._revival(replica, lost, error)

    async def revive(
        self, replica: Replica, lost: ActorHandle | None = None, error: BaseException | None = None
    ) -> None:
        """(Re)create a replica, bring it up to date and let it serve; whoever asks meanwhile waits for the same.

        lost: the actor that `error` came from; one that has been replaced since is not replaced once more.
        Raises why, if the replica is given up.
        """
        if replica.given_up is not None:
            raise replica.given_up
        revival = self._revival(replica, lost, error)
        if revival is not None:
            await asyncio.shield(revival)

    def _revival(self, replica: Replica, lost: ActorHandle | None, error: BaseException | None) -> asyncio.Task | None:
        """The revival under way, begun here unless `lost` has been replaced since; from now on it gets no work."""
        if replica.revival is None and replica.handle is lost and replica.given_up is None:
            replica.free = 0
            replica.revival = asyncio.ensure_future(self._revive(replica, error))
            replica.revival.add_done_callback(_mark_read)
        return replica.revival

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
                self._give_up(replica, fatal)
            raise
        finally:
            replica.revival = None
        replica.free = self._slots
        self._hand_out()

    def _give_up(self, replica: Replica, error: BaseException) -> None:
        """Go on without a replica; without any, every call of this pool raises `error` from now on."""
        replica.given_up = error
        self.given_up += 1
        self.replicas.remove(replica)
        self._read_busy_s -= replica.busy_s()
        _end(replica.handle)
        if not self.replicas:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """From now on every call of this pool raises `error`."""
        if not self._broken.done():
            self._broken.set_exception(error)
            _mark_read(self._broken)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(error)
        self._waiting.clear()

    async def _count_loss(self, replica: Replica, error: BaseException) -> None:
        """One more loss: the old actor is ended, and after a pause that grows the next one may be made."""
        self.restarts += 1
        replica.losses += 1
        _end(replica.handle)
        if replica.losses > self._failures:
            raise RoleError(f"{replica.name}: {replica.losses} losses in a row; last: {_line(error)}") from error
        await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (replica.losses - 1), LONGEST_PAUSE_S))

    async def _place(self, method: str) -> Replica:
        """Wait, in line, for a replica that can take a call: all are at work under a timeout or being revived."""
        if self._broken is None:
            raise RoleError(f"{self.role}.{method}: the pool was not started")
        while not self._broken.done():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            self._hand_out()
            try:
                replica, handle = await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                    # It was handed a place in the very moment.
                    self._release(*waiter.result())
                raise
            if self._serves(replica, handle):
                return replica
        return self._broken.result()

    def _hand_out(self) -> None:
        """Give free places to those that wait, in their order, at the replica with most of them."""
        while self._waiting:
            replica = max(self.replicas, key=lambda r: r.free, default=None)
            if replica is None or not replica.free:
                return
            waiter = self._waiting.popleft()
            if not waiter.done():
                replica.free -= 1
                waiter.set_result((replica, replica.handle))

    def _release(self, replica: Replica, handle: ActorHandle) -> None:
        """A call has ended; the places of an actor that is lost are lost with it."""
        if self._serves(replica, handle):
            replica.free += 1
            self._hand_out()

    def _serves(self, replica: Replica, handle: ActorHandle) -> bool:
        return replica.handle is handle and replica.revival is None and replica.given_up is None

    def idle_share(self) -> float:
        """Share of the time since the last reading in which the replicas waited for work."""
        now, busy_s = time.monotonic(), sum(r.busy_s() for r in self.replicas)
        elapsed = max(now - self._read_at, 1e-9) * max(len(self.replicas), 1)
        share = 1.0 - (busy_s - self._read_busy_s) / elapsed
        self._read_at, self._read_busy_s = now, busy_s
        return min(max(share, 0.0), 1.0)

    def counts(self) -> dict[str, float]:
        """What went wrong so far, as metrics."""
        return {
            f"failures/{self.role}/restarts": self.restarts,
            f"failures/{self.role}/retries": self.retries,
            f"failures/{self.role}/given_up": self.given_up,
        }

    def close(self) -> None:
        """End all actors."""
        for replica in self.replicas:
            if replica.revival is not None:
                replica.revival.cancel()
            _end(replica.handle)
        self._threads.shutdown(wait=False)


def _end(handle: ActorHandle | None) -> None:
    if handle is not None:
        with contextlib.suppress(Exception):
            ray.kill(handle, no_restart=True)


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
