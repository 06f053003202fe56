"""A trajectory as sequences: index arithmetic on the CPU, no model.

    drawing        prompt | image 1 (codes) | look | reflection | redraw | image 2 (codes)
    unconditional  the same behind a blank prompt; only where guidance asks for it
    looking        prompt | image 1 (pixels) | look | reflection

The drawing sequences give the log-probs of the images, the looking sequences those of the reflections. With
`history: all` both go on behind the second image in the same way; with `history: last` an image or reflection after
the second image has a sequence of its own, which shows it the last image alone. Nothing is laid out that no trained
token needs, and the sequences of many trajectories stand behind one another in one row, without padding.
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

# What a sequence is made of: vocabulary ids as they are, codes and patches of the images looked at above these.
_CODE, _PIXEL = 1 << 40, 1 << 41


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
class Group:
    """Scored tokens of one distribution.

    at:            int64 [M], indices into the row of the hidden states that the head reads.
    unconditional: int64 [M] or None, those of the same tokens in the unconditional sequences.
    target:        int64 [M], the tokens: codes, vocabulary ids, or 0 (No) and 1 (Yes).
    """

    distribution: Distribution
    at: torch.Tensor
    unconditional: torch.Tensor | None
    target: torch.Tensor


@dataclass(frozen=True)
class Replay:
    """Items laid out as one row of T tokens, with S scored tokens in the order of `groups`.

    text_ids:  int64 [A], vocabulary ids that occur.  codes: int64 [B], codes that occur.
    images:    uint8 [C, H, W, 3], pixels that are looked at, each once.
    source:    int64 [T], indices into the pool of embeddings (vocabulary ids, then codes, then patches of pixels).
    positions: int64 [T].
    lengths:   of the sequences in the row, longest first.
    context:   bool [T], which inputs are constants; none where the context is live.
    item, segment, offset: int64 [S], where a token comes from; `offset` counts from its segment's start.
    """

    options: ReplayOptions
    text_ids: torch.Tensor
    codes: torch.Tensor
    images: torch.Tensor | None
    source: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]
    context: torch.Tensor
    groups: tuple[Group, ...]
    item: torch.Tensor
    segment: torch.Tensor
    offset: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """T, of what the language model sees."""
        return len(self.source)

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
class _Sequence:
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
    """Sequences and scored tokens of a batch of items. A scored token is known by its key, 0, 1, 2, ..."""

    def __init__(self, templates: Templates, options: ReplayOptions) -> None:
        self.templates, self.options = templates, options
        self.prompts: dict[tuple[bool, str], list[int]] = {}
        self.sequences: list[_Sequence] = []
        self.images: dict[tuple[int, int], np.ndarray] = {}
        self.num_keys = 0
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
        for images in self._drawings(trajectory, [n // 2 for n in trained if n % 2 == 0]):
            self._draw(index, item, images)
        for texts in self._lookings(trajectory, [n // 2 for n in trained if n % 2]):
            self._look(index, item, texts)

    def _drawings(self, trajectory: Trajectory, wanted: list[int]) -> list[list[int]]:
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

    def _lookings(self, trajectory: Trajectory, wanted: list[int]) -> list[list[int]]:
        """Which reflections are scored in one sequence; numbers count the reflections."""
        if wanted and trajectory.sampling.history == "all" and self.options.context == "live":
            return [wanted]
        return [[number] for number in wanted]

    def _begin(self, sequence: _Sequence, item: TrainItem, source: np.ndarray | None, blank: bool = False) -> None:
        """The prompt, its words blank or not; around `source` for an edit."""
        text, t = item.trajectory.prompt.text, self.templates
        if source is not None:
            before, after = t.edit(text)
            before, after = t.blank_edit(before, after) if blank else (before, after)
            for part in (before, source, after):
                sequence.add(part)
            return
        plain = item.trajectory.prompt.metadata.get("roles") == "plain"
        if (plain, text) not in self.prompts:
            self.prompts[plain, text] = (t.plain if plain else t).prompt(text)
        ids = self.prompts[plain, text]
        sequence.add(t.blank(ids) if blank else ids)

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
        sequences = [_Sequence()] + [_Sequence(unconditional=True)] * paired
        codes = trajectory.source_codes
        start = None if codes is None else _CODE + np.asarray(codes, dtype=np.int64)
        for sequence in sequences:
            self._begin(sequence, item, start, sequence.unconditional or item.blank_prompt)
        last = wanted[-1]
        first = 0 if sampling.history == "all" else max(last - 1, 0)
        for number in range(first, last + 1):
            segment = trajectory.segments[2 * number]
            codes = segment.token_ids
            key = self._keys(index, 2 * number, 0, codes, drawn) if number in wanted else None
            if number < last and segment.context_ids is not None:
                codes = segment.context_ids
            source = _CODE + np.asarray(codes, dtype=np.int64)
            for sequence in sequences:
                if number > first:
                    sequence.add(self.templates.look)
                    self._pass_over(sequence, item, number - 1)
                sequence.add(source, key, len(source))
        self.sequences.extend(sequences)

    def _pass_over(self, sequence: _Sequence, item: TrainItem, number: int) -> None:
        """A reflection that nobody scores, in its room, and what precedes the next image."""
        _, words, room = self._reflection(item, number)
        end = sequence.next_position + room
        sequence.add(words)
        sequence.next_position = end
        sequence.add(self.templates.redraw)

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
        sequence, num_patches = _Sequence(), len(trajectory.segments[0])
        self._begin(sequence, item, None, item.blank_prompt)
        for number in range(0 if trajectory.sampling.history == "all" else last, last + 1):
            self.images.setdefault((index, number), item.images[number])
            place = list(self.images).index((index, number))
            sequence.add(_PIXEL + place * num_patches + np.arange(num_patches))
            sequence.add(self.templates.look)
            end = sequence.next_position + self._reflection(item, number)[2]
            if number not in wanted:
                self._pass_over(sequence, item, number)
                continue
            self._say(sequence, index, item, number)
            if number < last:
                sequence.next_position = end
                sequence.add(self.templates.redraw)
        self.sequences.append(sequence)

    def _say(self, sequence: _Sequence, index: int, item: TrainItem, number: int) -> None:
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
            sequence.add(ids[:1], self._keys(index, segment, 0, target, Distribution("verdict", *settings)), 1)
            start = 1
        key = None
        if len(scored) > start:
            key = self._keys(index, segment, start, scored[start:], Distribution("text", *settings))
        sequence.add(words[start:], key, len(scored) - start)

    def finish(self) -> Replay:
        """Sequences to one row, keys to groups of one distribution."""
        self.sequences.sort(key=lambda sequence: -sequence.used)  # Those of one length are neighbours.
        lengths = [sequence.used for sequence in self.sequences]
        starts = np.cumsum([0, *lengths])
        conditional = np.zeros(self.num_keys, np.int64)
        unconditional = np.full(self.num_keys, -1, np.int64)
        for start, sequence in zip(starts, self.sequences, strict=False):
            for first, key, count in sequence.scored:
                at = unconditional if sequence.unconditional else conditional
                at[key : key + count] = start + first + np.arange(count)
        constant = self.options.context == "constant"
        contexts = [np.arange(sequence.used) < sequence.context * constant for sequence in self.sequences]
        text_ids, codes, source = self._pool(
            _joined([np.concatenate(sequence.sources)[: sequence.used] for sequence in self.sequences])
        )
        targets = _joined([targets for targets, _ in self.spans])
        places = np.concatenate([s[1] for s in self.spans] or [np.zeros((4, 0), np.int64)], axis=1)
        members = [np.flatnonzero(places[3] == d) for d in range(len(self.distributions))]
        order, tensor = _joined(members), torch.from_numpy
        groups = []
        for drawn, keys in zip(self.distributions, members, strict=True):
            twin = tensor(unconditional[keys]) if drawn.guidance != 1.0 else None
            groups.append(Group(drawn, tensor(conditional[keys]), twin, tensor(targets[keys])))
        return Replay(
            options=self.options,
            text_ids=tensor(text_ids),
            codes=tensor(codes),
            images=tensor(np.stack(list(self.images.values()))) if self.images else None,
            source=tensor(source),
            positions=tensor(
                _joined([np.concatenate(sequence.positions)[: sequence.used] for sequence in self.sequences])
            ),
            lengths=tuple(lengths),
            context=tensor(_joined(contexts).astype(bool)),
            groups=tuple(groups),
            item=tensor(places[0, order]),
            segment=tensor(places[1, order]),
            offset=tensor(places[2, order]),
        )

    @staticmethod
    def _pool(source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vocabulary ids and codes that occur, and `source` as indices into both and the patches behind them."""
        text, pixel = source < _CODE, source >= _PIXEL
        code = ~text & ~pixel
        text_ids, text_places = np.unique(source[text], return_inverse=True)
        codes, code_places = np.unique(source[code] - _CODE, return_inverse=True)
        places = np.empty_like(source)
        places[text], places[code] = text_places, len(text_ids) + code_places
        places[pixel] = source[pixel] - _PIXEL + len(text_ids) + len(codes)
        return text_ids, codes, places


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if len(arrays) else np.zeros(0, np.int64)


def lay_out(items: Sequence[TrainItem], templates: Templates, options: ReplayOptions | None = None) -> Replay:
    """Lay out the trained segments of `items`, and what they need before them, as sequences in one row.

    Raises ValueError, naming the trajectory, for a shape of trajectory that has no layout, a reflection
    longer than its `max_reflection_tokens`, a greedy sample, or (verdict "restricted") a reflection that
    starts with neither Yes nor No.
    """
    layout = _Layout(templates, options or ReplayOptions())
    for index, item in enumerate(items):
        layout.add(index, item)
    return layout.finish()


def num_tokens(item: TrainItem, templates: Templates, options: ReplayOptions | None = None) -> int:
    """How many tokens `lay_out` adds to the row for this item; raises as it does."""
    layout = _Layout(templates, options or ReplayOptions())
    layout.add(0, item)
    return sum(sequence.used for sequence in layout.sequences)
