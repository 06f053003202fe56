"""Supervised batches of the sub-tasks: draw, judge, redraw (paper, section 3.2), edit.

An example is a trajectory whose tokens nobody sampled; credits say which segments are targets:

    draw    image*                        cross-entropy on the image
    judge   image, reflection*            cross-entropy on the reflection, the verdict weighted apart
    redraw  image, reflection, image*     cross-entropy on the second image
    edit    (source image) image*         cross-entropy on the edited image

Judgements and redrawings may have earlier images, each with its reflection, in front: image, reflection, image, ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple, Protocol

import numpy as np

from rlpipe.config import Config, SftSection
from rlpipe.types import Prompt, Sampling, Segment, SegmentCredit, TrainItem, Trajectory

TASKS = ("draw", "judge", "redraw", "edit")
TARGET, CONTEXT = SegmentCredit(ce=1.0), SegmentCredit()


class Examples(Protocol):
    """A source of examples: `count` of one sub-task, chosen by `rng` alone."""

    def draw(self, rng: np.random.Generator, count: int) -> list[TrainItem]: ...

    def judge(self, rng: np.random.Generator, count: int) -> list[TrainItem]: ...

    def redraw(self, rng: np.random.Generator, count: int) -> list[TrainItem]: ...


class Rejected(NamedTuple):
    """An earlier image of a trajectory: its codes int64 [N], why it was rejected (int64 [T]), and, where it is
    looked at, its pixels uint8 [H, W, 3]."""

    codes: np.ndarray
    answer: np.ndarray
    image: np.ndarray | None = None


def draw_item(prompt: Prompt, codes: np.ndarray, sampling: Sampling) -> TrainItem:
    """An image to draw; codes int64 [N]."""
    trajectory = Trajectory(prompt.id, prompt, (Segment("image", codes),), sampling)
    return TrainItem(trajectory, (), (TARGET,))


def judge_item(
    prompt: Prompt,
    codes: np.ndarray,
    image: np.ndarray,
    answer: np.ndarray,
    yes: bool,
    sampling: Sampling,
    earlier: Sequence[Rejected] = (),
    truncated: bool = False,
) -> TrainItem:
    """An image (uint8 [H, W, 3]) to judge; `answer` int64 [T] ends with end-of-sentence unless it is truncated."""
    segments = (*_segments(earlier), Segment("image", codes), Segment("text", answer))
    verdicts, cut = (False,) * len(earlier) + (yes,), (False,) * len(earlier) + (truncated,)
    trajectory = Trajectory(prompt.id, prompt, segments, sampling, verdicts=verdicts, truncated=cut)
    images = (*(seen.image for seen in earlier), image)
    return TrainItem(trajectory, images, (CONTEXT,) * (len(segments) - 1) + (TARGET,))


def redraw_item(
    prompt: Prompt,
    codes: np.ndarray,
    answer: np.ndarray,
    target: np.ndarray,
    sampling: Sampling,
    earlier: Sequence[Rejected] = (),
) -> TrainItem:
    """A wrong image, why it is wrong, and the image to draw instead."""
    rejected = [*earlier, Rejected(codes, answer)]
    segments = (*_segments(rejected), Segment("image", target))
    no, cut = (False,) * len(rejected), (False,) * len(rejected)
    trajectory = Trajectory(prompt.id, prompt, segments, sampling, verdicts=no, truncated=cut)
    return TrainItem(trajectory, (), (CONTEXT,) * (len(segments) - 1) + (TARGET,))


def edit_item(prompt: Prompt, source_codes: np.ndarray, codes: np.ndarray, sampling: Sampling) -> TrainItem:
    """An image to draw from another one by an instruction; both int64 [N]."""
    trajectory = Trajectory(prompt.id, prompt, (Segment("image", codes),), sampling, source_codes=source_codes)
    return TrainItem(trajectory, (), (TARGET,))


def _segments(rejected: Sequence[Rejected]) -> list[Segment]:
    return [s for seen in rejected for s in (Segment("image", seen.codes), Segment("text", seen.answer))]


class SftMixture:
    """Batches of one sub-task each, the task drawn per step by ratio; a pure function of (seed, step).

    mixture = SftMixture(config.sft, examples, seed=0)
    items = mixture.batch(step)
    """

    def __init__(self, section: SftSection, examples: Examples, seed: int) -> None:
        ratios = {task: getattr(section, task) for task in TASKS}
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
        return replace(item, blank_prompt=True)


def supervised_sampling(sampling: Sampling) -> Sampling:
    """The layout of `sampling`, without what changes the distribution: supervised tokens are scored under the model's
    own one, whatever the guidance and truncation of rollouts (official)."""
    return replace(
        sampling,
        guidance=1.0,
        image_temperature=1.0,
        image_top_k=0,
        image_top_p=1.0,
        text_temperature=1.0,
        text_top_k=0,
        text_top_p=1.0,
    )


def build_mixture(config: Config, sampling: Sampling, device: str = "cpu") -> SftMixture:
    """The mixture of `sft.data` and `sft.edits`, or of the tiny world's generator where the former is empty."""
    from rlpipe.data.examples import EditExamples, LabelExamples, open_store
    from rlpipe.data.labels import is_label_data
    from rlpipe.world.examples import WorldExamples

    section, sampling = config.sft, supervised_sampling(sampling)
    labelled = is_label_data(section) and section.draw + section.judge + section.redraw > 0
    sources: dict[str, Callable] = {}
    if labelled or section.edit > 0:
        store, templates = open_store(config, Path(config.run.dir) / "codes", device)
    if labelled:
        examples = LabelExamples.prepare(section, store, templates, sampling, config.seed)
        sources |= {task: getattr(examples, task) for task in TASKS[:3]}
    elif section.draw + section.judge + section.redraw > 0:
        path = config.policy.path
        world = WorldExamples.prepare(section.data, path, section.num_samples, sampling, config.seed)
        sources |= {task: getattr(world, task) for task in TASKS[:3]}
    if section.edit > 0:
        sources["edit"] = EditExamples.prepare(section, store, templates, sampling).edit
    return SftMixture(section, SimpleNamespace(**sources), config.seed)
