"""Building the set of supervised fine-tuning: workers draw, the judge scores and explains, the driver writes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
from PIL import Image
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayTaskError

from rlpipe.config import Config
from rlpipe.data.factory import Shard, begin, join_shards, label_row, shards_of
from rlpipe.data.labels import write_rows
from rlpipe.policy.templates import check_prompts
from rlpipe.reward.reason import Explainer
from rlpipe.rollout.programs import draw_only
from rlpipe.types import Rollout, ScoreRequest
from roles.batch import ScoresMissing
from roles.group import ActorPool, RoleError
from roles.lanes import in_lanes, stopping
from roles.placement import Demand, connect, with_absolute_paths
from roles.reward import RewardActor, longest_s
from roles.rollout import RolloutWorker
from roles.work import GroupRequest, sampling_of, trajectory_seed

LOSSES = 3
"""Times that the images of one shard may be lost with their worker before the job gives up."""
TELL_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class LabelRecord:
    """Rows of label files for one shard, and the images that got no label, with the last reason."""

    rows: list[dict]
    images: int
    missing: int
    reason: str


class DrawActor(RolloutWorker):
    """A rollout worker that serves the weights it was loaded with."""

    draws_groups = False

    def check(self, shards: list[Shard]) -> None:
        """Raises PromptError naming prompts that are too long for the policy."""
        check_prompts([prompt for shard in shards for prompt in shard.prompts], self.policy.templates)

    def draw(self, requests: list[GroupRequest]) -> tuple[int, list[tuple[Rollout, ...]]]:
        """The number of images, and one tuple of rollouts of one image each per request (call with num_returns=2)."""
        size = self.config.rollout.groups_per_call
        groups = [group for i in range(0, len(requests), size) for group in self._batch(requests[i : i + size])]
        return sum(map(len, groups)), groups

    def _batch(self, requests: Sequence[GroupRequest]) -> list[tuple[Rollout, ...]]:
        prompts = [request.prompt for request in requests for _ in range(request.size)]
        ids = [name for request in requests for name in request.ids()]
        seeds = [trajectory_seed(r.seed, r.ordinal, member) for r in requests for member in range(r.size)]
        samplings = [sampling_of(self.config.rollout, seed) for seed in seeds]
        rollouts = iter(draw_only(self.decoder, prompts, samplings, ids, limit=self.limit))
        return [tuple(next(rollouts) for _ in range(request.size)) for request in requests]


class LabelActor(RewardActor):
    """The judge: scores images, says why, and writes those that were drawn beside the labels."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.reward[0])
        self.factory = config.factory
        question = self.factory.question or self.section.question
        self.explainer = Explainer(
            self.service.scorer, question, self.factory.reason_tokens, self.factory.reason_sentences
        )

    def label(self, shard: Shard, drawn: list[ObjectRef]) -> LabelRecord:
        """Rows for the label file of a shard. `drawn`: reference to its rollouts; empty for images made elsewhere.

        Raises Ray's ObjectLostError if the rollouts are gone.
        """
        if drawn:
            groups = ray.get(drawn[0], timeout=self.section.timeout_s)
            images = [[rollout.images[0] for rollout in group] for group in groups]
            paths = [self._save(shard, number, group) for number, group in enumerate(images)]
        else:
            paths = [list(files) for files in shard.files]
            images = [[_read(file) for file in files] for files in paths]
        requests = [
            ScoreRequest(f"{shard.promptids[number]}/{i}", shard.prompts[number], image)
            for number, group in enumerate(images)
            for i, image in enumerate(group)
        ]
        scores, reasons = self.score(requests).scores, self._reasons(requests)
        errors = [s.error or "no reason given" for s, r in zip(scores, reasons, strict=True) if s.missing or r is None]
        rows, start = [], 0
        for number, group in enumerate(paths):
            part = slice(start, start + len(group))
            rows.append(label_row(shard, number, group, scores[part], reasons[part], self.factory))
            start += len(group)
        return LabelRecord(rows, len(requests), len(errors), errors[-1] if errors else "")

    def _reasons(self, requests: list[ScoreRequest]) -> list[str | None]:
        """Reasons of the images that have pixels."""
        usable = [request for request in requests if request.image is not None]
        reasons = iter(self.explainer.explain(usable))
        return [None if request.image is None else next(reasons) for request in requests]

    def _save(self, shard: Shard, number: int, images: list[np.ndarray]) -> list[str]:
        """Write a prompt's images as PNG; their paths relative to the set's folder."""
        names = [f"images/{shard.source}/{shard.promptids[number]}_{i}.png" for i in range(len(images))]
        for name, image in zip(names, images, strict=True):
            path = Path(self.factory.out) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        return names


def _read(file: str) -> np.ndarray | None:
    """uint8 [H, W, 3] of an image file, None if it cannot be read: its score is missing then."""
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):
        return None


