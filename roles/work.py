"""What the driver and the actors send each other: small records; pixels go by reference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from ray import ObjectRef
from ray.actor import ActorHandle

from rlpipe.config import RolloutSection
from rlpipe.reward.service import ScoreCounts
from rlpipe.types import Prompt, Rollout, Sampling, Score, Segment, SegmentCredit


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """Draw `size` trajectories of one prompt; `ordinal` is the prompt's place in the endless stream of prompts."""

    ordinal: int
    prompt: Prompt
    size: int
    seed: int

    def ids(self) -> list[str]:
        return [f"{self.ordinal}-{member}" for member in range(self.size)]

    def samplings(self, section: RolloutSection) -> list[Sampling]:
        """How each member is drawn; `branches` in a row share the first image of the first of them."""
        seeds = [trajectory_seed(self.seed, self.ordinal, member) for member in range(self.size)]
        first = [seeds[member - member % section.branches] for member in range(self.size)]
        return [
            replace(sampling_of(section, seed), first_seed=None if seed == other else other)
            for seed, other in zip(seeds, first, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """What the driver knows of a drawn group; the object that comes with it is a tuple of Rollout.

    outlines:   per member its trajectory without tokens: prompt, kinds and lengths of segments, verdicts.
    num_images: per member the images that it has and that are to be scored.
    num_drawn:  images of the group, those that branches share counted once.
    """

    ordinal: int
    policy_version: int
    outlines: tuple[Rollout, ...]
    num_images: tuple[int, ...]
    num_drawn: int
    num_text_tokens: tuple[int, ...]
    truncated: int


@dataclass(frozen=True, slots=True)
class ImagesRecord:
    """Finished images that can be scored; the object that comes with it is a list of ScoreRequest.

    scorers: places in the configuration's `reward` of those that are to be asked.
    ids:     of the requests, in order (see `image_id`).
    """

    scorers: tuple[int, ...]
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DrawRecord:
    """What one call of a rollout worker did; the last record of its stream."""

    worker: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """Scores in the order of the requests, and what it took to get them."""

    seconds: float
    scores: tuple[Score, ...]
    counts: ScoreCounts = ScoreCounts()


@dataclass(frozen=True, slots=True)
class ExamplesRecord:
    """What a supervised batch holds: `count` examples of one sub-task."""

    seconds: float
    task: str
    count: int


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of a group: `credits[i]` are those of member i's segments, None where another rank trains it.

    rollouts:     reference to a tuple of Rollout.
    ref_logprobs: reference to one tuple of float32 [T] arrays per member, or None without a KL term.
    """

    rollouts: ObjectRef
    credits: tuple[tuple[SegmentCredit, ...] | None, ...]
    ref_logprobs: ObjectRef | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A trajectory to be shown: member of a group, scores of its images, rewards of its reflections (NaN: none),
    advantages of all its segments."""

    rollouts: ObjectRef
    member: int
    scores: tuple[Score, ...]
    reflection_rewards: tuple[float, ...]
    advantages: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies: `nbytes` bytes from `offset` in bucket number `bucket`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bucket: int
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Manifest:
    """A published version of the weights.

    checksum: of the whole version; `sums` are those of the slots' tensors.
    buckets:  references to uint8 arrays in the object store; none where the weights travel by a channel alone.
    """

    version: int
    checksum: int
    slots: tuple[Slot, ...]
    sums: tuple[int, ...]
    buckets: tuple[ObjectRef, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


@dataclass(frozen=True, slots=True)
class Channel:
    """A collective group of the learner's first rank, which is its rank 0, and rollout workers.

    name:      of this group, unlike that of any other at the same address.
    host, port: where its members meet.
    learner:   whom to ask for the weights if the group breaks.
    timeout_s: longest wait for the others, each time.
    """

    name: str
    host: str
    port: int
    size: int
    backend: str
    timeout_s: float
    learner: ActorHandle


@dataclass(frozen=True, slots=True)
class Invitation:
    """To receive `version` as a rank of a channel."""

    channel: Channel
    rank: int
    version: int


@dataclass(frozen=True, slots=True)
class Ack:
    """A worker's word for what its model holds now, and whether it came by the channel it was to come by."""

    version: int
    checksum: int
    as_asked: bool = True


def image_id(trajectory_id: str, number: int) -> str:
    """The id of a request for the score of a trajectory's image."""
    return f"{trajectory_id}/{number}"


def trajectory_seed(seed: int, ordinal: int, member: int) -> int:
    """A trajectory's seed, non-negative int63: the same whenever and wherever its group is drawn (again)."""
    digest = hashlib.blake2b(f"{seed}/{ordinal}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sampling_of(section: RolloutSection, seed: int, guidance: float | None = None) -> Sampling:
    """The configured way to draw, with a seed, and another guidance scale if given."""
    return Sampling(
        seed=seed,
        guidance=section.guidance if guidance is None else guidance,
        image_temperature=section.image_temperature,
        image_top_k=section.image_top_k,
        image_top_p=section.image_top_p,
        text_temperature=section.text_temperature,
        text_top_k=section.text_top_k,
        text_top_p=section.text_top_p,
        max_reflection_tokens=section.max_reflection_tokens,
        max_images=section.max_images,
        redraw=section.redraw,
        redraw_context=section.redraw_context,
        history=section.history,
        reflection_room=section.reflection_room,
    )


def outline(rollout: Rollout) -> Rollout:
    """A rollout without pixels, and with zeros of one byte for tokens: credit needs to know how many there are."""
    segments = tuple(Segment(s.kind, np.zeros(len(s), np.uint8)) for s in rollout.trajectory.segments)
    return Rollout(replace(rollout.trajectory, segments=segments, source_codes=None), ())
