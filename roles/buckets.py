"""Weights as flat buckets of bytes: filled from tensors, emptied into a model, checked by what was written.

A checksum says what the memory that was written holds, not what was read: the learner's is of its buckets, a worker's
of its model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from roles.work import Slot

BUCKET_BYTES = 128 << 20
ALIGNMENT = 64
_BLOCK = 512
"""64-bit words that are summed before CRC-32 sees them."""
_PIECE_BYTES = 1 << 20
"""Copied and then summed at once on a CPU: what was written is still in its cache."""


class WeightError(RuntimeError):
    """Weights that do not fit the model or arrived damaged, or a request for a version that is not loaded."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some whole tensors one behind the other in `data`, uint8 [bytes], with the checksum of each."""

    number: int
    slots: tuple[Slot, ...]
    sums: tuple[int, ...]
    data: torch.Tensor


def fill(
    weights: Iterable[tuple[str, torch.Tensor]],
    memory: Callable[[int, int], torch.Tensor],
    dtype: torch.dtype | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[Bucket]:
    """Copy tensors into buckets as they come, as `dtype` or as they are; a bucket that the next would overflow is full.

    memory: gives uint8 of at least so many bytes (second argument) for a bucket number. A tensor that is larger than
            `bucket_bytes` has a bucket of its own.
    """
    number, end, held = 0, 0, None
    slots: list[Slot] = []
    sums: list[int] = []
    for name, tensor in weights:
        kind = dtype or tensor.dtype
        nbytes = tensor.numel() * kind.itemsize
        if slots and end + nbytes > bucket_bytes:
            yield Bucket(number, tuple(slots), tuple(sums), held[: slots[-1].end])
            number, end, slots, sums = number + 1, 0, [], []
        if not slots:
            held = memory(number, max(bucket_bytes, nbytes))
        slot = Slot(name, tuple(tensor.shape), str(kind).removeprefix("torch."), number, end, nbytes)
        sums.append(write(tensor.detach(), view(held, slot)))
        slots.append(slot)
        end = -(-slot.end // ALIGNMENT) * ALIGNMENT
    if slots:
        yield Bucket(number, tuple(slots), tuple(sums), held[: slots[-1].end])


def empty(bucket: Bucket, model: Mapping[str, torch.Tensor], version: int) -> list[int]:
    """Copy a bucket's tensors into those of a model, in place; checksums of what the model holds then.

    Tensors that the model lacks count with the checksum that came with the bucket. Raises WeightError.
    """
    found = []
    for slot, published in zip(bucket.slots, bucket.sums, strict=True):
        own = write(view(bucket.data, slot), model[slot.name]) if slot.name in model else published
        if own != published:
            raise WeightError(
                f"weights version {version}: bucket {bucket.number}, {slot.name}: checksum {own:#010x} after the copy, "
                f"published {published:#010x}"
            )
        found.append(own)
    return found


def check_fit(slots: Iterable[Slot], model: Mapping[str, torch.Tensor], version: int, some: bool = False) -> None:
    """Raise WeightError unless the model has a tensor of equal shape and type for every slot; others do not matter.

    some: it may lack tensors.
    """
    for slot in slots:
        have = model.get(slot.name)
        if have is None and some:
            continue
        found = None if have is None else (tuple(have.shape), str(have.dtype).removeprefix("torch."))
        if found != (slot.shape, slot.dtype):
            raise WeightError(
                f"weights version {version}: {slot.name} is {slot.dtype} {slot.shape}, the model has {found}; "
                "learner and worker must load one policy.path with one policy.dtype"
            )


def view(data: torch.Tensor, slot: Slot) -> torch.Tensor:
    """A slot's bytes as its tensor."""
    return data[slot.offset : slot.end].view(getattr(torch, slot.dtype)).view(slot.shape)


def write(source: torch.Tensor, target: torch.Tensor) -> int:
    """Copy `source` into `target`, in the target's type, and return the checksum of the target's bytes.

    CRC-32 over the sums of 4 KiB blocks as 64-bit words (modulo 2^64), then over the bytes behind the last whole block:
    at the speed of memory on any device. A changed byte changes it, and so does a block in another's place.
    """
    if not target.is_contiguous():
        target.copy_(source)
        source = target = target.contiguous()
    if source.device != target.device:
        target.copy_(source)
        source = target
    flat, into = source.reshape(-1), target.view(-1)
    data = into.view(torch.uint8)
    behind = data.numel() % (8 * _BLOCK)
    words = data[: data.numel() - behind].view(torch.int64).view(-1, _BLOCK)
    sums = words.new_empty(len(words))
    rows = _PIECE_BYTES // (8 * _BLOCK) if into.device.type == "cpu" else max(1, len(words))
    size = rows * 8 * _BLOCK // into.element_size()
    for number, piece in enumerate(into.split(size)):
        if source is not target:
            piece.copy_(flat[number * size : (number + 1) * size])
        part = slice(number * rows, (number + 1) * rows)
        torch.sum(words[part], 1, out=sums[part])
    return zlib.crc32(data[data.numel() - behind :].cpu().numpy(), zlib.crc32(sums.cpu().numpy()))


def total(slots: Sequence[Slot], sums: Sequence[int]) -> int:
    """CRC-32 over names, shapes, types and checksums of tensors in the order of their names: one number a version."""
    crc = 0
    for slot, own in sorted(zip(slots, sums, strict=True), key=lambda pair: pair[0].name):
        crc = zlib.crc32(f"{slot.name}{slot.shape}{slot.dtype}{own}".encode(), crc)
    return crc
