"""A trajectory as sequences: index arithmetic on the CPU, no model.

    drawing        prompt | image 1 (codes) | look | reflection | redraw | image 2 (codes)
    unconditional  the same behind a blank prompt; only where guidance asks for it
    looking        prompt | image 1 (pixels) | look | reflection

The drawing sequences give the log-probs of the images, the looking sequence those of the reflection. Nothing
is laid out that no trained token needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch

from rlpipe.policy.guidance import GuidanceLogits
from rlpipe.policy.templates import Templates
from rlpipe.schema import LossSection
from rlpipe.types import TrainItem

# A row's source numbers: vocabulary ids as they are, entries of the code pool and the pixel pool above these.
_CODE, _PIXEL = 1 << 40, 1 << 41
# Rows shorter than this share of the longest one in a pass go into another pass.
_BUCKET = 0.75


@dataclass(frozen=True)
class ReplayOptions:
    """Which distribution a token is scored under; fields as in the `loss` section of the configuration."""

    logits: GuidanceLogits = "guided"
    verdict: Literal["restricted", "full"] = "restricted"
    train_eos: bool = True

    @classmethod
    def from_config(cls, section: LossSection) -> ReplayOptions:
        return cls(section.logits, section.verdict, section.train_eos)


class Distribution(NamedTuple):
    """What a group of tokens was drawn from: a head and how its logits were used."""

    head: Literal["image", "verdict", "text"]
    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Pass:
    """Rows that go through the language model together, padded on the right.

    source:    int64 [R, L], indices into the pool of embeddings (vocabulary rows, then codes, then pixels).
    positions: int64 [R, L].
    read:      int64 [K], flat indices into [R * L] of the hidden states that a head reads.
    """

    source: torch.Tensor
    positions: torch.Tensor
    read: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Scored tokens of one distribution.

    at:            int64 [M], indices into the hidden states read by all passes, in order.
    unconditional: int64 [M] or None, those of the same tokens in the unconditional rows.
    target:        int64 [M], the tokens: codes, vocabulary ids, or 0 (No) and 1 (Yes).
    """

    distribution: Distribution
    at: torch.Tensor
    unconditional: torch.Tensor | None
    target: torch.Tensor


