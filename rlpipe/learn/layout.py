"""A trajectory as sequences: index arithmetic on the CPU, no model.

    drawing        prompt | image 1 (codes) | look | reflection | redraw | image 2 (codes)
    unconditional  the same behind a blank prompt; only where guidance asks for it
    looking        prompt | image 1 (pixels) | look | reflection

The drawing sequences give the log-probs of the images, the looking sequences those of the reflections. With
`history: all` both go on behind the second image in the same way; with `history: last` an image or reflection after
the second image has a sequence of its own, which shows it the last image alone. Nothing is laid out that no trained
token needs.
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
from rlpipe.types import TrainItem, Trajectory

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
    context: Literal["live", "constant"] = "live"

    @classmethod
    def from_config(cls, section: LossSection) -> ReplayOptions:
        return cls(section.logits, section.verdict, section.train_eos, section.context)


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
    context:   int64 [R], how many leading inputs of a row are constants; 0 where the context is live.
    """

    source: torch.Tensor
    positions: torch.Tensor
    read: torch.Tensor
    context: torch.Tensor


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
    """One sequence in the making. `scored` holds (index read first, key of the first token, count).

    context: how many inputs stand before the first that is scored.
    """

    unconditional: bool = False
    sources: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    length: int = 0
    next_position: int = 0
    context: int = 0

    def add(self, source: np.ndarray | list[int], first_key: int | None = None, scored: int = 0) -> None:
        """Append tokens; the first `scored` of them, or all and the one behind, are scored, each read before it."""
        if first_key is not None and scored:
            self.context = self.context if self.scored else self.length
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
        self.prompts: dict[tuple[bool, str], list[int]] = {}
        self.rows: list[_Row] = []
        self.codes: list[np.ndarray] = []
        self.images: list[np.ndarray] = []
        self.num_codes = self.num_keys = 0
        self.distributions: list[Distribution] = []
        self.spans: list[tuple[np.ndarray, ...]] = []

    def add(self, index: int, item: TrainItem) -> None:
        trajectory = item.trajectory
        kinds = tuple(segment.kind for segment in trajectory.segments)
        if not kinds or kinds != (("image", "text") * len(kinds))[: len(kinds)]:
            raise ValueError(f"trajectory {trajectory.id}: segments {kinds}; replay knows image, text, image, ...")
        if len(kinds) > 1 and trajectory.source_codes is not None:
            raise ValueError(f"trajectory {trajectory.id}: {len(kinds)} segments; an edit has one, the edited image")
        if len(item.credits) != len(kinds):
            raise ValueError(f"trajectory {trajectory.id}: {len(item.credits)} credits for {len(kinds)} segments")
        trained = [number for number, credit in enumerate(item.credits) if credit.trained]
        for images in self._image_rows(trajectory, [n // 2 for n in trained if n % 2 == 0]):
            self._draw(index, item, images)
        for texts in self._text_rows(trajectory, [n // 2 for n in trained if n % 2]):
            self._look(index, item, texts)

    def _image_rows(self, trajectory: Trajectory, wanted: list[int]) -> list[list[int]]:
        """Which images are scored in one sequence; numbers count the images.

        They share one where each stands in it as the later ones see it.
        """
        alone = [[number] for number in wanted]
        alike = all(trajectory.segments[2 * number].context_ids is None for number in wanted[:-1])
        if not wanted or not alike or self.options.context == "constant":
            return alone
        if trajectory.sampling.history == "all":
            return [wanted]
        return [[0, 1], *alone[2:]] if wanted[:2] == [0, 1] else alone

    def _text_rows(self, trajectory: Trajectory, wanted: list[int]) -> list[list[int]]:
        """Which reflections are scored in one sequence; numbers count the reflections."""
        if wanted and trajectory.sampling.history == "all" and self.options.context == "live":
            return [wanted]
        return [[number] for number in wanted]

    def _begin(self, row: _Row, item: TrainItem, source: np.ndarray | None, blank: bool = False) -> None:
        """The prompt, its words blank or not; around `source` for an edit."""
        text, t = item.trajectory.prompt.text, self.templates
        if source is not None:
            before, after = t.edit(text)
            before, after = t.blank_edit(before, after) if blank else (before, after)
            for part in (before, source, after):
                row.add(part)
            return
        plain = item.trajectory.prompt.metadata.get("roles") == "plain"
        if (plain, text) not in self.prompts:
            self.prompts[plain, text] = (t.plain if plain else t).prompt(text)
        ids = self.prompts[plain, text]
        row.add(t.blank(ids) if blank else ids)

    def _reflection(self, item: TrainItem, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Token ids of a reflection as it is and without its end-of-sentence token, and its room behind an image."""
        trajectory, segment = item.trajectory, item.trajectory.segments[2 * number + 1]
        ids, limit = np.asarray(segment.token_ids, dtype=np.int64), trajectory.sampling.max_reflection_tokens
        if not 1 <= len(ids) <= limit:
            raise ValueError(
                f"trajectory {trajectory.id}: a reflection of {len(ids)} tokens, "
                f"max_reflection_tokens is {limit}; raise rollout.max_reflection_tokens or shorten the text"
            )
        words = ids[:-1] if ids[-1] == self.templates.eos else ids
        rooms = {"fixed": limit, "exact": len(words), "group": len(ids)}
        return ids, words, segment.room or rooms[trajectory.sampling.reflection_room]

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
        rows = [_Row()] + [_Row(unconditional=True)] * paired
        codes = trajectory.source_codes
        start = None if codes is None else self._code_source(codes)
        for row in rows:
            self._begin(row, item, start, row.unconditional or item.blank_prompt)
        last = wanted[-1]
        first = 0 if sampling.history == "all" else max(last - 1, 0)
        for number in range(first, last + 1):
            segment = trajectory.segments[2 * number]
            codes = segment.token_ids
            key = self._keys(index, 2 * number, 0, codes, drawn) if number in wanted else None
            if number < last and segment.context_ids is not None:
                codes = segment.context_ids
            source = self._code_source(codes)
            for row in rows:
                if number > first:
                    row.add(self.templates.look)
                    self._pass_over(row, item, number - 1)
                row.add(source, key, len(source))
        self.rows.extend(rows)

    def _pass_over(self, row: _Row, item: TrainItem, number: int) -> None:
        """A reflection that nobody scores, in its room, and what precedes the next image."""
        _, words, room = self._reflection(item, number)
        end = row.next_position + room
        row.add(words)
        row.next_position = end
        row.add(self.templates.redraw)

    def _look(self, index: int, item: TrainItem, wanted: list[int]) -> None:
        """The looking sequence up to the last wanted reflection."""
        trajectory, last = item.trajectory, wanted[-1]
        if len(item.images) <= last:
            raise ValueError(f"trajectory {trajectory.id}: a trained reflection needs the pixels of its image")
        if trajectory.sampling.verdict_threshold is not None:
            raise ValueError(
                f"trajectory {trajectory.id}: its verdicts were decided by a threshold; a reflection can be trained "
                "on only if sampling.verdict_threshold is None"
            )
        row, num_patches = _Row(), len(trajectory.segments[0])
        self._begin(row, item, None, item.blank_prompt)
        for number in range(0 if trajectory.sampling.history == "all" else last, last + 1):
            row.add(_PIXEL + len(self.images) * num_patches + np.arange(num_patches))
            self.images.append(item.images[number])
            row.add(self.templates.look)
            end = row.next_position + self._reflection(item, number)[2]
            if number not in wanted:
                self._pass_over(row, item, number)
                continue
            self._say(row, index, item, number)
            if number < last:
                row.next_position = end
                row.add(self.templates.redraw)
        self.rows.append(row)

    def _say(self, row: _Row, index: int, item: TrainItem, number: int) -> None:
        """A reflection that is scored."""
        ids, words, _ = self._reflection(item, number)
        sampling, segment = item.trajectory.sampling, 2 * number + 1
        scored = ids if self.options.train_eos else words
        settings = (1.0, sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
        start = 0
        if self.options.verdict == "restricted":
            choices = [self.templates.no, self.templates.yes]
            if ids[0] not in choices:
                raise ValueError(f"trajectory {item.trajectory.id}: the reflection starts with neither Yes nor No")
            target = np.array([choices.index(ids[0])])
            row.add(ids[:1], self._keys(index, segment, 0, target, Distribution("verdict", *settings)), 1)
            start = 1
        key = None
        if len(scored) > start:
            key = self._keys(index, segment, start, scored[start:], Distribution("text", *settings))
        row.add(words[start:], key, len(scored) - start)

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
            context, read = np.zeros(len(rows), np.int64), []
            for r, row in enumerate(rows):
                source[r, : row.used] = np.concatenate(row.sources)[: row.used]
                positions[r, : row.used] = np.concatenate(row.positions)[: row.used]
                context[r] = row.context if self.options.context == "constant" else 0
                for first, key, count in row.scored:
                    at = unconditional if row.unconditional else conditional
                    at[key : key + count] = num_read + np.arange(count)
                    read.append(r * longest + first + np.arange(count))
                    num_read += count
            passes.append((source, positions, np.concatenate(read), context))
            start += len(rows)
        return self._replay(passes, conditional, unconditional)

    def _replay(self, passes: list, conditional: np.ndarray, unconditional: np.ndarray) -> Replay:
        text_ids = np.unique(np.concatenate([source[source < _CODE] for source, *_ in passes] or [np.zeros(1, int)]))
        for source, *_ in passes:
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
