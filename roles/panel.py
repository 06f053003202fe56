"""The scorers of a run as one: asking them while images are still drawn, putting their answers together, giving up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray import ObjectRef

from rlpipe.config import Config, CreditSection
from rlpipe.learn.advantage import final_image_of
from rlpipe.reward.combine import combine, looks_at
from rlpipe.reward.service import ScoreCounts
from rlpipe.types import ImageScore, Rollout, Score
from roles.batch import Batch, Chunk, ScoresMissing
from roles.group import ActorPool, RoleError
from roles.reward import longest_s
from roles.work import GroupRecord, ImagesRecord, ScoreRecord, image_id


class FailureWindow:
    """The last scores of one scorer; too many that are missing end the run.

    step_size: scores of one step at least; a smaller number of them says nothing.
    """

    def __init__(self, name: str, section: CreditSection, step_size: int) -> None:
        self.name, self.bound, self.step_size = name, section.max_failed_share, step_size
        self._missing: deque[bool] = deque(maxlen=max(section.failed_window, step_size))
        self._reason = ""

    def add(self, scores: Sequence[Score]) -> None:
        """Raises ScoresMissing, with the scorer's name, the share and the last reason."""
        self._missing.extend(score.missing for score in scores)
        self._reason = next((s.error for s in reversed(scores) if s.missing), self._reason) or "no reason given"
        missing, total = sum(self._missing), len(self._missing)
        if total >= self.step_size and missing > self.bound * total:
            raise ScoresMissing(
                f"reward/{self.name}: {missing} of its last {total} scores are missing ({missing / total:.0%}), a "
                f"larger share than credit.max_failed_share={self.bound:g}; last reason: {self._reason}"
            )


class Panel:
    """The scorers of a configuration, each a pool of reward actors.

    panel = Panel(config, pools)
    task = panel.ask(batch, 0, images, requests)            # one scorer, in the background
    """

    def __init__(self, config: Config, pools: Sequence[ActorPool]) -> None:
        self.config, self.pools = config, list(pools)
        step_size = config.train.prompts_per_step * config.train.group_size
        self._windows = {s.name: FailureWindow(s.name, config.credit, step_size) for s in config.reward if s.weight > 0}
        self._most_images = config.rollout.groups_per_call * config.train.group_size * config.rollout.max_images
        self._tasks: set[asyncio.Task] = set()

    def ask(self, batch: Batch, place: int, images: ImagesRecord, requests: ObjectRef) -> asyncio.Task:
        """Have finished images scored by the scorer at this place; whoever awaits the task gets the errors."""
        task = asyncio.create_task(self._ask(batch, place, images, requests))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self, batch: Batch, place: int, images: ImagesRecord, requests: ObjectRef) -> ScoreRecord:
        """Scores of one scorer; all of them missing, with the reason, where its actors are lost over and over."""
        pool, section = self.pools[place], self.config.reward[place]
        try:
            record = await pool.call("score", requests, timeout_s=longest_s(section, self._most_images))
        except RoleError as error:
            record = missing_scores(images.ids, str(error))
        at_once = max(len(pool.replicas), 1) * section.concurrency
        batch.watch.add("score", record.counts.seconds / at_once)
        batch.watch.add("prepare", record.counts.prepare_seconds / at_once)
        batch.count(section.name, record)
        if section.name in self._windows:
            self._windows[section.name].add(record.scores)
        return record

    def together(self, found: Sequence[dict[str, Score]], record: GroupRecord) -> tuple[tuple[ImageScore, ...], ...]:
        """Per member of a group and image what all scorers together say; `found`: by scorer the scores by image id."""
        rule = self.config.credit.rule
        return tuple(
            self._images(found, outline, num_images, final_image_of(outline.trajectory, rule))
            for outline, num_images in zip(record.outlines, record.num_images, strict=True)
        )

    def _images(
        self, found: Sequence[dict[str, Score]], outline: Rollout, num_images: int, final: int
    ) -> tuple[ImageScore, ...]:
        sections = self.config.reward

        def one(number: int) -> Iterator[Score | None]:
            name = image_id(outline.trajectory.id, number)
            for section, scores in zip(sections, found, strict=True):
                yield scores[name] if looks_at(section, number == 0, number == final) else None

        return tuple(combine(sections, tuple(one(number)), number == final) for number in range(num_images))

    def close(self) -> None:
        """Ask nothing any more."""
        for task in self._tasks:
            task.cancel()


class Drawing:
    """What has come of a chunk: groups, and scores that are asked for while the rest is drawn.

    drawing = Drawing(chunk, panel)
    await pool.stream("generate", ..., begin=drawing.begin)
    scores = await drawing.scores()             # per group, member and image
    """

    def __init__(self, chunk: Chunk, panel: Panel) -> None:
        self.chunk, self._panel = chunk, panel
        self.groups: list[tuple[GroupRecord, ObjectRef]] = []
        self.seconds = 0.0
        self._asked: list[tuple[int, ImagesRecord, asyncio.Task]] = []

    def begin(self) -> Callable[[Any, ObjectRef], None]:
        """Take what a worker sends, from its start; what came of one that was lost may be of older weights."""
        self.forget()
        return self._take

    def forget(self) -> None:
        for _, _, task in self._asked:
            task.cancel()
        self.groups, self._asked = [], []

    def _take(self, record: Any, reference: ObjectRef) -> None:
        if isinstance(record, ImagesRecord):
            batch = self.chunk.batch
            for place in record.scorers:
                self._asked.append((place, record, self._panel.ask(batch, place, record, reference)))
        elif isinstance(record, GroupRecord):
            self.groups.append((record, reference))
        else:
            self.seconds = record.seconds

    async def scores(self) -> list[tuple[tuple[ImageScore, ...], ...]]:
        """Per group, member and image what all scorers together say, when all that was asked is answered."""
        records = await asyncio.gather(*(task for _, _, task in self._asked))
        found: list[dict[str, Score]] = [{} for _ in self._panel.pools]
        for (place, asked, _), record in zip(self._asked, records, strict=True):
            found[place].update(zip(asked.ids, record.scores, strict=True))
        return [self._panel.together(found, record) for record, _ in self.groups]


def missing_scores(ids: Sequence[str], reason: str) -> ScoreRecord:
    """The answer of a scorer that cannot be asked."""
    scores = tuple(Score(name, None, error=reason) for name in ids)
    return ScoreRecord(0.0, scores, ScoreCounts(requests=len(ids), missing=len(ids)))
