"""Scoring images in bulk with the actors of a run, and holding a judge against labels."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlpipe.config import Config, ScorerSection
from rlpipe.data.labels import write_rows
from rlpipe.data.scored import (
    ScoredError,
    Shard,
    begin,
    is_missing,
    join_shards,
    load_rows,
    read_requests,
    read_shard,
    scores_row,
    settings_of,
    shards_of,
)
from rlpipe.evaluate.calibration import calibrate
from rlpipe.evaluate.judged import cases_of, read_scores
from rlpipe.observe.calibration import picture, print_calibration
from rlpipe.paths import resolve_path
from rlpipe.reward.scorer import resolve_scorer
from rlpipe.reward.service import ScoreCounts
from rlpipe.types import Prompt, Score
from roles.batch import ScoresMissing
from roles.group import ActorPool
from roles.lanes import in_lanes, stopping
from roles.placement import Demand, connect, with_absolute_paths
from roles.pools import refuse_prompts, scorer_pools
from roles.reward import longest_s, slots

READ_TIMEOUT_S = 600.0
"""For the images of one shard."""
TELL_EVERY_S = 10.0


async def score(config: Config) -> None:
    """Score score.images by every scorer of `reward`."""
    await score_images(config)


async def calibrate_judge(config: Config) -> None:
    """Hold the scores of calibrate.scores, or of score.images, against labels; leaves numbers and a picture."""
    section, name = config.calibrate, config.calibrate.scorer
    path = resolve_path(section.scores) if section.scores else await score_images(config)
    rows = read_scores(path)
    if not name:
        name = next(iter(rows[0][1]["scores"])) if section.scores else config.reward[0].name
    cases, counts = cases_of(rows, replace(section, scorer=name))
    numbers = calibrate(cases, section.threshold, section.bins, section.resamples, config.seed)
    result = {"scorer": name, "labels": section.labels, "scores": str(path), **counts, **numbers}
    out = Path(section.out) if section.out else path.parent
    out.mkdir(parents=True, exist_ok=True)
    (out / "calibration.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "calibration.svg").write_text(picture(result), encoding="utf-8")
    print_calibration(result)
    print(f"{out / 'calibration.json'}, {out / 'calibration.svg'}", flush=True)


async def score_images(config: Config) -> Path:
    """Score what is not there yet; the path of scores.jsonl.

    Raises ConfigError, ScoredError, PlacementError, RoleError, ScoresMissing; Stopped by a signal.
    """
    given, config = config, with_absolute_paths(config)
    section = config.score
    section.out, section.images = str(Path(section.out).absolute()), str(resolve_path(section.images))
    asks = [name for scorer in config.reward if (name := _asks(scorer))]
    if section.world and not Path(section.images).exists():
        from rlpipe.world.cases import write_cases

        write_cases(config)
    rows = load_rows(section)
    bare = next((row.image for row in rows if not row.prompt.text), None)
    if asks and bare is not None:
        raise ScoredError([f"score.caption: empty, {bare} has no prompt, and {asks[0]} asks about it; give one"])
    shards, names = shards_of(rows, section.shard_size), [scorer.name for scorer in config.reward]
    begin(section.out, settings_of(given, rows))  # what a dry run compares, whose paths are as they were given

    def finished(shard: Shard) -> bool:
        rows = read_shard(shard, section.out, names)
        return rows is not None and not (section.retry_missing and any(map(is_missing, rows)))

    todo = [shard for shard in shards if not finished(shard)]
    if todo:
        if len(todo) < len(shards):
            print(f"resume: {len(shards) - len(todo)} of {len(shards)} shards are there", flush=True)
        await _score_shards(config, todo, Progress(config.reward, todo, section.max_failed_share))
    path = join_shards(shards, config.reward, section.out)
    _tell(path, names)
    return path


def _asks(section: ScorerSection) -> str | None:
    """The scorer's name if it asks a question about the prompt. Raises ConfigError if it cannot be built as asked."""
    _, keywords = resolve_scorer(section)
    return section.name if "question" in keywords else None


async def _score_shards(config: Config, shards: list[Shard], progress: Progress) -> None:
    demands = {}
    for i, scorer in enumerate(config.reward):
        role = f"reward/{scorer.name}"
        demands[role] = Demand(role, scorer.replicas, scorer.num_cpus, scorer.num_gpus, f"reward.{i}.replicas")
    connect(config, demands)
    pools = scorer_pools(config, demands)
    try:
        with stopping():
            await asyncio.gather(*(pool.start() for pool in pools))
            await refuse_prompts(config.reward, _distinct_prompts(shards), pools)
            progress.start()
            await _run(config, shards, pools, progress)
            progress.end()
    finally:
        for pool in pools:
            pool.close()


def _distinct_prompts(shards: Sequence[Shard]) -> list[Prompt]:
    """Each prompt of the rows once; rows of one id may differ in the rest."""
    prompts = (row.prompt for shard in shards for row in shard.rows)
    return list({json.dumps(asdict(prompt), sort_keys=True, default=str): prompt for prompt in prompts}.values())


