"""What a trajectory is: draw an image, look at it, draw again; draw alone; edit an image; look at given images.

Each program that draws is a function over a generator that hands out the images as they are finished:

    rollouts = introspect(decoder, prompts, samplings, ids)
    rounds = introspect_rounds(decoder, prompts, samplings, ids)     # yields Round after Round, returns the rollouts
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.batch import Batch, in_chunks, without_end
from rlpipe.rollout.decoder import CODES, Decoder
from rlpipe.rollout.schedule import Schedule
from rlpipe.rollout.wave import Reflections, Wave
from rlpipe.types import Prompt, Rollout, Sampling, Segment, Trajectory

REFLECTION = 1
"""Stage of the first reflection's noise: stages are the numbers of the segments."""
GREEDY_WORDS = Sampling(text_temperature=0.0)


class Look(NamedTuple):
    """What the policy says of an image: P(yes) over {Yes, No}, and its words."""

    p_yes: float
    reflection: str


class Round(NamedTuple):
    """Images that were finished together; those of round 0 are the first ones of their rows.

    rows:     numbers of the rows that were drawn for. images: uint8 [H, W, 3] each, the same array for branches.
    accepted: whether an earlier image of the row was said to match; drawn nevertheless with `redraw: always`.
    """

    number: int
    rows: tuple[int, ...]
    images: Sequence[np.ndarray]
    accepted: tuple[bool, ...]


Rounds = Generator[Round, None, list[Rollout]]


def finish(rounds: Rounds) -> list[Rollout]:
    """The rollouts that a program ends with."""
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            return end.value


@dataclass
class _Story:
    """A rollout in the making."""

    segments: list[Segment] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)

    def add_text(self, segment: Segment, said_yes: bool, truncated: bool) -> None:
        self.segments.append(segment)
        self.verdicts.append(said_yes)
        self.truncated.append(truncated)


def introspect(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
    limit: int | None = None,
) -> list[Rollout]:
    """Draw, look, and draw again after a "No" (or always, if so asked): one rollout per row, in order.

    One prompt, sampling and id per row; the samplings may differ in their seeds alone. The last image that is
    allowed is not looked at, except that with `max_images` 1 a row ends with its reflection. What a row yields
    does not depend on the other rows, but for `reflection_room: group`, where rows of one prompt id share a room.

    limit: most rows that are drawn at once (None: all); as rows leave, others take their places, see `schedule.py`.
    """
    return finish(introspect_rounds(decoder, prompts, samplings, ids, policy_version, limit))


@torch.inference_mode()
def introspect_rounds(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
    limit: int | None = None,
) -> Rounds:
    """`introspect`, each round's images before they are looked at."""
    if not prompts:
        return []
    batch = _captioned(decoder, prompts, samplings, ids)
    sampling, yes = batch.sampling, batch.templates.yes
    names = [prompt.id for prompt in prompts]
    schedule = Schedule(batch, limit or len(prompts), names if sampling.reflection_room == "group" else None)
    stories = [_Story() for _ in prompts]
    while (turn := schedule.turn()) is not None:
        wave, contexts = turn
        if contexts is not None:
            for row, codes in zip(wave.rows, contexts.cpu().numpy(), strict=True):
                newest = stories[row].segments[-2]
                stories[row].segments[-2] = replace(newest, context_ids=codes)
        yield from _tell(stories, wave)
        looks = [n for n, number in enumerate(wave.rounds) if number + 1 < max(sampling.max_images, 2)]
        for part in schedule.parts(wave.pick(looks)):
            part.said = batch.look(part)
            part.rooms = _rooms(sampling, [names[row] for row in part.rows], part.said, batch.templates.eos)
            for number, row in enumerate(part.rows):
                tokens, logprobs = part.said.tokens[number], part.said.logprobs[number]
                room = part.rooms[number] if sampling.reflection_room == "group" else None
                text = Segment("text", tokens, logprobs, room=room)
                stories[row].add_text(text, bool(tokens[0] == yes), part.said.truncated[number])
            no = [n for n, row in enumerate(part.rows) if not stories[row].verdicts[-1] or sampling.redraw == "always"]
            if no and sampling.max_images > 1:
                schedule.wait(part.pick(no))
        wave = part = turn = contexts = None  # What they hold is free again, but for the rows that wait.
    return [
        Rollout(
            Trajectory(
                id=ids[row],
                prompt=prompts[row],
                segments=tuple(story.segments),
                sampling=samplings[row],
                policy_version=policy_version,
                verdicts=tuple(story.verdicts),
                truncated=tuple(story.truncated),
            ),
            tuple(story.pixels),
            texts=tuple(batch.templates.text(s.token_ids) for s in story.segments if s.kind == "text"),
        )
        for row, story in enumerate(stories)
    ]


