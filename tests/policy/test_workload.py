"""The lengths that a plan expects against those of trajectories that are laid out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlpipe.learn.layout import lay_out
from rlpipe.learn.replay import ReplayOptions
from rlpipe.policy.workload import Workload
from rlpipe.schema import Config
from rlpipe.types import Prompt, Sampling, Segment, SegmentCredit, TrainItem, Trajectory

WORDS = 7


def settings(**keys) -> Config:
    config = Config()
    config.rollout.max_reflection_tokens, config.rollout.max_images = WORDS, keys.pop("max_images", 2)
    config.loss.context = keys.pop("context", "live")
    for key, value in keys.items():
        setattr(config.rollout, key, value)
    return config


def item(policy, config: Config, images: int, looks: int) -> TrainItem:
    """A trajectory of so many images and reflections, all trained."""
    rng, rollout = np.random.default_rng(0), config.rollout
    sampling = Sampling(
        guidance=rollout.guidance,
        max_reflection_tokens=WORDS,
        max_images=rollout.max_images,
        history=rollout.history,
        redraw_context=rollout.redraw_context,
        reflection_room="exact",
    )
    segments: list[Segment] = []
    for number in range(images):
        codes = rng.integers(0, policy.codebook_size, (2, policy.num_image_tokens))
        segments.append(
            Segment("image", codes[0], context_ids=codes[1] if rollout.redraw_context != "sampled" else None)
        )
        if number < looks:
            segments.append(Segment("text", np.array([policy.templates.no, *[9] * (WORDS - 2), policy.templates.eos])))
    pixels = np.zeros((policy.image_size, policy.image_size, 3), np.uint8)
    trajectory = Trajectory("t", Prompt("p", "a photo"), tuple(segments), sampling, verdicts=(False,) * looks)
    return TrainItem(trajectory, (pixels,) * looks, (SegmentCredit(1.0),) * len(segments))


CASES = [
    {"images": 1},
    {"images": 2},
    {"images": 2, "guidance": 5.0},
    {"images": 2, "guidance": 5.0, "redraw_context": "reencoded"},
    {"images": 2, "context": "constant"},
    {"images": 3, "max_images": 3},
    {"images": 3, "max_images": 3, "history": "all"},
    {"images": 3, "max_images": 4, "history": "all", "context": "constant"},
    {"images": 1, "max_images": 1},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_learner_sees_as_many_tokens_as_a_plan_expects(tiny_policy, case):
    keys = dict(case)
    images = keys.pop("images")
    config = settings(**keys)
    work = Workload(config, tiny_policy.num_image_tokens, len(tiny_policy.templates.prompt("a photo")), WORDS)
    expected = work.replayed(images)
    made = item(tiny_policy, config, images, work.looks(images))
    options = ReplayOptions(context=config.loss.context)
    lengths = lay_out([made], tiny_policy.templates, options).lengths
    assert len(lengths) == len(expected)
    # A plan takes both strings around a reflection for longer than they are, and counts inputs that nobody reads.
    frames = [tiny_policy.templates.look, tiny_policy.templates.redraw]
    slack = 2 * images * max(abs(work.frame - len(frame)) for frame in frames) + 2 * images
    for seen, planned in zip(sorted(lengths), sorted(expected), strict=True):
        assert seen <= planned <= seen + slack


def test_the_mean_trajectory_lies_between_the_shortest_and_the_longest():
    work = Workload.expected(settings(max_images=3, guidance=5.0), 36)
    lengths = [sum(work.replayed(images)) for images in (1, 2, 3)]
    assert min(lengths) < work.tokens < max(lengths) == work.longest_trajectory
    # Half say Yes, a quarter say it of the second image.
    assert work.tokens == pytest.approx(np.dot(lengths, [0.5, 0.25, 0.25]))


def test_drawing_always_makes_every_trajectory_the_longest():
    work = Workload.expected(settings(redraw="always"), 36)
    assert work.tokens == work.longest_trajectory


def test_one_image_without_a_reflection_is_one_sequence():
    work = Workload.expected(settings(program="draw"), 36)
    assert work.replayed(1) == [work.prompt + 36] and work.looks(1) == 0
    assert replace(work, config=settings(program="edit")).replayed(1) == [work.prompt + 36 + 36]
