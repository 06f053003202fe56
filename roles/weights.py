"""Both ends of the weights' way: the learner's first rank publishes them, a worker takes them over.

Through the object store a worker maps a bucket without a copy and may come for it at any time. By a channel (see
`channel.py`) all workers receive a bucket at once, and the learner keeps the whole version until the next, for those
who could not take part.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import ray
import torch

from roles.buckets import BUCKET_BYTES, Bucket, WeightError, check_fit, empty, fill, total
from roles.channel import ChannelBroken, Member
from roles.work import Ack, Channel, Invitation, Manifest

log = logging.getLogger(__name__)


class Publisher:
    """Fills buckets, in memory that stays from one version to the next, and sends each while the next is filled.

    publisher = Publisher(torch.bfloat16)
    manifest = publisher.publish(learner.whole_weights(), version=3)
    """

    def __init__(self, dtype: torch.dtype | None = None, bucket_bytes: int = BUCKET_BYTES) -> None:
        """dtype: that the weights travel in; None: their own."""
        self.dtype, self.bucket_bytes = dtype, bucket_bytes
        self._memory: dict[int, torch.Tensor] = {}
        self._sender = ThreadPoolExecutor(1, "weights")
        self._on_the_way: list[Future] = []
        self._member: Member | None = None
        self._told = False
        self._kept: list[Bucket] = []
        self._latest: Manifest | None = None

    def publish(
        self, weights: Iterable[tuple[str, torch.Tensor]], version: int, channel: Channel | None = None
    ) -> Manifest:
        """Take a copy of the weights, into the object store or on its way by a channel when this returns.

        Waits until what went by the channel before has come, or cannot come any more.
        """
        self._settle()
        buckets = []
        if channel is not None:
            self._on_the_way.append(self._sender.submit(self._join, channel))
        for bucket in fill(weights, self._room if channel else self._one_of_two, self.dtype, self.bucket_bytes):
            buckets.append(bucket)
            send = (self._send, version, bucket) if channel else (_store, bucket)
            self._on_the_way.append(self._sender.submit(*send))
        refs = ()
        if channel is not None:
            self._on_the_way.append(self._sender.submit(self._send, version, None))
        else:
            refs = tuple(future.result() for future in self._on_the_way)
            self._on_the_way = []
        slots = tuple(slot for bucket in buckets for slot in bucket.slots)
        sums = tuple(own for bucket in buckets for own in bucket.sums)
        self._kept = buckets if channel else []
        self._latest = Manifest(version, total(slots, sums), slots, sums, refs)
        return self._latest

    def share(self) -> Manifest:
        """The version that was published last, in the object store."""
        if self._kept:
            self._latest = replace(self._latest, buckets=tuple(map(_store, self._kept)))
            self._kept = []
        return self._latest

    def _settle(self) -> None:
        """Until nothing is on its way."""
        pending, self._on_the_way = self._on_the_way, []
        for future in pending:
            future.result()

    def _join(self, channel: Channel) -> None:
        if self._member is not None and self._member.channel.name == channel.name:
            return
        self._leave()
        try:
            self._member = Member(channel, 0)
        except ChannelBroken as error:
            self._tell(str(error))

    def _send(self, version: int, bucket: Bucket | None) -> None:
        if self._member is not None:
            try:
                self._member.send(version, bucket)
            except ChannelBroken as error:
                # The workers will ask for the weights. No exception may stay: it would hold the connections open.
                self._tell(str(error))
                self._leave()

    def _tell(self, reason: str) -> None:
        """Once for each process: the workers tell how often."""
        if not self._told:
            log.warning("weights: %s; the workers get them through the object store", reason)
        self._told = True

    def _leave(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None

    def _room(self, number: int, nbytes: int) -> torch.Tensor:
        """Memory of a bucket; on a machine with a GPU it is pinned, for faster copies from it."""
        if number not in self._memory or self._memory[number].numel() < nbytes:
            pinned = torch.cuda.is_available()
            self._memory[number] = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        return self._memory[number]

    def _one_of_two(self, number: int, nbytes: int) -> torch.Tensor:
        """Memory of a bucket that has left before the one behind the next is filled."""
        if number > 1:
            self._on_the_way[number - 2].result()
        return self._room(number % 2, nbytes)


def publish(weights: Mapping[str, torch.Tensor], version: int, bucket_bytes: int = BUCKET_BYTES) -> Manifest:
    """Put weights into the object store as they are. The caller's process owns them."""
    return Publisher(None, bucket_bytes).publish(weights.items(), version)