def _rooms(sampling: Sampling, groups: list[str], reflections: Reflections, eos: int) -> list[int]:
    """Positions that each reflection takes where a later image looks back at it."""
    if sampling.reflection_room == "fixed":
        return [sampling.max_reflection_tokens] * len(groups)
    if sampling.reflection_room == "exact":
        return [len(without_end(tokens, eos)) for tokens in reflections.tokens]
    longest: dict[str, int] = {}
    for group, tokens in zip(groups, reflections.tokens, strict=True):
        longest[group] = max(longest.get(group, 0), len(tokens))
    return [longest[group] for group in groups]


def draw_only(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
    limit: int | None = None,
) -> list[Rollout]:
    """Without introspection: one image per row. Its tokens are those of `introspect`'s first image."""
    return finish(draw_rounds(decoder, prompts, samplings, ids, policy_version, limit))


@torch.inference_mode()
def draw_rounds(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
    limit: int | None = None,
) -> Rounds:
    """`draw_only`, its images in one round."""
    if not prompts:
        return []
    stories = yield from _first_images(_captioned(decoder, prompts, samplings, ids), limit)
    return [
        Rollout(
            Trajectory(ids[row], prompts[row], tuple(story.segments), samplings[row], policy_version), (*story.pixels,)
        )
        for row, story in enumerate(stories)
    ]


def edit(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    sources: Sequence[np.ndarray],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
    limit: int | None = None,
) -> list[Rollout]:
    """Edit images: one per row, drawn behind the source image's VQ codes and the prompt's text, the instruction.

    sources: uint8 [H, W, 3] of the policy's image size, one per row. Guidance blanks the instruction alone.
    """
    return finish(edit_rounds(decoder, prompts, sources, samplings, ids, policy_version, limit))


@torch.inference_mode()
def edit_rounds(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    sources: Sequence[np.ndarray],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
    limit: int | None = None,
) -> Rounds:
    """`edit`, its images in one round."""
    if not prompts:
        return []
    if len(sources) != len(prompts):
        raise ValueError(f"edit: {len(prompts)} prompts but {len(sources)} source images; give one per prompt")
    codes = _encoded(decoder.policy, sources)
    templates = decoder.policy.templates
    framed = []
    for prompt, source in zip(prompts, codes, strict=True):
        before, after = templates.edit(prompt.text)
        image = (CODES + source).tolist()
        plain, blank = (before, after), templates.blank_edit(before, after)
        framed.append(tuple([*start, *image, *end] for start, end in (plain, blank)))
    common = replace(_common_sampling(prompts, samplings, ids), max_images=1)
    stories = yield from _first_images(Batch(decoder, framed, common, [s.seed for s in samplings]), limit)
    rollouts = []
    for row, story in enumerate(stories):
        trajectory = Trajectory(
            ids[row], prompts[row], tuple(story.segments), samplings[row], policy_version, source_codes=codes[row]
        )
        rollouts.append(Rollout(trajectory, tuple(story.pixels), sources[row]))
    return rollouts


