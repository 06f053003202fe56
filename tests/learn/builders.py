"""Small trajectories and train items for the tests of `rlpipe.learn`."""

from __future__ import annotations

import numpy as np

from rlpipe.learn.replay import ReplayOptions, segment_logprobs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import Config
from rlpipe.types import Prompt, Sampling, Segment, SegmentCredit, TrainItem, Trajectory

PROMPTS = ("a photo of two red circles", "a photo of a blue square", "a photo of a green star")
ANSWERS = ("No, there is one red circle, not two.", "Yes, there is a blue square.", "No, there is none.")
WHOLE = SegmentCredit(advantage=1.0)


def image(policy: JanusPolicy, rng: np.random.Generator) -> Segment:
    return Segment("image", rng.integers(0, policy.codebook_size, policy.num_image_tokens))


def pixels(policy: JanusPolicy, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (policy.image_size, policy.image_size, 3)).astype(np.uint8)


def item(
    policy: JanusPolicy,
    index: int = 0,
    num_segments: int = 3,
    sampling: Sampling | None = None,
    credits: tuple[SegmentCredit, ...] | None = None,
    blank_prompt: bool = False,
    reencoded: bool = False,
) -> TrainItem:
    """Random image [, reflection [, random image]] on one of three prompts; all trained by default."""
    rng = np.random.default_rng(index)
    answer = np.array(policy.templates.reflection(ANSWERS[index % 3]))
    segments = [image(policy, rng), Segment("text", answer), image(policy, rng)][:num_segments]
    if reencoded:
        codes = rng.integers(0, policy.codebook_size, policy.num_image_tokens)
        segments[0] = Segment("image", segments[0].token_ids, context_ids=codes)
    trajectory = Trajectory(
        id=f"t{index}",
        prompt=Prompt(f"p{index % 3}", PROMPTS[index % 3]),
        segments=tuple(segments),
        sampling=sampling or Sampling(seed=index),
        verdicts=(answer[0] == policy.templates.yes,)[: num_segments - 1],
    )
    return TrainItem(trajectory, (pixels(policy, rng),), credits or (WHOLE,) * num_segments, (), blank_prompt)


def with_logprobs(
    policy: JanusPolicy, items: list[TrainItem], noise: float = 0.05, options: ReplayOptions | None = None
) -> list[TrainItem]:
    """The items with behaviour and reference log-probs near those of `policy`, random advantages, and KL."""
    rng = np.random.default_rng(99)
    results = []
    for example, known in zip(items, segment_logprobs(policy, items, options), strict=True):
        near = [[(v + noise * rng.normal(size=len(v))).astype(np.float32) for v in known] for _ in range(2)]
        trajectory = example.trajectory
        segments = [
            Segment(s.kind, s.token_ids, logprobs, s.context_ids)
            for s, logprobs in zip(trajectory.segments, near[0], strict=True)
        ]
        trajectory = Trajectory(
            trajectory.id, trajectory.prompt, tuple(segments), trajectory.sampling, 0, trajectory.verdicts
        )
        credits = tuple(SegmentCredit(float(rng.normal()), 1.0) for _ in segments)
        results.append(TrainItem(trajectory, example.images, credits, tuple(near[1]), example.blank_prompt))
    return results


def config(path, **learner) -> Config:
    """A configuration with the given policy and learner settings."""
    result = Config()
    result.policy.path = str(path)
    for name, value in {"warmup_steps": 1, "schedule": "constant", "lr": 1e-3, **learner}.items():
        setattr(result.learner, name, value)
    return result