class Progress:
    """Lines on standard output: shards, images, images a second, what is missing."""

    def __init__(self, total: int, finished: int) -> None:
        self.total, self.finished, self.found = total, finished, finished
        self.images = self.missing = 0
        self.started = self.told = time.monotonic()

    def add(self, record: LabelRecord) -> None:
        self.finished += 1
        self.images += record.images
        self.missing += record.missing
        now = time.monotonic()
        if now - self.told >= TELL_EVERY_S or self.finished == self.total:
            self.told, elapsed = now, now - self.started
            left = elapsed / (self.finished - self.found) * (self.total - self.finished)
            print(
                f"shards {self.finished}/{self.total}  images {self.images} ({self.images / elapsed:.1f}/s)  "
                f"without label {self.missing}  {left:.0f} s left",
                flush=True,
            )


async def build_data(config: Config) -> None:
    """Build the set of `factory.out`; shards that are there already are not made again."""
    config = with_absolute_paths(config)
    config.factory.out = str(Path(config.factory.out).absolute())
    shards = shards_of(config)
    begin(config)
    todo = [shard for shard in shards if not shard.path(config.factory.out).is_file()]
    if todo:
        if len(todo) < len(shards):
            print(f"resume: {len(shards) - len(todo)} of {len(shards)} shards are there", flush=True)
        await _make(config, todo, Progress(len(shards), len(shards) - len(todo)))
    for path, counts in join_shards(shards, config.factory):
        print(f"{path}: {', '.join(f'{count} {name}' for name, count in counts.items())}", flush=True)


async def _make(config: Config, shards: list[Shard], progress: Progress) -> None:
    rollout, judge = config.rollout, config.reward[0]
    demands = {"reward": Demand("reward", judge.replicas, judge.num_cpus, judge.num_gpus, "reward.0.replicas")}
    drawn = any(not shard.files for shard in shards)
    if drawn:
        demands["rollout"] = Demand("rollout", rollout.workers, rollout.num_cpus, rollout.num_gpus, "rollout.workers")
    connect(config, demands)
    label = ray.remote(LabelActor).options(**demands["reward"].options)
    judges = ActorPool("reward", lambda index: label.remote(config), judge.replicas)
    workers = None
    if drawn:
        draw = ray.remote(DrawActor).options(**demands["rollout"].options)
        workers = ActorPool("rollout", lambda index: draw.remote(config, index), rollout.workers)
    pools = [pool for pool in (workers, judges) if pool is not None]
    try:
        with stopping():
            await asyncio.gather(*(pool.start() for pool in pools))
            if workers is not None:
                await workers.call("check", [s for s in shards if not s.files], timeout_s=rollout.timeout_s)
            await _run(config, shards, workers, judges, progress)
    finally:
        for pool in pools:
            pool.close()


async def _run(
    config: Config, shards: list[Shard], workers: ActorPool | None, judges: ActorPool, progress: Progress
) -> None:
    """All shards, a few at a time, so that workers draw while judges look.

    consumes:     the list of shards.
    waits for:    a free worker, then a free judge.
    unblocked by: the actors; each call has a timeout.
    """
    waiting = iter(shards)

    async def lane() -> None:
        for shard in waiting:
            record = await _label(config, shard, workers, judges)
            _refuse_too_many_missing(config, shard, record)
            write_rows(shard.path(config.factory.out), record.rows)
            progress.add(record)

    lanes = config.rollout.workers + config.reward[0].replicas
    await in_lanes(lane, lanes)


async def _label(config: Config, shard: Shard, workers: ActorPool | None, judges: ActorPool) -> LabelRecord:
    """Draw (if the images are not there) and label one shard; drawn again if its images are lost on the way.

    rollout.timeout_s is that of one batch; a shard has several.
    """
    judge = config.reward[0]
    for _ in range(LOSSES):
        drawn = []
        if not shard.files:
            size, seed = config.factory.images_per_prompt, config.seed
            requests = [
                GroupRequest(place, prompt, size, seed)
                for place, prompt in zip(shard.promptids, shard.prompts, strict=True)
            ]
            calls = math.ceil(len(requests) / config.rollout.groups_per_call)
            limit = calls * config.rollout.timeout_s
            _, groups = await workers.call("draw", requests, timeout_s=limit, num_returns=2)
            drawn = [groups]
        images = sum(map(len, shard.files)) or len(shard.prompts) * config.factory.images_per_prompt
        # As long again for the reasons.
        limit = 2 * longest_s(judge, images)
        try:
            return await judges.call("label", shard, drawn, timeout_s=limit)
        except RayTaskError as error:
            if not isinstance(error.cause, ObjectLostError):
                raise
    raise RoleError(f"rollout: the images of shard {shard.source}/{shard.index} were lost {LOSSES} times")


def _refuse_too_many_missing(config: Config, shard: Shard, record: LabelRecord) -> None:
    if record.missing > config.factory.max_failed_share * record.images:
        raise ScoresMissing(
            f"reward/{config.reward[0].name}: {record.missing} of {record.images} images of shard "
            f"{shard.source}/{shard.index} have no label, a larger share than factory.max_failed_share="
            f"{config.factory.max_failed_share:g}; last reason: {record.reason}"
        )
