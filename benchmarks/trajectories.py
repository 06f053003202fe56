"""Trajectories that nobody drew, for measuring a learner: random codes, words and pixels, every second one says No.

A learner's work depends on lengths and verdicts alone, so nothing has to be sampled first, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlpipe.data.prompts import load_prompts
from rlpipe.learn.replay import ReplayOptions, segment_logprobs
from rlpipe.paths import resolve_path
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Prompt, Sampling, Segment, SegmentCredit, TrainItem, Trajectory

PROMPTS = "rlpipe/world/assets/prompts_test.jsonl"
SPANS = 3
"""Of credit v1: first image, reflection, final image."""


@dataclass(frozen=True)
class Example:
    """A trajectory as the learner takes it, and the advantages of its three spans, which it has merged by segment."""

    item: TrainItem
    advantages: tuple[float, float, float]

    @property
    def said_yes(self) -> bool:
        return self.item.trajectory.verdicts[0]

    @property
    def final(self) -> int:
        """The segment that the third span is about: after Yes the first image once more."""
        return 0 if self.said_yes else 2


def examples(
    policy: JanusPolicy,
    count: int,
    words: int,
    guidance: float = 5.0,
    reencoded: bool = False,
    options: ReplayOptions | None = None,
) -> list[Example]:
    """`count` trajectories of groups of eight, with the reference's log-probs a little away from the policy's own.

    words: tokens of each reflection, end-of-sentence included. reencoded: images are looked back at by other codes.
    Numbers 0, 2, 4, ... say No and draw again; the others say Yes, and have their first image credited twice (v1).
    """
    rng, prompts = np.random.default_rng(0), load_prompts(str(resolve_path(PROMPTS)))
    sampling = Sampling(guidance=guidance, max_reflection_tokens=words, reflection_room="exact")
    made = [_example(policy, rng, prompts[i // 8 % len(prompts)], i, words, sampling, reencoded) for i in range(count)]
    known = segment_logprobs(policy, [example.item for example in made], options, micro_batch=2)
    return [_with_reference(example, logprobs, rng) for example, logprobs in zip(made, known, strict=True)]


def _example(
    policy: JanusPolicy,
    rng: np.random.Generator,
    prompt: Prompt,
    number: int,
    words: int,
    sampling: Sampling,
    reencoded: bool,
) -> Example:
    templates, yes = policy.templates, bool(number % 2)

    def image() -> Segment:
        codes = rng.integers(0, policy.codebook_size, (2, policy.num_image_tokens))
        return Segment("image", codes[0], context_ids=codes[1] if reencoded else None)

    middle = rng.integers(templates.eos + 1, policy.janus.config.text_config.vocab_size, words - 2)
    text = Segment("text", np.array([templates.yes if yes else templates.no, *middle, templates.eos]))
    segments = (image(), text) if yes else (image(), text, image())
    first, reflection, final = (float(advantage) for advantage in rng.normal(size=SPANS))
    credits = (SegmentCredit(first, 1.0), SegmentCredit(reflection, 1.0), SegmentCredit(final, 1.0))
    if yes:
        credits = (SegmentCredit(first + final, 2.0), credits[1])
    trajectory = Trajectory(f"t{number}", prompt, segments, sampling, verdicts=(yes,), truncated=(False,))
    pixels = rng.integers(0, 256, (policy.image_size, policy.image_size, 3)).astype(np.uint8)
    return Example(TrainItem(trajectory, (pixels,), credits), (first, reflection, final))


def _with_reference(example: Example, known: Sequence[np.ndarray], rng: np.random.Generator) -> Example:
    near = tuple((values + 0.1 * rng.normal(size=len(values))).astype(np.float32) for values in known)
    return replace(example, item=replace(example.item, ref_logprobs=near))
