"""Keys and values of decoded slots, in the policy's type or in eight bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_FLOAT8, _SCALE_BYTES = torch.float8_e4m3fn, 4


@dataclass
class Cache:
    """Keys and values of `length` decoded slots of every row, with room for more.

    keys, values: [layers, B, key/value heads, slots, head size]; in eight bits the uint8 that `pack` makes of them.
    bias: [B, 1, 1, slots], 0 where a slot holds a token and the type's minimum where it holds padding, or
          None if no row has padding.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None = None
    length: int = 0

    @property
    def bias_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.keys.dtype == torch.uint8 else self.keys.dtype

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def select(self, rows: torch.Tensor, slots: int) -> Cache:
        """A new cache with the given rows (int64 [B'], repeats allowed) and room for `slots` slots."""
        shape = (self.keys.shape[0], len(rows), self.keys.shape[2], slots, self.keys.shape[4])
        new = Cache(self.keys.new_empty(shape), self.values.new_empty(shape), None, self.length)
        for old_part, new_part in ((self.keys, new.keys), (self.values, new.values)):
            for old_layer, new_layer in zip(old_part, new_part, strict=True):
                new_layer[:, :, : self.length] = old_layer[rows, :, : self.length]
        if self.bias is not None:
            new.bias = self.bias.new_zeros(len(rows), 1, 1, slots)
            new.bias[..., : self.length] = self.bias[rows, ..., : self.length]
        return new

    @classmethod
    def joined(cls, parts: Sequence[tuple[Cache, torch.Tensor, torch.Tensor]], room: int) -> Cache:
        """A new cache of rows of several, aligned at their ends, and `room` slots behind them.

        parts: per cache the rows that are taken of it (repeats allowed) and their places in the new one, int64 [n].
        """
        first, length = parts[0][0], max(cache.length for cache, *_ in parts)
        shape = list(first.keys.shape)
        shape[1], shape[3] = sum(len(rows) for _, rows, _ in parts), length + room
        new = cls(first.keys.new_empty(shape), first.values.new_empty(shape), None, length)
        if any(cache.bias is not None or cache.length < length for cache, *_ in parts):
            new.bias = first.keys.new_zeros(shape[1], 1, 1, shape[3], dtype=new.bias_dtype)
        for cache, rows, places in parts:
            gap = length - cache.length
            for old_part, new_part in ((cache.keys, new.keys), (cache.values, new.values)):
                for old_layer, new_layer in zip(old_part, new_part, strict=True):
                    new_layer[places, :, gap:length] = old_layer[rows, :, : cache.length]
                    new_layer[places, :, :gap] = 0  # what is masked has a weight of 0, and 0 * nan is nan
            if gap:
                new.bias[places, ..., :gap] = torch.finfo(new.bias_dtype).min
            if cache.bias is not None:
                new.bias[places, ..., gap:length] = cache.bias[rows, ..., : cache.length]
        return new

    def rewound(self, length: int) -> Cache:
        """The same memory with its first `length` slots alone; what stood behind them may be overwritten."""
        return Cache(self.keys, self.values, self.bias, length)

    def mark(self, valid: torch.Tensor) -> None:
        """Declare the next slots, bool [B, T], as tokens (True) or padding (False)."""
        if self.bias is None:
            self.bias = self.keys.new_zeros(len(valid), 1, 1, self.slots, dtype=self.bias_dtype)
        # the minimum and not -inf: a row of padding alone must stay finite, for 0 * nan is nan
        block = self.bias[:, 0, 0, self.length : self.length + valid.shape[1]]
        block.masked_fill_(~valid, torch.finfo(self.bias_dtype).min)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """uint8 [.., D + 4] of [.., D]: each vector as float8_e4m3 with a float32 scale of its own behind it.

    A scale for each slot of each head, so that what a row keeps depends on nothing but the row.
    """
    numbers = numbers.float()
    scale = numbers.abs().amax(-1, keepdim=True).clamp_(min=1e-12) / torch.finfo(_FLOAT8).max
    return torch.cat([(numbers / scale).to(_FLOAT8).view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def unpack(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[.., D] of what `pack` made."""
    scale = packed[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (packed[..., :-_SCALE_BYTES].contiguous().view(_FLOAT8).float() * scale).to(dtype)


def packed_size(head_dim: int) -> int:
    return head_dim + _SCALE_BYTES