async def _run(config: Config, shards: list[Shard], pools: list[ActorPool], progress: Progress) -> None:
    """All shards, as many at a time as the scorers can be busy with, and one more that is read meanwhile.

    consumes:     the list of shards.
    waits for:    a shard's images, then a free replica of every scorer.
    unblocked by: reading tasks and reward actors; each call has a timeout.
    """
    waiting = iter(shards)

    async def lane() -> None:
        for shard in waiting:
            answers, counts = await _score_shard(config.reward, shard, pools)
            progress.add(shard, answers, counts)
            columns = zip(*answers.values(), strict=True)
            rows = [
                scores_row(row, dict(zip(answers, scores, strict=True)))
                for row, scores in zip(shard.rows, columns, strict=True)
            ]
            write_rows(shard.path(config.score.out), rows)
            progress.tell()

    lanes = 1 + max(_busy_with(scorer, config.score.shard_size) for scorer in config.reward)
    await in_lanes(lane, lanes)


def _busy_with(section: ScorerSection, shard_size: int) -> int:
    """Shards that fill all calls of a scorer's replicas, and the next one of each."""
    enough = math.ceil((section.concurrency + 1) * section.batch_size / shard_size)
    return section.replicas * min(max(enough, 2), slots(section))


async def _score_shard(
    sections: Sequence[ScorerSection], shard: Shard, pools: Sequence[ActorPool]
) -> tuple[dict[str, list[Score]], dict[str, ScoreCounts]]:
    """By scorer the scores of a shard's images, in order, and what they took.

    An image that cannot be read has no score of any scorer.
    """
    # Pixels go from the reading task to the reward actors; the driver sees what could not be read.
    read = ray.remote(read_requests).options(num_cpus=0, num_returns=2, scheduling_strategy="SPREAD")
    unreadable_ref, requests = read.remote(shard.rows, any("source_image" in section.sees for section in sections))
    try:
        unreadable = await asyncio.wait_for(unreadable_ref, READ_TIMEOUT_S)
    except TimeoutError:
        raise ScoredError(
            [
                f"score.images: {shard.rows[0].image} and {len(shard.rows) - 1} more were not read within "
                f"{READ_TIMEOUT_S:g} s; look at the storage, or lower score.shard_size"
            ]
        ) from None
    readable = [i for i in range(len(shard.rows)) if i not in unreadable]
    counts: dict[str, ScoreCounts] = {}

    async def ask(pool: ActorPool, section: ScorerSection) -> list[Score]:
        scores = [Score(str(i), None, error=unreadable.get(i)) for i in range(len(shard.rows))]
        if readable:
            record = await pool.call("score", requests, timeout_s=longest_s(section, len(readable)))
            counts[section.name] = record.counts
            for i, answer in zip(readable, record.scores, strict=True):
                scores[i] = answer
        return scores

    answers = await asyncio.gather(*map(ask, pools, sections))
    return {section.name: scores for section, scores in zip(sections, answers, strict=True)}, counts


@dataclass
class Progress:
    """Lines on standard output: images, rate, what is missing, time left; and when too much is missing."""

    sections: Sequence[ScorerSection]
    shards: Sequence[Shard]
    max_failed_share: float
    missing: dict[str, int] = field(default_factory=dict)
    counts: dict[str, ScoreCounts] = field(default_factory=dict)
    done: int = 0

    def __post_init__(self) -> None:
        self.total = sum(len(shard.rows) for shard in self.shards)
        self.least = min(self.total, max(len(shard.rows) for shard in self.shards))
        self.start()

    def start(self) -> None:
        self.started = self.told = time.monotonic()

    def add(self, shard: Shard, answers: dict[str, list[Score]], counts: dict[str, ScoreCounts]) -> None:
        """Take note of a shard's scores; raises ScoresMissing when one scorer has failed too often by now."""
        self.done += len(shard.rows)
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, ScoreCounts()) + count
        for name, scores in answers.items():
            reasons = [score.error for score in scores if score.missing]
            self.missing[name] = self.missing.get(name, 0) + len(reasons)
            if reasons and self.missing[name] > self.max_failed_share * max(self.done, self.least):
                raise ScoresMissing(
                    f"reward/{name}: {self.missing[name]} of {self.done} scores are missing, a larger share than "
                    f"score.max_failed_share={self.max_failed_share:g}; last reason: {reasons[-1]}"
                )

    def tell(self) -> None:
        now = time.monotonic()
        if now - self.told < TELL_EVERY_S and self.done < self.total:
            return
        self.told, rate = now, self.done / max(now - self.started, 1e-9)
        missing = ", ".join(f"{name} {count}" for name, count in self.missing.items() if count) or "0"
        left = (self.total - self.done) / rate
        print(f"images {self.done}/{self.total}  {rate:.1f}/s  missing {missing}  {left:.0f} s left", flush=True)

    def end(self) -> None:
        """One line a scorer: what its answers took."""
        for name, c in self.counts.items():
            print(
                f"{name}: {c.calls} calls ({c.retries} retries, {c.failed} failed), {c.cached} known already, "
                f"{c.seconds:.1f} s in the scorer, {c.prepare_seconds:.1f} s preparing",
                flush=True,
            )


def _tell(path: Path, names: Sequence[str]) -> None:
    """One line a scorer: how many scores there are, and their mean."""
    values: dict[str, list[Any]] = {name: [] for name in names}
    for _, row in read_scores(path):
        for name in names:
            values[name].append(row["scores"][name]["value"])
    print(f"{path}: {len(values[names[0]])} images", flush=True)
    for name, found in values.items():
        there = [value for value in found if value is not None]
        mean = f", mean {np.mean(there):.4f} ± {np.std(there):.4f}" if there else ""
        print(f"{name}: {len(there)} scores{mean}, {len(found) - len(there)} missing", flush=True)