@dataclass(frozen=True)
class Replay:
    """Items laid out as sequences. S scored tokens in the order of `groups`.

    text_ids: int64 [A], vocabulary ids that occur.  codes: int64 [B].  images: uint8 [C, H, W, 3].
    item, segment, offset: int64 [S], where a token comes from; `offset` counts from its segment's start.
    """

    options: ReplayOptions
    text_ids: torch.Tensor
    codes: torch.Tensor
    images: torch.Tensor | None
    passes: tuple[Pass, ...]
    groups: tuple[Group, ...]
    item: torch.Tensor
    segment: torch.Tensor
    offset: torch.Tensor

    def __len__(self) -> int:
        return len(self.item)

    def by_segment(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Item, segment, and its scored tokens in order: their indices [T] into S, their offsets [T]."""
        item, segment, offset = self.item.numpy(), self.segment.numpy(), self.offset.numpy()
        order = np.lexsort((offset, segment, item))
        borders = np.flatnonzero(np.diff(item[order]) | np.diff(segment[order])) + 1
        for tokens in np.split(order, borders) if len(order) else []:
            yield int(item[tokens[0]]), int(segment[tokens[0]]), tokens, offset[tokens]


@dataclass
class _Row:
    """One sequence in the making. `scored` holds (index read first, key of the first token, count)."""

    unconditional: bool = False
    sources: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    length: int = 0
    next_position: int = 0

    def add(self, source: np.ndarray | list[int], first_key: int | None = None, scored: int = 0) -> None:
        """Append tokens; the first `scored` of them are scored, each read one index before its own."""
        if first_key is not None and scored:
            self.scored.append((self.length - 1, first_key, scored))
        self.sources.append(np.asarray(source, dtype=np.int64))
        self.positions.append(np.arange(self.next_position, self.next_position + len(source)))
        self.length += len(source)
        self.next_position += len(source)

    @property
    def used(self) -> int:
        """Length up to the last index that is read; what follows cannot matter."""
        first, _, count = self.scored[-1]
        return first + count


class _Layout:
    """Rows, pools and scored tokens of a batch of items. A scored token is known by its key, 0, 1, 2, ..."""

    def __init__(self, templates: Templates, options: ReplayOptions) -> None:
        self.templates, self.options = templates, options
        self.prompts: dict[str, list[int]] = {}
        self.rows: list[_Row] = []
        self.codes: list[np.ndarray] = []
        self.images: list[np.ndarray] = []
        self.num_codes = self.num_keys = 0
        self.distributions: list[Distribution] = []
        self.spans: list[tuple[np.ndarray, ...]] = []

    def add(self, index: int, item: TrainItem) -> None:
        trajectory = item.trajectory
        kinds = tuple(segment.kind for segment in trajectory.segments)
        if not kinds or kinds != ("image", "text", "image")[: len(kinds)]:
            raise ValueError(f"trajectory {trajectory.id}: segments {kinds}; replay knows image [, text [, image]]")
        if len(item.credits) != len(kinds):
            raise ValueError(f"trajectory {trajectory.id}: {len(item.credits)} credits for {len(kinds)} segments")
        images = [i for i, kind in enumerate(kinds) if kind == "image" and item.credits[i].trained]
        if images == [0, 2] and trajectory.segments[0].context_ids is not None:
            self._draw(index, item, [0])
            self._draw(index, item, [2])
        elif images:
            self._draw(index, item, images)
        if len(kinds) > 1 and item.credits[1].trained:
            self._look(index, item)

    def _prompt(self, item: TrainItem) -> list[int]:
        text = item.trajectory.prompt.text
        if text not in self.prompts:
            self.prompts[text] = self.templates.prompt(text)
        ids = self.prompts[text]
        return self.templates.blank(ids) if item.blank_prompt else ids

    def _reflection(self, item: TrainItem) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of the reflection as it is, and without its end-of-sentence token."""
        ids = np.asarray(item.trajectory.segments[1].token_ids, dtype=np.int64)
        limit = item.trajectory.sampling.max_reflection_tokens
        if not 1 <= len(ids) <= limit:
            raise ValueError(
                f"trajectory {item.trajectory.id}: a reflection of {len(ids)} tokens, "
                f"max_reflection_tokens is {limit}; raise rollout.max_reflection_tokens or shorten the text"
            )
        return ids, ids[:-1] if ids[-1] == self.templates.eos else ids

    def _code_source(self, codes: np.ndarray) -> np.ndarray:
        source = _CODE + self.num_codes + np.arange(len(codes))
        self.codes.append(np.asarray(codes, dtype=np.int64))
        self.num_codes += len(codes)
        return source

    def _keys(self, item: int, segment: int, offset: int, targets: np.ndarray, drawn: Distribution) -> int:
        """Register scored tokens of a segment from its token number `offset` on; returns the first key."""
        if drawn.temperature == 0.0 or drawn.top_k == 1:
            raise ValueError(f"{drawn.head} tokens were chosen greedily; they have no log-probs to train on")
        if drawn not in self.distributions:
            self.distributions.append(drawn)
        count, first = len(targets), self.num_keys
        places = np.array([[item], [segment], [offset], [self.distributions.index(drawn)]]).repeat(count, axis=1)
        places[2] += np.arange(count)
        self.spans.append((np.asarray(targets, dtype=np.int64), places))
        self.num_keys += count
        return first

    def _draw(self, index: int, item: TrainItem, wanted: list[int]) -> None:
        """The drawing sequence up to the last wanted image, and its unconditional twin under guidance."""
        trajectory, sampling = item.trajectory, item.trajectory.sampling
        paired = sampling.guidance != 1.0 and self.options.logits != "conditional"
        drawn = Distribution(
            "image",
            sampling.guidance if paired else 1.0,
            sampling.image_temperature,
            sampling.image_top_k,
            sampling.image_top_p,
        )
        prompt = self._prompt(item)
        rows = [_Row()] + [_Row(unconditional=True)] * paired
        rows[0].add(prompt)
        if paired:
            rows[1].add(self.templates.blank(prompt))
        for segment in [0, 2][: 1 + (wanted[-1] == 2)]:
            codes = trajectory.segments[segment].token_ids
            key = self._keys(index, segment, 0, codes, drawn) if segment in wanted else None
            if segment == 0 and wanted[-1] == 2 and trajectory.segments[0].context_ids is not None:
                codes = trajectory.segments[0].context_ids
            source = self._code_source(codes)
            for row in rows:
                if segment == 2:
                    self._bridge(row, item)
                row.add(source, key, len(source))
        self.rows.extend(rows)

    def _bridge(self, row: _Row, item: TrainItem) -> None:
        """What stands between two images; their distance does not depend on the reflection's length."""
        row.add(self.templates.look)
        redraw = row.next_position + item.trajectory.sampling.max_reflection_tokens
        row.add(self._reflection(item)[1])
        row.next_position = redraw
        row.add(self.templates.redraw)

    def _look(self, index: int, item: TrainItem) -> None:
        """The looking sequence of the reflection."""
        trajectory, sampling = item.trajectory, item.trajectory.sampling
        if not item.images:
            raise ValueError(f"trajectory {trajectory.id}: a trained reflection needs the pixels of its image")
        ids, without_eos = self._reflection(item)
        scored = ids if self.options.train_eos else without_eos
        settings = (1.0, sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
        num_patches = len(trajectory.segments[0])
        row = _Row()
        row.add(self._prompt(item))
        row.add(_PIXEL + len(self.images) * num_patches + np.arange(num_patches))
        self.images.append(item.images[0])
        row.add(self.templates.look)
        start = 0
        if self.options.verdict == "restricted":
            choices = [self.templates.no, self.templates.yes]
            if ids[0] not in choices:
                raise ValueError(f"trajectory {trajectory.id}: the reflection starts with neither Yes nor No")
            target = np.array([choices.index(ids[0])])
            row.add(ids[:1], self._keys(index, 1, 0, target, Distribution("verdict", *settings)), 1)
            start = 1
        if len(scored) > start:
            key = self._keys(index, 1, start, scored[start:], Distribution("text", *settings))
            row.add(ids[start:], key, len(scored) - start)
        self.rows.append(row)

    def finish(self) -> Replay:
        """Rows to passes of similar length, keys to groups of one distribution."""
        self.rows.sort(key=lambda row: -row.used)
        conditional = np.zeros(self.num_keys, np.int64)
        unconditional = np.full(self.num_keys, -1, np.int64)
        passes, start, num_read = [], 0, 0
        while start < len(self.rows):
            longest = self.rows[start].used
            rows = [row for row in self.rows[start:] if row.used >= _BUCKET * longest]
            source = np.zeros((len(rows), longest), np.int64)
            positions = np.zeros((len(rows), longest), np.int64)
            read = []
            for r, row in enumerate(rows):
                source[r, : row.used] = np.concatenate(row.sources)[: row.used]
                positions[r, : row.used] = np.concatenate(row.positions)[: row.used]
                for first, key, count in row.scored:
                    at = unconditional if row.unconditional else conditional
                    at[key : key + count] = num_read + np.arange(count)
                    read.append(r * longest + first + np.arange(count))
                    num_read += count
            passes.append((source, positions, np.concatenate(read)))
            start += len(rows)
        return self._replay(passes, conditional, unconditional)

    def _replay(self, passes: list, conditional: np.ndarray, unconditional: np.ndarray) -> Replay:
        text_ids = np.unique(np.concatenate([source[source < _CODE] for source, _, _ in passes] or [np.zeros(1, int)]))
        for source, _, _ in passes:
            text, pixel = source < _CODE, source >= _PIXEL
            source[text] = np.searchsorted(text_ids, source[text])
            source[pixel] += len(text_ids) + self.num_codes - _PIXEL
            source[~text & ~pixel] += len(text_ids) - _CODE
        targets = np.concatenate([s[0] for s in self.spans] or [np.zeros(0, np.int64)])
        places = np.concatenate([s[1] for s in self.spans] or [np.zeros((4, 0), np.int64)], axis=1)
        members = [np.flatnonzero(places[3] == d) for d in range(len(self.distributions))]
        order = np.concatenate(members or [np.zeros(0, np.int64)])
        tensor = torch.from_numpy
        groups = []
        for drawn, keys in zip(self.distributions, members, strict=True):
            twin = tensor(unconditional[keys]) if drawn.guidance != 1.0 else None
            groups.append(Group(drawn, tensor(conditional[keys]), twin, tensor(targets[keys])))
        return Replay(
            options=self.options,
            text_ids=tensor(text_ids.astype(np.int64)),
            codes=tensor(np.concatenate(self.codes or [np.zeros(0, np.int64)])),
            images=tensor(np.stack(self.images)) if self.images else None,
            passes=tuple(Pass(*map(tensor, arrays)) for arrays in passes),
            groups=tuple(groups),
            item=tensor(places[0, order]),
            segment=tensor(places[1, order]),
            offset=tensor(places[2, order]),
        )


def lay_out(items: Sequence[TrainItem], templates: Templates, options: ReplayOptions | None = None) -> Replay:
    """Lay out the trained segments of `items`, and what they need before them, as padded rows.

    Raises ValueError, naming the trajectory, for a shape of trajectory that has no layout, a reflection
    longer than its `max_reflection_tokens`, a greedy sample, or (verdict "restricted") a reflection that
    starts with neither Yes nor No.
    """
    layout = _Layout(templates, options or ReplayOptions())
    for index, item in enumerate(items):
        layout.add(index, item)
    return layout.finish()
