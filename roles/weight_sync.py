"""The driver's side of the weights' way: every worker holds and has acknowledged a version before it works with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from roles.buckets import WeightError
from roles.channel import Meeting
from roles.group import ActorPool, RoleError
from roles.replica import LOST, Replica
from roles.work import Ack, Channel, Invitation, Manifest


class WeightSync:
    """Brings every worker to a version; `version` is the last that all have acknowledged.

    `fallbacks` counts the times that a worker's channel broke and it turned to the object store.

    Hooks itself into the pool, so that a worker that starts again gets the current weights before any work.

        sync = WeightSync(pool, timeout_s=600)
        await sync.send(manifest)             # every worker has acknowledged

    By a channel, workers receive while the learner publishes:

        sync = WeightSync(pool, timeout_s=600, transport="gloo", learner=lambda: handle)
        channel = sync.invite(version)
        manifest = await handle.publish.remote(version, channel)
        await sync.send(manifest)
    """

    def __init__(
        self,
        pool: ActorPool,
        timeout_s: float,
        transport: str = "object_store",
        learner: Callable[[], ActorHandle] | None = None,
    ) -> None:
        """learner: the actor of its first rank; needed where weights go by a channel (transport gloo or nccl)."""
        self.pool, self.timeout_s = pool, timeout_s
        self.transport, self.learner = transport, learner
        self.manifest: Manifest | None = None
        self.version = -1
        self.fallbacks = 0
        self.held: dict[int, int] = {}
        self._meeting: Meeting | None = None
        self._channel: tuple[Channel, list[ActorHandle]] | None = None
        self._invited: dict[int, tuple[ActorHandle, asyncio.Task[Ack]]] = {}
        pool.on_start = self._greet

    def version_of(self, replica: Replica) -> int:
        """The version that work sent to this replica now will meet: calls are served in the order they are sent."""
        return self.held.get(replica.index, -1)

    def invite(self, version: int) -> Channel | None:
        """Have the workers wait for a version on the channel that is returned; None: it goes by the object store.

        The channel is that of the version before, unless it broke or a worker has come or gone since.
        """
        replicas = [replica for replica in self.pool.replicas if replica.revival is None]
        if self.transport == "object_store" or not replicas:
            return None
        handles = [replica.handle for replica in replicas]
        if self._channel is None or self._channel[1] != handles:
            if self._meeting is None:
                self._meeting = Meeting(self.timeout_s)
            self._channel = self._meeting.open(1 + len(handles), self.transport, self.learner()), handles
        channel = self._channel[0]
        for rank, replica in enumerate(replicas, 1):
            task = asyncio.ensure_future(self._receive(replica, Invitation(channel, rank, version)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._invited[replica.index] = (replica.handle, task)
        return channel

    async def send(self, manifest: Manifest) -> None:
        """Until every worker holds a version; raises RoleError naming those that did not acknowledge in time."""
        self.manifest = manifest
        replicas = list(self.pool.replicas)
        results = await asyncio.gather(*map(self._bring_up, replicas), return_exceptions=True)
        self._invited.clear()
        # The pool goes on without a replica that it has given up, as long as there is another.
        left = self.pool.replicas
        pairs = zip(replicas, results, strict=True)
        failed = [(r.name, e) for r, e in pairs if e is not None and (r in left or not left)]
        if failed:
            names = ", ".join(name for name, _ in failed)
            cause = failed[0][1]
            raise RoleError(f"weights version {manifest.version}: no acknowledgement from {names}; {cause}") from cause
        self.version = manifest.version

    async def _bring_up(self, replica: Replica) -> None:
        """Until this replica holds the current version: load it, or wait for its successor, which loads it first."""
        if replica.index in self._invited:
            handle, receiving = self._invited[replica.index]
            try:
                self._check(replica, await receiving, self.manifest)
            except RayTaskError:
                raise
            except LOST as error:
                await self.pool.revive(replica, handle, error)
        while self.held.get(replica.index) != self.manifest.version or replica.revival is not None:
            if replica.revival is not None:
                await self.pool.revive(replica)
                continue
            handle = replica.handle
            try:
                await self._load(replica)
            except RayTaskError:
                raise
            except LOST as error:
                await self.pool.revive(replica, handle, error)

    async def _greet(self, replica: Replica) -> None:
        self.held.pop(replica.index, None)
        while self.manifest is not None and self.held.get(replica.index) != self.manifest.version:
            await self._load(replica)

    async def _receive(self, replica: Replica, invitation: Invitation) -> Ack:
        """One worker's acknowledgement of what comes by a channel; if it is lost, the others need not wait for it."""
        handle = replica.handle
        self.held[replica.index] = invitation.version
        try:
            # Twice the wait: for the channel, and for the object store if that broke.
            ack = await replica.ask("load_weights", invitation, timeout_s=2 * self.timeout_s)
        except BaseException:
            if replica.handle is handle:
                self.held.pop(replica.index, None)
            self._end(invitation.channel)
            raise
        if not ack.as_asked:
            self.fallbacks += 1
            self._end(invitation.channel)
        return ack

    def _end(self, channel: Channel) -> None:
        """This channel is of no use any more; the next version has another."""
        self._meeting.end(channel)
        if self._channel is not None and self._channel[0] is channel:
            self._channel = None

    async def _load(self, replica: Replica) -> None:
        """One worker, through the object store."""
        manifest = await self._stored()
        self.held[replica.index] = manifest.version
        try:
            ack = await replica.ask("load_weights", manifest, timeout_s=self.timeout_s)
            self._check(replica, ack, manifest)
        except BaseException:
            self.held.pop(replica.index, None)
            raise

    async def _stored(self) -> Manifest:
        """The current version in the object store; what went by a channel has to be put there."""
        if self.manifest.slots and not self.manifest.buckets:
            try:
                shared = await asyncio.wait_for(self.learner().share.remote(), self.timeout_s)
            except TimeoutError:
                raise RoleError(f"learner[0].share: no answer within {self.timeout_s:g} s") from None
            if shared.version >= self.manifest.version:
                self.manifest = shared
        return self.manifest

    def _check(self, replica: Replica, ack: Ack, manifest: Manifest) -> None:
        if (ack.version, ack.checksum) != (manifest.version, manifest.checksum):
            self.held.pop(replica.index, None)
            sent = Ack(manifest.version, manifest.checksum)
            raise WeightError(f"{replica.name} acknowledged {ack}, sent was {sent}")
