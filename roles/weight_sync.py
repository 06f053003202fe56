"""Weights from the learner to the rollout workers through the object store, with a version and a checksum.

The learner's first rank lays the tensors out in flat byte buckets that every reader maps without a copy. A worker
copies them into its model, computes the checksum of what the model then holds, and acknowledges both numbers.
"""

from __future__ import annotations

import asyncio
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError

from roles.group import ActorPool, RoleError
from roles.replica import LOST, Replica
from roles.work import Ack, Manifest, Slot

BUCKET_BYTES = 256 << 20
ALIGNMENT = 64


class WeightError(RuntimeError):
    """Weights that do not fit the model or arrived damaged, or a request for a version that is not loaded."""


def lay_out(weights: Mapping[str, torch.Tensor], bucket_bytes: int = BUCKET_BYTES) -> tuple[Slot, ...]:
    """Slots of the tensors in the order of their names; a bucket closes when the next tensor would overflow it."""
    slots, bucket, end = [], 0, 0
    for name in sorted(weights):
        tensor = weights[name]
        nbytes = tensor.numel() * tensor.element_size()
        if end and end + nbytes > bucket_bytes:
            bucket, end = bucket + 1, 0
        slots.append(Slot(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), bucket, end, nbytes))
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(slots)


def publish(weights: Mapping[str, torch.Tensor], version: int, bucket_bytes: int = BUCKET_BYTES) -> Manifest:
    """Put the weights into the object store, one bucket after the other. The caller's process owns them."""
    slots = lay_out(weights, bucket_bytes)
    slots = tuple(replace(slot, checksum=zlib.crc32(_as_bytes(weights[slot.name]))) for slot in slots)
    refs = []
    for number in range(slots[-1].bucket + 1 if slots else 0):
        inside = [slot for slot in slots if slot.bucket == number]
        bucket = np.zeros(inside[-1].offset + inside[-1].nbytes, dtype=np.uint8)
        for slot in inside:
            bucket[slot.offset : slot.offset + slot.nbytes] = _as_bytes(weights[slot.name])
        refs.append(ray.put(bucket))
    return Manifest(version, checksum(slots, weights), slots, tuple(refs))


def checksum(slots: Iterable[Slot], weights: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 over names, shapes, types and byte checksums of the tensors, in the order of the slots.

    Tensors that are not among `weights` count with the checksum that was published.
    """
    crc = 0
    for slot in slots:
        own = zlib.crc32(_as_bytes(weights[slot.name])) if slot.name in weights else slot.checksum
        crc = zlib.crc32(f"{slot.name}{slot.shape}{slot.dtype}{own}".encode(), crc)
    return crc


def install(manifest: Manifest, model: Mapping[str, torch.Tensor], timeout_s: float = 600.0, some: bool = False) -> Ack:
    """Copy a published version into the tensors of a model, in place, and check what they hold then.

    `model` has a tensor of equal shape and type for every slot; it may have others. With `some` it may lack tensors,
    which are then not fetched. Raises WeightError.
    """
    slots = [slot for slot in manifest.slots if slot.name in model or not some]
    for slot in slots:
        have = model.get(slot.name)
        found = None if have is None else (tuple(have.shape), str(have.dtype).removeprefix("torch."))
        if found != (slot.shape, slot.dtype):
            raise WeightError(
                f"weights version {manifest.version}: {slot.name} is {slot.dtype} {slot.shape}, the model has {found}; "
                "learner and worker must load one policy.path with one policy.dtype"
            )
    for slot, source in _tensors(manifest, slots, timeout_s):
        model[slot.name].copy_(source)
    found_sum = checksum(manifest.slots, model)
    if found_sum != manifest.checksum:
        raise WeightError(
            f"weights version {manifest.version}: checksum {found_sum:#010x} after the copy, "
            f"published {manifest.checksum:#010x}"
        )
    return Ack(manifest.version, found_sum)


def _tensors(manifest: Manifest, slots: Iterable[Slot], timeout_s: float) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Read-only views of published tensors, one bucket mapped at a time."""
    number, bucket = -1, None
    for slot in slots:
        if slot.bucket != number:
            number, bucket = slot.bucket, ray.get(manifest.buckets[slot.bucket], timeout=timeout_s)
        with warnings.catch_warnings():
            # Torch warns that shared memory is read-only; it is only copied from.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.from_numpy(bucket[slot.offset : slot.offset + slot.nbytes])
        yield slot, flat.view(getattr(torch, slot.dtype)).view(slot.shape)


def _as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class WeightSync:
    """The driver's side: bringing every worker to a version; `version` is the last that all have acknowledged.

    Hooks itself into the pool, so that a worker that starts again gets the current weights before any work.

        sync = WeightSync(pool, timeout_s=600)
        await sync.send(manifest)             # every worker has acknowledged
    """

    def __init__(self, pool: ActorPool, timeout_s: float) -> None:
        self.pool, self.timeout_s = pool, timeout_s
        self.manifest: Manifest | None = None
        self.version = -1
        self.held: dict[int, int] = {}
        pool.on_start = self._greet

    def version_of(self, replica: Replica) -> int:
        """The version that work sent to this replica now will meet: calls are served in the order they are sent."""
        return self.held.get(replica.index, -1)

    async def send(self, manifest: Manifest) -> None:
        """Load a version on every worker; raises RoleError naming those that did not acknowledge in time."""
        self.manifest = manifest
        replicas = list(self.pool.replicas)
        results = await asyncio.gather(*map(self._bring_up, replicas), return_exceptions=True)
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

    async def _load(self, replica: Replica) -> None:
        manifest = self.manifest
        self.held[replica.index] = manifest.version
        try:
            ack = await replica.ask("load_weights", manifest, timeout_s=self.timeout_s)
            if (ack.version, ack.checksum) != (manifest.version, manifest.checksum):
                sent = Ack(manifest.version, manifest.checksum)
                raise WeightError(f"{replica.name} acknowledged {ack}, sent was {sent}")
        except BaseException:
            self.held.pop(replica.index, None)
            raise
