"""A collective group of its own across the learner's first rank and the rollout workers.

It is no default group of torch.distributed: the learner is in one with its other ranks, workers are in none, and this
one has to be made anew whenever one of its members has died.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import astuple
from datetime import timedelta

import ray
import torch
from ray.actor import ActorHandle
from torch.distributed import PrefixStore, TCPStore, Work
from torch.distributed.distributed_c10d import BroadcastOptions

from roles.buckets import Bucket
from roles.work import Channel, Slot

_POLL_S = 0.005
_ENDED = "ended"


class ChannelBroken(RuntimeError):
    """A member that is gone or did not come in time; nobody can use the channel any more."""


class Meeting:
    """The driver's side: the address where channels come together, and what ends one that lacks a member."""

    def __init__(self, timeout_s: float) -> None:
        self.host, self.timeout_s = _node_address(), timeout_s
        # Bound here, because the store itself would listen on every interface.
        listener = socket.socket()
        listener.bind((self.host, 0))
        listener.listen()
        self.port = listener.getsockname()[1]
        limits = {"timeout": timedelta(seconds=timeout_s), "wait_for_workers": False}
        self._store = TCPStore(self.host, self.port, None, True, master_listen_fd=listener.detach(), **limits)
        self._count = 0

    def open(self, size: int, backend: str, learner: ActorHandle) -> Channel:
        self._count += 1
        return Channel(str(self._count), self.host, self.port, size, backend, self.timeout_s, learner)

    def end(self, channel: Channel) -> None:
        """Whoever waits for the others of this channel, or comes later, need not wait."""
        PrefixStore(channel.name, self._store).set(_ENDED, "")


class Member:
    """One rank of a channel; coming in blocks until all are there. Everything here raises ChannelBroken."""

    def __init__(self, channel: Channel, rank: int) -> None:
        self.channel = channel
        self.device = torch.device("cuda" if channel.backend == "nccl" else "cpu")
        limit = timedelta(seconds=channel.timeout_s)
        try:
            store = TCPStore(channel.host, channel.port, None, False, limit)
            store = PrefixStore(channel.name, store)
            _wait_for_all(store, channel)
            self._group = _group(channel, store, rank, limit)
        except RuntimeError as error:
            raise ChannelBroken(f"channel {channel.name}: {error}") from error
        self._memory: list[torch.Tensor] = []

    def close(self) -> None:
        """Leave: whoever waits for this rank is told that it is gone."""
        self._group.abort()
        self._group = None

    def send(self, version: int, bucket: Bucket | None) -> None:
        """From rank 0 to all: a bucket, or None behind the last one."""
        if bucket is None:
            self._whole(torch.tensor([version, -1, 0, 0], device=self.device))
            return
        rows = json.dumps([[astuple(slot) for slot in bucket.slots], bucket.sums]).encode()
        head = torch.tensor([version, bucket.number, bucket.data.numel(), len(rows)], device=self.device)
        self._whole(head)
        self._whole(torch.frombuffer(bytearray(rows), dtype=torch.uint8).to(self.device))
        data = bucket.data
        if data.device != self.device:
            data = self._room(0, data.numel()).copy_(data)
        self._whole(data)

    def receive(self, version: int) -> Iterator[Bucket]:
        """The buckets of a version as they come, each valid until the next is asked for; one is always on its way."""
        coming, number = self._begin(version, 0), 0
        while coming is not None:
            work, bucket = coming
            self._finish(work)
            number += 1
            coming = self._begin(version, number)
            yield bucket

    def _begin(self, version: int, number: int) -> tuple[Work, Bucket] | None:
        """Begin to receive a bucket: what to wait for, and the bucket; None behind the last one."""
        head = self._whole(torch.empty(4, dtype=torch.int64, device=self.device)).tolist()
        if head[:2] == [version, -1]:
            return None
        if head[:2] != [version, number]:
            raise ChannelBroken(f"bucket {head[1]} of version {head[0]} came for bucket {number} of version {version}")
        rows, sums = json.loads(
            self._whole(torch.empty(head[3], dtype=torch.uint8, device=self.device)).cpu().numpy().tobytes()
        )
        slots = tuple(Slot(name, tuple(shape), *rest) for name, shape, *rest in rows)
        data = self._room(number % 2, head[2])
        return self._broadcast(data), Bucket(number, slots, tuple(sums), data)

    def _room(self, place: int, nbytes: int) -> torch.Tensor:
        """Memory for a bucket, kept from one to the next."""
        while len(self._memory) <= place:
            self._memory.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if self._memory[place].numel() < nbytes:
            self._memory[place] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._memory[place][:nbytes]

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        self._finish(self._broadcast(tensor))
        return tensor

    def _broadcast(self, tensor: torch.Tensor) -> Work:
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            return self._group.broadcast([tensor], options)
        except RuntimeError as error:
            raise ChannelBroken(f"channel {self.channel.name}: {error}") from error

    def _finish(self, work: Work) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise ChannelBroken(f"channel {self.channel.name}: {error}") from error


def _wait_for_all(store: PrefixStore, channel: Channel) -> None:
    """Until every rank has come, so that nobody begins to connect to one that is dead."""
    store.add("here", 1)
    deadline = time.monotonic() + channel.timeout_s
    while (here := store.add("here", 0)) < channel.size:
        if store.check([_ENDED]):
            raise ChannelBroken("ended, a member is lost")
        if time.monotonic() > deadline:
            raise ChannelBroken(f"{here} of {channel.size} members came within {channel.timeout_s:g} s")
        time.sleep(_POLL_S)


def _group(
    channel: Channel, store: PrefixStore, rank: int, limit: timedelta
) -> torch.distributed.ProcessGroupGloo | torch.distributed.ProcessGroupNCCL:
    if channel.backend == "nccl":
        options = torch.distributed.ProcessGroupNCCL.Options()
        options._timeout = limit
        return torch.distributed.ProcessGroupNCCL(store, rank, channel.size, options)
    gloo = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = limit
    options._devices = [gloo.create_device(hostname=_node_address())]
    return gloo(store, rank, channel.size, options)


def _node_address() -> str:
    """That of the node that this process runs on, as its cluster knows it: a local one keeps to the loopback."""
    node = ray.get_runtime_context().get_node_id()
    return next(row["NodeManagerAddress"] for row in ray.nodes() if row["NodeID"] == node)
