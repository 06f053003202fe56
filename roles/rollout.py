"""The rollout worker: draws groups of trajectories with one version of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from rlpipe.config import Config, ScorerSection
from rlpipe.evaluate.editing import EditOutcome, evaluate_edits
from rlpipe.evaluate.near_miss import near_miss_cases, near_miss_verdicts
from rlpipe.evaluate.outcomes import Judge, evaluate_policy
from rlpipe.evaluate.table import NearMiss, Outcome
from rlpipe.learn.advantage import ACCEPTING, extend, final_image_of
from rlpipe.observe.gallery import save_rollouts
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.pixels import load_image
from rlpipe.reward.combine import looks_at
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.memory import RowMemory, free_bytes, rows_that_fit
from rlpipe.rollout.programs import Rounds, draw_rounds, edit_rounds, introspect_rounds
from rlpipe.types import Prompt, Rollout, Sampling, Score, ScoreRequest
from rlpipe.world.checker import check
from rlpipe.world.edits import check_edit
from roles.buckets import WeightError
from roles.weights import Receiver
from roles.work import (
    Ack,
    DrawRecord,
    GroupRecord,
    GroupRequest,
    ImagesRecord,
    Invitation,
    Manifest,
    Sample,
    image_id,
    outline,
    sampling_of,
)


def actor_device(num_gpus: float) -> str:
    """The device of an actor: Ray shows it its own GPU alone."""
    return "cuda" if num_gpus > 0 and torch.cuda.is_available() else "cpu"


class RolloutWorker:
    """A policy with frozen weights that serves nothing before its first acknowledged version, and only that version.

    worker = ray.remote(RolloutWorker).remote(config, 0)
    ack = await worker.load_weights.remote(manifest)
    items = worker.generate.options(num_returns="streaming").remote(ack.version, [request])
    """

    draws_groups = True
    """Whether calls are groups of train.group_size trajectories."""

    def __init__(self, config: Config, index: int = 0) -> None:
        torch.set_num_threads(config.rollout.threads)
        self.config, self.index = config, index
        dtype, device = getattr(torch, config.policy.dtype), actor_device(config.rollout.num_gpus)
        self.policy = JanusPolicy.from_config(config, dtype, device).requires_grad_(False)
        self.decoder = Decoder(self.policy, cache_dtype=config.rollout.cache_dtype)
        section = config.rollout
        self.limit = self._rows_at_once(section.rows, sampling_of(section, 0), section.groups_per_call)
        if self.draws_groups:
            self._check_room()
        self.receiver = Receiver(config.rollout.timeout_s)
        self.version: int | None = None

    def _check_room(self) -> None:
        """Raises ValueError if the rows of a group do not fit at once although they have to."""
        rollout, size = self.config.rollout, self.config.train.group_size
        if rollout.program == "introspect" and rollout.reflection_room == "group" and self.limit < size:
            raise ValueError(
                f"rollout.reflection_room: group looks at the train.group_size {size} rows of a prompt together, but "
                f"{self.limit} fit; give workers more memory, another reflection_room or a smaller train.group_size"
            )

    def _rows_at_once(self, wanted: str, sampling: Sampling, prompts: int) -> int:
        """Rows that the memory holds which is free now, or as many as are wanted, in calls with so many prompts.

        Raises ValueError.
        """
        section, program = self.config.rollout, self.config.rollout.program
        longest = self.config.policy.max_prompt_tokens + (self.policy.num_image_tokens if program == "edit" else 0)
        memory = RowMemory.of(self.decoder, sampling, longest, prompts, program == "introspect", section.branches)
        hosts = len(ray.nodes()) if ray.is_initialized() else 1
        free = free_bytes(self.policy.device, min(section.num_gpus, 1.0), math.ceil(section.workers / hosts))
        return rows_that_fit(wanted, memory, free)

    def ready(self) -> int:
        return self.index

    def load_weights(self, source: Manifest | Invitation) -> Ack:
        """Take over a published version; until that succeeds nothing is served. Raises WeightError."""
        self.version = None
        ack = self.receiver.take(source, dict(self.policy.janus.named_parameters()))
        self.decoder.refresh()
        self.version = ack.version
        return ack

    def generate(self, version: int, requests: list[GroupRequest]) -> Iterator[Any]:
        """Draw groups. A stream of pairs, an object for the store and then a record about it:

        a list of ScoreRequest, ImagesRecord: images that can be scored, as soon as a round of drawing has finished
                                              them, or at the end for scorers that need to know the end;
        a tuple of Rollout, GroupRecord:      per request, in order;
        None, DrawRecord:                     the last.

        Raises WeightError if the worker does not hold `version`.
        """
        self._check(version)
        started = time.monotonic()
        prompts, samplings, ids = [], [], []
        for request in requests:
            prompts += [request.prompt] * request.size
            ids += request.ids()
            samplings += request.samplings(self.config.rollout)
        sources = self._sources(prompts) if self.config.rollout.program == "edit" else [None] * len(prompts)
        rows = list(zip(ids, prompts, sources, strict=True))
        drawn = yield from self._ask_as_drawn(self._rounds(prompts, sources, samplings, ids, version), rows, version)
        rollouts = iter(drawn)
        groups = [tuple(extend([next(rollouts) for _ in range(r.size)], self.config.credit.rule)) for r in requests]
        yield from self._ask_at_the_end([rollout for group in groups for rollout in group])
        for request, group in zip(requests, groups, strict=True):
            yield group
            yield _record(request.ordinal, version, group)
        yield None
        yield DrawRecord(self.index, time.monotonic() - started)

    def _rounds(
        self,
        prompts: list[Prompt],
        sources: list[np.ndarray | None],
        samplings: list[Sampling],
        ids: list[str],
        version: int,
    ) -> Rounds:
        """The configured program; an edit starts from the image that its prompt names."""
        program = self.config.rollout.program
        if program == "edit":
            return edit_rounds(self.decoder, prompts, sources, samplings, ids, version, self.limit)
        rounds = draw_rounds if program == "draw" else introspect_rounds
        return rounds(self.decoder, prompts, samplings, ids, version, self.limit)

    def _ask_as_drawn(
        self, rounds: Rounds, rows: list[tuple[str, Prompt, np.ndarray | None]], version: int
    ) -> Generator[Any, None, list[Rollout]]:
        """Draw, and hand out each round's images for the scorers that need to know no more; returns the rollouts.

        rows: id, prompt and source image of each.
        """
        sections, ending = self.config.reward, self.config.credit.rule in ACCEPTING
        while True:
            self._check(version)  # a trajectory has one version from its first token to its last
            try:
                finished = next(rounds)
            except StopIteration as end:
                return end.value
            first = finished.number == 0
            scorers = [i for i, s in enumerate(sections) if not waits_for_the_end(s) and looks_at(s, first, False)]
            requests = []
            for row, image, accepted in zip(finished.rows, finished.images, finished.accepted, strict=True):
                trajectory_id, prompt, source = rows[row]
                if not (accepted and ending):
                    requests.append(ScoreRequest(image_id(trajectory_id, finished.number), prompt, image, source))
            if scorers and requests:
                yield requests
                yield ImagesRecord(tuple(scorers), tuple(request.id for request in requests))

    def _ask_at_the_end(self, rollouts: list[Rollout]) -> Iterator[Any]:
        """Hand out the images for the scorers that see verdicts or final images alone."""
        wanted: dict[tuple[str, ...], tuple[list[ScoreRequest], list[int]]] = {}
        for place, section in enumerate(self.config.reward):
            if waits_for_the_end(section):
                requests = [r for rollout in rollouts for r in self._requests(rollout, section)]
                same = wanted.setdefault(tuple(request.id for request in requests), (requests, []))
                same[1].append(place)
        for ids, (requests, scorers) in wanted.items():
            yield requests
            yield ImagesRecord(tuple(scorers), ids)

    def _requests(self, rollout: Rollout, section: ScorerSection) -> Iterator[ScoreRequest]:
        """Those of a finished rollout's images that a scorer looks at, with the words that were said of them."""
        trajectory = rollout.trajectory
        final = final_image_of(trajectory, self.config.credit.rule)
        for number, image in enumerate(rollout.images):
            if looks_at(section, number == 0, number == final):
                words = rollout.texts[number] if number < len(rollout.texts) else None
                yield ScoreRequest(image_id(trajectory.id, number), trajectory.prompt, image, rollout.source, words)

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
        sampling = sampling_of(self.config.rollout, 0, guidance)
        seed, size = self.config.evaluate.seed, self._evaluated_at_once(sampling)
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
        sampling, sources = sampling_of(self.config.rollout, 0, guidance), self._sources(prompts)
        seed, size = self.config.evaluate.seed, self._evaluated_at_once(sampling)
        return evaluate_edits(self.decoder, prompts, sources, check_edit, sampling, seed, size, self._asking(judge))

    def _evaluated_at_once(self, sampling: Sampling) -> int:
        """Rows of a batch of held-out prompts, each of which is prefilled; never fewer than one."""
        size = self.config.evaluate.batch_size
        try:
            fit = self._rows_at_once("auto", sampling, size)
        except ValueError:  # Little memory is free now: as many as the worker began with.
            fit = self.limit
        return max(min(size, fit), 1)

    def _asking(self, judge: ActorHandle | None) -> Judge | None:
        """The scores of a RewardActor as a function."""

        def ask(requests: Sequence[ScoreRequest]) -> list[Score]:
            answer = judge.score.remote(list(requests))
            return list(ray.get(answer, timeout=self.config.rollout.timeout_s).scores)

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
            texts.append(list(rollout.texts[: len(rollout.trajectory.texts)]))
        save_rollouts(run_dir, step, rollouts, scores, advantages, texts)

    def _check(self, version: int) -> None:
        if version != self.version:
            held = "no version yet" if self.version is None else f"version {self.version}"
            raise WeightError(f"rollout[{self.index}]: asked to work with version {version}, holds {held}")


def waits_for_the_end(section: ScorerSection) -> bool:
    """Whether a scorer can be asked about an image only when its trajectory is finished."""
    return "verdict" in section.sees or "final_image" in section.sees


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
        num_drawn=len({id(image) for rollout in group for image in rollout.images}),
        num_text_tokens=tuple(sum(map(len, segments)) for segments in texts),
        truncated=sum(sum(rollout.trajectory.truncated) for rollout in group),
    )
