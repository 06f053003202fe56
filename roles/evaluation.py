"""Measuring policies on held-out prompts by the rollout workers, and what a run leaves behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ray.exceptions import RayActorError, RayTaskError

from rlpipe.config import Config, ScorerSection
from rlpipe.data.outputs import HOW_FAST
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.editing import EditOutcome, print_edit_table, summarise_edits
from rlpipe.evaluate.table import Measured, NearMiss, Outcome, summarise
from rlpipe.evaluate.terminal import print_table
from rlpipe.observe.report import write_report
from rlpipe.types import Prompt
from rlpipe.world.edits import edit_from_metadata
from rlpipe.world.prompts import spec_from_metadata
from rlpipe.world.scenes import IMAGE_SIZE
from roles.group import ActorPool, RoleError
from roles.replica import ActorHangs
from roles.trainer import Trainer
from roles.weight_sync import WeightSync
from roles.work import Manifest

JUDGE_LOSSES = 3
"""Times that the judge may be lost while one slice of the prompts is measured."""


def learned_judge(sections: Sequence[ScorerSection]) -> int | None:
    """Place of the scorer whose word on held-out images is held against the checker's: the first of those that say
    whether an image matches; None without any."""
    judges = (i for i, s in enumerate(sections) if s.weight > 0 and "comprehension" in s.rewards)
    return next(judges, None)


def uncheckable(prompts: Sequence[Prompt], policy_path: str, program: str = "introspect") -> str | None:
    """Why the exact checker cannot measure this policy on these prompts; None if it can."""
    size = json.loads((Path(policy_path) / "config.json").read_text())["vision_config"]["image_size"]
    if size != IMAGE_SIZE:
        return f"policy.path draws {size} x {size} pixels, the tiny world has {IMAGE_SIZE} x {IMAGE_SIZE}"
    for prompt in prompts:
        try:
            if program == "edit":
                edit_from_metadata(prompt.metadata)
            else:
                spec_from_metadata({**prompt.metadata, "prompt": prompt.text})
        except ValueError as error:
            return f"prompt {prompt.id!r} is none of the tiny world ({error})"
    return None


class Evaluation:
    """Measures one version of the weights after the other; finished measurements are kept in the run folder.

    evaluation = Evaluation(config, trainer, rollout_pool, scorer_pools, sync)
    rl = await evaluation.measure("RL", await trainer.publish(), guidance=1.0)
    """

    def __init__(
        self, config: Config, trainer: Trainer, rollout: ActorPool, scorers: Sequence[ActorPool], sync: WeightSync
    ) -> None:
        self.config, self.trainer = config, trainer
        self.rollout, self.sync = rollout, sync
        place = learned_judge(config.reward)
        self.judge = None if place is None else config.reward[place]
        self.judges = None if place is None else scorers[place]
        prompts = load_prompts(config.evaluate.prompts)
        self.prompts = prompts[: config.evaluate.limit or None]

    async def measure(self, name: str, manifest: Manifest, guidance: float, full: bool = True) -> Measured:
        """Outcomes of all prompts; `full` adds the near-miss test and the learned judge's scores."""
        path = self._path(manifest, guidance, full)
        if path.is_file():
            return _read(path)
        results = await self._by_slice("evaluate", name, manifest, guidance, full)
        outcomes = [outcome for part, _ in results for outcome in part]
        near_misses = [near_miss for _, part in results for near_miss in part]
        measured = Measured(outcomes, near_misses, guidance)
        _write(path, measured)
        return measured

    async def measure_edits(self, name: str, manifest: Manifest) -> list[EditOutcome]:
        """Outcomes of all prompts, which are instructions, with the learned judge's scores."""
        guidance = self.config.rollout.guidance
        path = self._path(manifest, guidance, True)
        if path.is_file():
            return [EditOutcome(**row) for row in json.loads(path.read_text())]
        results = await self._by_slice("evaluate_edits", name, manifest, guidance, True)
        outcomes = [outcome for part in results for outcome in part]
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps([asdict(outcome) for outcome in outcomes]))
        return outcomes

    def _path(self, manifest: Manifest, guidance: float, full: bool) -> Path:
        return Path(self.config.run.dir) / "evaluation" / f"{self._key(manifest, guidance, full)}.json"

    async def _by_slice(self, method: str, name: str, manifest: Manifest, guidance: float, full: bool) -> list:
        """What a method of the workers says of each slice of the prompts, in order."""
        if self.sync.manifest is None or self.sync.manifest.checksum != manifest.checksum:
            await self.sync.send(manifest)
        size = self.config.evaluate.batch_size
        slices = [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]
        stage, done = f"measuring {name} at guidance {guidance:g}", 0
        results: list = [None] * len(slices)

        async def one(number: int) -> None:
            nonlocal done
            results[number] = await self._slice(method, slices[number], guidance, full)
            done += len(slices[number])
            self.trainer.view.progress(stage, done, len(self.prompts))

        await self.trainer.unless_halted(asyncio.gather(*(one(number) for number in range(len(slices)))))
        return results

    async def _slice(self, method: str, prompts: list[Prompt], guidance: float, full: bool) -> object:
        """Measure some prompts on a free worker, which asks the judge itself."""
        judges = self.judges if full else None
        timeout = self.config.rollout.timeout_s
        for attempt in range(JUDGE_LOSSES):
            judge = judges.replicas[attempt % len(judges.replicas)] if judges is not None else None
            handle = None if judge is None else judge.handle
            try:
                return await self.rollout.call(
                    method,
                    prompts,
                    guidance,
                    full,
                    handle,
                    timeout_s=timeout,
                    before=lambda replica: (self.sync.version_of(replica),),
                )
            except RayTaskError as error:
                if not isinstance(error.cause, (RayActorError, ActorHangs)):
                    raise
                await judges.revive(judge, handle, error.cause)
        raise RoleError(f"{judges.role}: lost {JUDGE_LOSSES} times while it scored held-out images")

    def _key(self, manifest: Manifest, guidance: float, full: bool) -> str:
        """What a measurement depends on."""
        evaluate, judge = self.config.evaluate, None
        if full and self.judge is not None:
            judge = [self.judge.scorer, self.judge.path, self.judge.question, self.judge.options]
        rollout = {**asdict(self.config.rollout), "guidance": guidance}
        for key in HOW_FAST:
            del rollout[key]
        parts = [manifest.checksum, self.config.policy.path, evaluate.seed, rollout, judge]
        rows = [[prompt.id, prompt.text, dict(prompt.metadata)] for prompt in self.prompts]
        return hashlib.sha256(json.dumps([parts, rows], sort_keys=True).encode()).hexdigest()[:16]