def _store(bucket: Bucket) -> ray.ObjectRef:
    return ray.put(bucket.data.numpy())


def install(manifest: Manifest, model: Mapping[str, torch.Tensor], timeout_s: float = 600.0, some: bool = False) -> Ack:
    """Copy a version out of the object store into the tensors of a model, in place, and check what they hold then.

    `model` has a tensor of equal shape and type for every slot; it may have others. With `some` it may lack tensors,
    and buckets of which it has none are not fetched. Raises WeightError.
    """
    check_fit(manifest.slots, model, manifest.version, some)
    sums = []
    for number, ref in enumerate(manifest.buckets):
        pairs = [pair for pair in zip(manifest.slots, manifest.sums, strict=True) if pair[0].bucket == number]
        slots, published = zip(*pairs, strict=True)
        if any(slot.name in model for slot in slots):
            bucket = Bucket(number, slots, published, _mapped(ref, timeout_s))
            sums += empty(bucket, model, manifest.version)
        else:
            sums += published
    return _acknowledged(manifest, total(manifest.slots, sums))


def _acknowledged(manifest: Manifest, found: int) -> Ack:
    if found != manifest.checksum:
        raise WeightError(
            f"weights version {manifest.version}: checksum {found:#010x} after the copy, "
            f"published {manifest.checksum:#010x}"
        )
    return Ack(manifest.version, found)


def _mapped(ref: ray.ObjectRef, timeout_s: float) -> torch.Tensor:
    """A bucket's bytes where the object store has them: uint8, to be read alone."""
    with warnings.catch_warnings():
        # Torch warns that the memory is read-only.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(ray.get(ref, timeout=timeout_s))


class Receiver:
    """A worker's end, a member of the channel that it was invited to last.

    receiver = Receiver(timeout_s=600)
    ack = receiver.take(manifest_or_invitation, dict(module.named_parameters()))
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._told = False
        self._member: Member | None = None

    def take(self, source: Manifest | Invitation, model: Mapping[str, torch.Tensor]) -> Ack:
        """Have the model hold a version, checked. Raises WeightError.

        If the channel breaks, the same version comes through the object store: the learner is asked for it.
        """
        if isinstance(source, Manifest):
            return install(source, model, self.timeout_s)
        try:
            try:
                return self._receive(source, model)
            except BaseException:
                self._leave()
                raise
        except ChannelBroken as error:
            reason = str(error)
        # Out here, where no exception holds the connections open: the others see that this rank has left.
        if not self._told:
            log.warning("weights version %d: %s; taken from the object store", source.version, reason)
        self._told = True
        shared = ray.get(source.channel.learner.share.remote(), timeout=self.timeout_s)
        return replace(install(shared, model, self.timeout_s), as_asked=False)

    def _receive(self, invitation: Invitation, model: Mapping[str, torch.Tensor]) -> Ack:
        channel, version = invitation.channel, invitation.version
        if self._member is None or self._member.channel.name != channel.name:
            self._leave()
            self._member = Member(channel, invitation.rank)
        slots, sums = [], []
        for bucket in self._member.receive(version):
            check_fit(bucket.slots, model, version)
            slots += bucket.slots
            sums += empty(bucket, model, version)
        return Ack(version, total(slots, sums))

    def _leave(self) -> None:
        if self._member is not None:
            self._member.close()
            self._member = None
