"""Rows between two turns: what they have drawn and said last, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from rlpipe.rollout.cache import Cache


class Drawn(NamedTuple):
    """Sampled tokens int64 [B, T] and their log-probs float32 [B, T]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Reflections(NamedTuple):
    """One entry per row: P(yes) before sampling, token ids [T], log-probs [T], whether the limit cut it."""

    p_yes: np.ndarray
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    truncated: list[bool]

    def pick(self, index: Sequence[int]) -> Reflections:
        return Reflections(self.p_yes[list(index)], *([part[i] for i in index] for part in self[1:]))

    @classmethod
    def join(cls, parts: Sequence[Reflections]) -> Reflections:
        p_yes = np.concatenate([part.p_yes for part in parts])
        return cls(p_yes, *(sum(lists, []) for lists in zip(*(part[1:] for part in parts), strict=True)))


@dataclass(frozen=True)
class Held:
    """Rows of caches: entry i is row `row[i]` of `caches[part[i]]`, and entries may share one (int64 [B] both).

    A cache of guided pairs has the twins of its rows, in their order, in its second half.
    """

    caches: tuple[Cache, ...]
    part: torch.Tensor
    row: torch.Tensor

    @classmethod
    def of(cls, cache: Cache, row: torch.Tensor) -> Held:
        return cls((cache,), torch.zeros_like(row), row)

    def pick(self, index: torch.Tensor) -> Held:
        return Held(self.caches, self.part[index], self.row[index])

    @classmethod
    def join(cls, several: Sequence[Held]) -> Held:
        caches, parts = [], []
        for held in several:
            parts.append(held.part + len(caches))
            caches += held.caches
        return cls(tuple(caches), torch.cat(parts), torch.cat([held.row for held in several]))

    def rewound(self, count: int) -> Held:
        """Without the newest `count` slots of every cache; what stood there may be overwritten."""
        return Held(tuple(c.rewound(c.length - count) for c in self.caches), self.part, self.row)

    def gather(self, room: int, guided: bool) -> Cache:
        """A new cache of these rows, with their twins behind them if guided, and `room` free slots."""
        parts = []
        for number, cache in enumerate(self.caches):
            here = (self.part == number).nonzero()[:, 0]
            rows = self.row[here]
            if guided:
                rows = torch.cat([rows, rows + cache.keys.shape[1] // 2])
                here = torch.cat([here, here + len(self.row)])
            if len(self.caches) == 1:
                return cache.select(rows, cache.length + room)
            parts.append((cache, rows, here))
        return Cache.joined(parts, room)

    def copied(self, guided: bool) -> Held:
        """The same rows in memory of their own, so that the rest of the caches can go; a shared row is copied once."""
        both = torch.stack([self.part, self.row], 1)
        distinct, place = both.unique(dim=0, return_inverse=True)
        return Held.of(Held(self.caches, *distinct.unbind(1)).gather(0, guided), place)


@dataclass(eq=False)
class Wave:
    """Rows of a `Batch` whose newest images are there; one entry per row in every field.

    rows:    numbers of the rows in their batch. rounds: images that each has had before its newest.
    drawers: row that each newest image was drawn by: another one for the branches of a shared first image.
    starts:  int64 [B], position of the newest image where it is looked back at.
    images:  uint8 [B, H, W, 3].
    drawing: where a next image goes on; None if it begins behind the prompt again.
    looking: where a next look goes on; None if it begins behind the prompt again.
    said:    of the newest image, once it has been looked at. rooms: the positions that this takes.
    earlier: said, rooms and starts of the image before, which `looking` does not hold yet.
    """

    rows: list[int]
    rounds: list[int]
    drawers: list[int]
    starts: torch.Tensor
    drawn: Drawn | None
    images: torch.Tensor
    drawing: Held | None = None
    looking: Held | None = None
    said: Reflections | None = None
    rooms: list[int] | None = None
    earlier: tuple[Reflections, list[int], torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def distinct(self) -> tuple[list[int], list[int]]:
        """One entry for each image that is not another's, and per entry which of those shows its image."""
        order = {drawer: place for place, drawer in enumerate(dict.fromkeys(self.drawers))}
        return [self.drawers.index(drawer) for drawer in order], [order[drawer] for drawer in self.drawers]

    def pick(self, kept: Sequence[int]) -> Wave:
        """Some of the rows, without a copy of what is held."""
        index = torch.tensor(list(kept), dtype=torch.long, device=self.starts.device)

        def some(value):
            if isinstance(value, list):
                return [value[i] for i in kept]
            if isinstance(value, Reflections):
                return value.pick(kept)
            if isinstance(value, Drawn):
                return Drawn(*(part[index] for part in value))
            if isinstance(value, tuple):
                return tuple(map(some, value))
            if isinstance(value, Held):
                return value.pick(index)
            return None if value is None else value[index]

        return Wave(**{name: some(value) for name, value in vars(self).items()})

    @classmethod
    def join(cls, waves: Sequence[Wave]) -> Wave:
        """The rows of waves in which the same fields are None."""
        if len(waves) == 1:
            return waves[0]

        def together(values):
            first = values[0]
            if isinstance(first, list):
                return sum(values, [])
            if isinstance(first, (Held, Reflections)):
                return type(first).join(values)
            if isinstance(first, Drawn):
                return Drawn(*(torch.cat(part) for part in zip(*values, strict=True)))
            if isinstance(first, tuple):
                return tuple(map(together, zip(*values, strict=True)))
            return None if first is None else torch.cat(values)

        return cls(**{name: together([getattr(wave, name) for wave in waves]) for name in vars(waves[0])})

    def copied(self, guided: bool) -> Wave:
        """These rows in memory of their own."""
        fields = dict(vars(self))
        for name, twins in (("drawing", guided), ("looking", False)):
            fields[name] = fields[name] and fields[name].copied(twins)
        return Wave(**fields)