async def measure_run(evaluation: Evaluation, started: float) -> dict | None:
    """Policy before and after reinforcement, and unless it edits, before it over guidance scales; saves the summary.

    `started` is when the job began, on the monotonic clock. None, with one line that says why, if the held-out
    prompts or the policy are not the tiny world's.
    """
    config, trainer = evaluation.config, evaluation.trainer
    reason = uncheckable(evaluation.prompts, config.policy.path, config.rollout.program)
    if reason is not None:
        trainer.say(f"no table, because the exact checker knows the tiny world alone: {reason}")
        return None
    guidance = config.rollout.guidance
    if config.rollout.program == "edit":
        rl = await evaluation.measure_edits("RL", await trainer.publish())
        sft = await evaluation.measure_edits("SFT", await trainer.publish_initial())
        summary = summarise_edits({"sft": sft, "rl": rl}, guidance, time.monotonic() - started, config.seed)
    else:
        rl = await evaluation.measure("RL", await trainer.publish(), guidance)
        initial = await trainer.publish_initial()
        sft = await evaluation.measure("SFT", initial, guidance)
        sweep = {}
        for scale in config.evaluate.guidance_sweep:
            if scale != guidance:
                sweep[scale] = (await evaluation.measure("SFT", initial, scale, full=False)).outcomes
        summary = summarise(sft, rl, sweep, time.monotonic() - started, config.seed)
    _replace(Path(config.run.dir) / "summary.json", json.dumps(summary, indent=2))
    return summary


def show(config: Config, summary: dict | None) -> None:
    """Write the report, print the table and where everything is."""
    report = write_report(config.run.dir)
    if summary is not None:
        (print_edit_table if "edits" in summary else print_table)(summary)
    print(f"policy: {Path(config.run.dir) / 'policy'}\nreport: {report}", flush=True)


def _read(path: Path) -> Measured:
    stored = json.loads(path.read_text())
    outcomes = [Outcome(**row) for row in stored["outcomes"]]
    return Measured(outcomes, [NearMiss(**row) for row in stored["near_misses"]], stored["guidance"])


def _write(path: Path, measured: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {
        "outcomes": [asdict(outcome) for outcome in measured.outcomes],
        "near_misses": [asdict(near_miss) for near_miss in measured.near_misses],
        "guidance": measured.guidance,
    }
    _replace(path, json.dumps(rows))


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
