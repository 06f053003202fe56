"""The rollout worker: draws groups of trajectories with one version of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from rlpipe.config import Config
from rlpipe.evaluate.editing import EditOutcome, evaluate_edits
from rlpipe.evaluate.near_miss import near_miss_cases, near_miss_verdicts
from rlpipe.evaluate.outcomes import Judge, evaluate_policy
from rlpipe.evaluate.table import NearMiss, Outcome
from rlpipe.learn.advantage import extend
from rlpipe.observe.gallery import save_rollouts
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.pixels import load_image
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only, edit, introspect
from rlpipe.types import Prompt, Rollout, Sampling, Score, ScoreRequest
from rlpipe.world.checker import check
from rlpipe.world.edits import check_edit
from roles.weight_sync import WeightError, install
from roles.work import (
    Ack,
    DrawRecord,
    GroupRecord,
    GroupRequest,
    Manifest,
    Sample,
    outline,
    sampling_of,
    trajectory_seed,
)


def actor_device(num_gpus: float) -> str:
    """The device of an actor: Ray shows it its own GPU alone."""
    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"


class RolloutWorker:
    """A policy with frozen weights that serves nothing before its first acknowledged version, and only that version.

    worker = ray.remote(RolloutWorker).remote(config, 0)
    ack = await worker.load_weights.remote(manifest)
    record, group = worker.generate.options(num_returns=2).remote(ack.version, [request])
    """

    def __init__(self, config: Config, index: int = 0) -> None:
        torch.set_num_threads(config.rollout.threads)
        self.config, self.index = config, index
        dtype, device = getattr(torch, config.policy.dtype), actor_device(config.rollout.num_gpus)
        self.policy = JanusPolicy.from_config(config, dtype, device).requires_grad_(False)
        self.decoder = Decoder(self.policy)
        self.version: int | None = None

    def ready(self) -> int:
        return self.index

    def load_weights(self, manifest: Manifest) -> Ack:
        """Take over a published version; until that succeeds nothing is served. Raises WeightError."""
        self.version = None
        ack = install(manifest, dict(self.policy.janus.named_parameters()), self.config.rollout.timeout_s)
        self.decoder.refresh()
        self.version = ack.version
        return ack

    def generate(self, version: int, requests: list[GroupRequest]) -> tuple[DrawRecord, tuple[Rollout, ...]]:
        """Draw groups; returns a DrawRecord, then one tuple of Rollout per request (call with num_returns).

        Raises WeightError if the worker does not hold `version`.
        """
        self._check(version)
        started = time.monotonic()
        prompts, samplings, ids = [], [], []
        for request in requests:
            prompts += [request.prompt] * request.size
            ids += request.ids()
            seeds = [trajectory_seed(request.seed, request.ordinal, m) for m in range(request.size)]
            samplings += [sampling_of(self.config.rollout, seed) for seed in seeds]
        rollouts = iter(self._draw(prompts, samplings, ids, version))
        rule = self.config.credit.rule
        groups = [tuple(extend([next(rollouts) for _ in range(r.size)], rule)) for r in requests]
        records = tuple(_record(r.ordinal, version, group) for r, group in zip(requests, groups, strict=True))
        return DrawRecord(self.index, time.monotonic() - started, records), *groups

    def _draw(self, prompts: list[Prompt], samplings: list[Sampling], ids: list[str], version: int) -> list[Rollout]:
        """The configured program; an edit reads the image that its prompt names."""
        program = self.config.rollout.program
        if program == "draw":
            return draw_only(self.decoder, prompts, samplings, ids, version)
        if program == "introspect":
            return introspect(self.decoder, prompts, samplings, ids, version)
        return edit(self.decoder, prompts, self._sources(prompts), samplings, ids, version)

    def _sources(self, prompts: list[Prompt]) -> list[np.ndarray]:
        """The images that edits start from, each file read once."""
        paths = dict.fromkeys(prompt.source_image for prompt in prompts)
        images = {path: load_image(path, self.policy.image_size) for path in paths}
        return [images[prompt.source_image] for prompt in prompts]

    def evaluate(
        self, version: int, prompts: list[Prompt], guidance: float, full: bool, judge: ActorHandle | None
    ) -> tuple[list[Outcome], list[NearMiss]]:
        """Outcomes of held-out prompts under `version` of the weights; `full` adds the near-miss test.

        judge: a RewardActor whose score is wanted for every image that is drawn.
        """
        self._check(version)
        seed, size = self.config.evaluate.seed, self.config.evaluate.batch_size
        sampling = sampling_of(self.config.rollout, 0, guidance)

        outcomes = evaluate_policy(self.decoder, prompts, check, sampling, seed, size, self._asking(judge))
        if not full:
            return outcomes, []
        cases = near_miss_cases(self.decoder, prompts, seed, size)
        return outcomes, near_miss_verdicts(self.decoder, cases, seed, sampling.text_temperature, size)

    def evaluate_edits(
        self, version: int, prompts: list[Prompt], guidance: float, full: bool, judge: ActorHandle | None
    ) -> list[EditOutcome]:
        """Outcomes of held-out edits under `version` of the weights."""
        self._check(version)
        seed, size = self.config.evaluate.seed, self.config.evaluate.batch_size
        sampling, sources = sampling_of(self.config.rollout, 0, guidance), self._sources(prompts)
        return evaluate_edits(self.decoder, prompts, sources, check_edit, sampling, seed, size, self._asking(judge))

    def _asking(self, judge: ActorHandle | None) -> Judge | None:
        """The scores of a RewardActor as a function."""

        def ask(requests: Sequence[ScoreRequest]) -> list[Score]:
            answer = judge.score_images.remote(list(requests))
            return ray.get(answer, timeout=self.config.rollout.timeout_s)

        return None if judge is None else ask

    def save_samples(self, run_dir: str, step: int, samples: list[Sample]) -> None:
        """Write trajectories with their scores and advantages to `run_dir`/rollouts/step_N."""
        rollouts, scores, advantages, texts = [], [], [], []
        for sample in samples:
            rollout = drawn_part(ray.get(sample.rollouts, timeout=self.config.rollout.timeout_s)[sample.member])
            segments = rollout.trajectory.segments
            of_images = iter(sample.scores)
            of_texts = (None if math.isnan(reward) else reward for reward in sample.reflection_rewards)
            rollouts.append(rollout)
            scores.append([next(of_images) if s.kind == "image" else next(of_texts) for s in segments])
            advantages.append(sample.advantages[: len(segments)])
            texts.append([self.policy.templates.text(segments[i].token_ids) for i in rollout.trajectory.texts])
        save_rollouts(run_dir, step, rollouts, scores, advantages, texts)

    def _check(self, version: int) -> None:
        if version != self.version:
            held = "no version yet" if self.version is None else f"version {self.version}"
            raise WeightError(f"rollout[{self.index}]: asked to work with version {version}, holds {held}")


def drawn_part(rollout: Rollout) -> Rollout:
    """The rollout without segments that a credit rule added behind it."""
    trajectory = rollout.trajectory
    drawn = tuple(segment for segment in trajectory.segments if segment.logprobs is not None)
    return replace(rollout, trajectory=replace(trajectory, segments=drawn))


def _record(ordinal: int, version: int, group: tuple[Rollout, ...]) -> GroupRecord:
    texts = [[r.trajectory.segments[i] for i in r.trajectory.texts] for r in group]
    return GroupRecord(
        ordinal=ordinal,
        policy_version=version,
        outlines=tuple(map(outline, group)),
        num_images=tuple(len(rollout.images) for rollout in group),
        num_text_tokens=tuple(sum(map(len, segments)) for segments in texts),
        truncated=sum(sum(rollout.trajectory.truncated) for rollout in group),
    )
