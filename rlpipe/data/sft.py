"""Supervised batches of the three sub-tasks: draw, judge, redraw (paper, section 3.2).

An example is a trajectory whose tokens nobody sampled; credits say which segments are targets:

    draw    image*                        cross-entropy on the image
    judge   image, reflection*            cross-entropy on the reflection, the verdict weighted apart
    redraw  image, reflection, image*     cross-entropy on the second image
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from rlpipe.config import SftSection
from rlpipe.types import Prompt, Sampling, Segment, SegmentCredit, TrainItem, Trajectory

TARGET, CONTEXT = SegmentCredit(ce=1.0), SegmentCredit()


class Examples(Protocol):
    """A source of examples: `count` of one sub-task, chosen by `rng` alone."""

    def draw(self, rng: np.random.Generator, count: int) -> list[TrainItem]: ...

    def judge(self, rng: np.random.Generator, count: int) -> list[TrainItem]: ...

    def redraw(self, rng: np.random.Generator, count: int) -> list[TrainItem]: ...


def draw_item(prompt: Prompt, codes: np.ndarray, sampling: Sampling) -> TrainItem:
    """An image to draw; codes int64 [N]."""
    trajectory = Trajectory(prompt.id, prompt, (Segment("image", codes),), sampling)
    return TrainItem(trajectory, (), (TARGET,))


def judge_item(
    prompt: Prompt, codes: np.ndarray, image: np.ndarray, answer: np.ndarray, yes: bool, sampling: Sampling
) -> TrainItem:
    """An image (uint8 [H, W, 3]) to judge; `answer` int64 [T] ends with end-of-sentence."""
    segments = (Segment("image", codes), Segment("text", answer))
    trajectory = Trajectory(prompt.id, prompt, segments, sampling, verdicts=(yes,), truncated=(False,))
    return TrainItem(trajectory, (image,), (CONTEXT, TARGET))


def redraw_item(
    prompt: Prompt, codes: np.ndarray, answer: np.ndarray, target: np.ndarray, sampling: Sampling
) -> TrainItem:
    """A wrong image, why it is wrong, and the image to draw instead."""
    segments = (Segment("image", codes), Segment("text", answer), Segment("image", target))
    trajectory = Trajectory(prompt.id, prompt, segments, sampling, verdicts=(False,), truncated=(False,))
    return TrainItem(trajectory, (), (CONTEXT, CONTEXT, TARGET))


class SftMixture:
    """Batches of one sub-task each, the task drawn per step by ratio; a pure function of (seed, step).

    mixture = SftMixture(config.sft, examples, seed=0)
    items = mixture.batch(step)
    """

    def __init__(self, section: SftSection, examples: Examples, seed: int) -> None:
        ratios = {"draw": section.draw, "judge": section.judge, "redraw": section.redraw}
        self.tasks = [task for task, ratio in ratios.items() if ratio > 0]
        total = sum(ratios[task] for task in self.tasks)
        self.shares = [ratios[task] / total for task in self.tasks]
        self.section, self.examples, self.seed = section, examples, seed

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, step))

    def task(self, step: int) -> str:
        """The sub-task of one optimiser step, the same on every rank."""
        return self.tasks[int(self._rng(step).choice(len(self.tasks), p=self.shares))]

    def batch(self, step: int) -> list[TrainItem]:
        """The items of one optimiser step, `sft.batch_size` in number."""
        task, rng = self.task(step), self._rng(step)
        make: Callable[[np.random.Generator, int], list[TrainItem]] = getattr(self.examples, task)
        items = make(rng, self.section.batch_size)
        if task == "judge":
            return items
        return [self._maybe_blank(item, rng) for item in items]

    def _maybe_blank(self, item: TrainItem, rng: np.random.Generator) -> TrainItem:
        if rng.random() >= self.section.prompt_dropout:
            return item
        return TrainItem(item.trajectory, item.images, item.credits, item.ref_logprobs, blank_prompt=True)


def build_mixture(section: SftSection, policy_path: str, sampling: Sampling, seed: int) -> SftMixture:
    """The mixture of `sft.data`, or of the tiny world's generator where that is empty."""
    from rlpipe.world.examples import WorldExamples

    examples = WorldExamples.prepare(section.data, policy_path, section.num_samples, sampling, seed)
    return SftMixture(section, examples, seed)