def _encoded(policy: JanusPolicy, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """VQ codes int64 [N] of each image; equal ones are encoded once."""
    size = policy.image_size
    for image in images:
        if image.shape != (size, size, 3) or image.dtype != np.uint8:
            raise ValueError(f"edit: a source image is {image.dtype} {image.shape}; give uint8 ({size}, {size}, 3)")
    distinct = {image.tobytes(): image for image in images}
    codes = in_chunks(policy, "encode_pixels", torch.from_numpy(np.stack(list(distinct.values()))))
    known = dict(zip(distinct, codes.cpu().numpy(), strict=True))
    return [known[image.tobytes()] for image in images]


@torch.inference_mode()
def look(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    images: Sequence[np.ndarray],
    sampling: Sampling = GREEDY_WORDS,
) -> list[Look]:
    """What the policy says of given images (uint8 [H, W, 3], one per prompt); greedy words by default."""
    if not prompts:
        return []
    if len(images) != len(prompts):
        raise ValueError(f"look: {len(prompts)} prompts but {len(images)} images; give one image per prompt")
    batch = _captioned(decoder, prompts, [sampling] * len(prompts), [""] * len(prompts), drawing=False)
    reflections = batch.look(batch.given(torch.from_numpy(np.stack(images))))
    words = map(batch.templates.text, reflections.tokens)
    return [Look(float(p), text) for p, text in zip(reflections.p_yes, words, strict=True)]


def _captioned(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    drawing: bool = True,
) -> Batch:
    """Rows whose prompts are captions."""
    common, templates = _common_sampling(prompts, samplings, ids), decoder.policy.templates
    encoded = {text: templates.prompt(text) for text in {prompt.text: None for prompt in prompts}}
    framed = [(encoded[prompt.text], templates.blank(encoded[prompt.text])) for prompt in prompts]
    seeds = [sampling.seed for sampling in samplings]
    first = [s.seed if s.first_seed is None else s.first_seed for s in samplings]
    return Batch(decoder, framed, common, seeds, drawing, first)


def _first_images(batch: Batch, limit: int | None) -> Generator[Round, None, list[_Story]]:
    """The first images of all rows, and nothing more."""
    stories, schedule = [_Story() for _ in batch.seeds], Schedule(batch, limit or len(batch.seeds))
    while (turn := schedule.turn()) is not None:
        yield from _tell(stories, turn[0])
    return stories


def _tell(stories: list[_Story], wave: Wave) -> Iterator[Round]:
    """Add the newest images to the stories of their rows; they, by rounds."""
    accepted = [any(stories[row].verdicts) for row in wave.rows]
    tokens, logprobs, pixels = (part.cpu().numpy() for part in (*wave.drawn, wave.images))
    shared: dict[int, tuple[Segment, np.ndarray]] = {}
    for number, (row, drawer) in enumerate(zip(wave.rows, wave.drawers, strict=True)):
        if drawer not in shared:
            shared[drawer] = Segment("image", tokens[number].copy(), logprobs[number].copy()), pixels[number]
        segment, image = shared[drawer]
        stories[row].segments.append(segment)
        stories[row].pixels.append(image)
    for count in sorted(set(wave.rounds)):
        here = [n for n, number in enumerate(wave.rounds) if number == count]
        rows, images = tuple(wave.rows[n] for n in here), [stories[wave.rows[n]].pixels[-1] for n in here]
        yield Round(count, rows, images, tuple(accepted[n] for n in here))


def _common_sampling(prompts: Sequence[Prompt], samplings: Sequence[Sampling], ids: Sequence[str]) -> Sampling:
    """What all rows share; errors name the field that differs or is out of range."""
    if not len(prompts) == len(samplings) == len(ids):
        raise ValueError(
            f"rollout: {len(prompts)} prompts, {len(samplings)} samplings, {len(ids)} ids; give one of each per row"
        )
    common = replace(samplings[0], seed=0, first_seed=None)
    for sampling in set(samplings):
        other = replace(sampling, seed=0, first_seed=None)
        if other != common:
            one, two = asdict(common), asdict(other)
            name = next(key for key in one if one[key] != two[key])
            raise ValueError(
                f"rollout: sampling.{name} is {one[name]!r} in one row and {two[name]!r} in another; "
                "rows of one call may differ in their seeds alone, so make one call per setting"
            )
    for name in ("max_images", "max_reflection_tokens"):
        if getattr(common, name) < 1:
            raise ValueError(f"rollout.{name}: {getattr(common, name)}; give 1 or more")
    return common
