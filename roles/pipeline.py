"""The driver of reinforcement learning: four small loops over references and small records.

    _feed   prompts          -> chunks of requests for a step
    _draw   chunks           -> drawn groups; each image is sent to the reward actors as soon as it is finished
                                                                  (rollout workers, reward actors)
    _score  drawn groups     -> scored groups in the step's batch (reward actors and reference actors)
    _train  complete batches -> new weights on every worker       (learner ranks)

Every group belongs to one step from the moment its prompt is taken, and a batch is in the order of its prompts, not of
arrival. A step's prompts are handed out only when the weights are at most `max_staleness` versions older than those the
step will train; 0 is synchronous training. So what a synchronous step consumes depends on seed, step and weights alone.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import ObjectRef
from ray.exceptions import ObjectLostError

from rlpipe.config import Config
from rlpipe.data.prompts import PromptCursor
from rlpipe.learn.advantage import Credited, assign_credit, reflection_rewards
from rlpipe.learn.checkpoint import CheckpointError
from rlpipe.learn.decline import Decline, Reaction
from rlpipe.learn.entropy import EntropyControl
from rlpipe.learn.packing import balance, rough_tokens
from rlpipe.learn.replay import ReplayOptions
from rlpipe.policy.lora import base_is_reference
from rlpipe.reward.combine import usable
from rlpipe.types import Prompt
from roles.batch import Batch, Chunk, ScoredGroup, ScoresMissing, canary_correlations
from roles.group import ActorPool, RoleError
from roles.panel import Drawing, Panel
from roles.trainer import Stopwatch, Trainer
from roles.weight_sync import WeightSync
from roles.work import GroupRequest, Manifest, Sample, Share

LOST_DRAWS = 3
"""Times that a step's drawn groups may get lost (with their node) and be drawn again."""
MOST_DRAWS = 8
"""Groups drawn for one step, as a multiple of those it needs, before the scorers are given up."""


class GrpoPipeline:
    """Trains from `trainer.step` to `train.steps`.

    pipeline = GrpoPipeline(config, prompts, trainer, rollout_pool, scorer_pools, reference_pool)
    await pipeline.run(driver_state)            # what trainer.start() gave
    """

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        trainer: Trainer,
        rollout: ActorPool,
        scorers: Sequence[ActorPool],
        reference: ActorPool | None,
    ) -> None:
        self.config, self.trainer = config, trainer
        self.rollout, self.reference = rollout, reference
        self.panel = Panel(config, scorers)
        self.cursor = PromptCursor(prompts, config.seed, config.data.shuffle)
        learner = trainer.first_rank
        self.sync = WeightSync(rollout, config.rollout.timeout_s, config.sync.transport, learner)
        self.syncs = [self.sync]
        if reference is not None and config.reference.context == "policy":
            self.syncs.append(WeightSync(reference, config.reference.timeout_s, learner=learner))
        self.decline = Decline(config.decline)
        self.entropy = EntropyControl(config.loss.entropy)
        self.renewed: str | None = None
        self.with_reference = reference is not None or base_is_reference(config)
        self._batches: dict[int, Batch] = {}
        self._work: asyncio.Queue[Chunk] = asyncio.Queue()
        self._new_version = asyncio.Condition()
        self._tasks: set[asyncio.Task] = set()
        self._sending: asyncio.Future | None = None
        self._pending: dict[int, list[int]] = {}
        self._boundary: dict[str, Any] = {}

    async def run(self, state: dict[str, Any] | None) -> None:
        """Train to the end. Whatever interrupts it, the steps that were finished are in a checkpoint first."""
        self._restore(state)
        self._boundary = self._state()
        try:
            async with self.trainer.saving(lambda: self._boundary):
                await self._send(await self._publish())
                self._spawn(self._feed())
                for _ in self.rollout.replicas:
                    self._spawn(self._draw())
                await self.trainer.unless_halted(asyncio.gather(*await self._train()))
        finally:
            self.panel.close()
            for task in self._tasks:
                task.cancel()

    def _state(self) -> dict[str, Any]:
        """For a checkpoint: the place in the stream of prompts, the prompts taken for steps not trained yet, what a
        declining reward curve has led to, and where the weights of entropies have come."""
        taken = {step: sorted(batch.requests) for step, batch in self._batches.items() if batch.requests}
        pending = {str(step): ordinals for step, ordinals in (self._pending | taken).items()}
        held = {"decline": self.decline.state_dict(), "entropy": self.entropy.state_dict(), "reference": self.renewed}
        return {"cursor": self.cursor.state(), "pending": pending, **held}

    def _restore(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            self.cursor.restore(state["cursor"])
            self._pending = {int(step): list(ordinals) for step, ordinals in state["pending"].items()}
            self.decline.load_state_dict(state["decline"])
            self.entropy.load_state_dict(state.get("entropy", {}))
            self.renewed = state["reference"]
            if self.renewed is not None and not Path(self.renewed).is_dir():
                raise CheckpointError(f"reference: {self.renewed}, which the checkpoint goes on with, is gone")

    def _spawn(self, loop: Coroutine) -> asyncio.Task:
        task = asyncio.create_task(loop)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.trainer.fail(task.exception())

    def _batch(self, step: int) -> Batch:
        return self._batches.setdefault(step, Batch(step))

    # the loops

    async def _feed(self) -> None:
        """Give every step its prompts.

        consumes:     the stream of prompts; first those that the checkpoint names as taken.
        waits for:    weights that are at most max_staleness versions older than the step's.
        unblocked by: _send, when all workers hold a new version.
        """
        for step in range(self.trainer.step, self.config.train.steps):
            async with self._new_version:
                await self._new_version.wait_for(lambda s=step: self.sync.version >= s - self.config.max_staleness)
            taken = self._pending.pop(step, [])
            here = self.cursor.state()
            prompts = []
            for ordinal in taken:
                self.cursor.restore({**here, "position": ordinal})
                prompts += self.cursor.next(1)
            self.cursor.restore(here)
            prompts += self.cursor.next(self.config.train.prompts_per_step - len(prompts))
            self._request(self._batch(step), prompts)

    async def _draw(self) -> None:
        """Draw one chunk after the other; there are as many of these loops as workers.

        consumes:     chunks of requests, in the order of their steps.
        waits for:    a free rollout worker.
        unblocked by: _feed; _score, where groups were dropped or lost.
        """
        while True:
            chunk = await self._work.get()
            drawing = Drawing(chunk, self.panel)
            await self.rollout.stream(
                "generate",
                list(chunk.requests),
                timeout_s=self.config.rollout.timeout_s,
                begin=drawing.begin,
                before=lambda replica: (self.sync.version_of(replica),),
            )
            chunk.batch.watch.add("draw", drawing.seconds / max(len(self.rollout.replicas), 1))
            self._spawn(self._score(drawing))

    async def _score(self, drawing: Drawing) -> None:
        """Have a chunk looked at by the reference, and with all its scores put its groups into the step's batch.

        consumes:     drawn groups, and the scores that _draw asked for.
        waits for:    a free replica of the reference, and of each scorer.
        unblocked by: _draw.
        """
        batch = drawing.chunk.batch
        try:
            references, scored = await asyncio.gather(
                self._ask_reference(batch, [rollouts for _, rollouts in drawing.groups]), drawing.scores()
            )
        except ObjectLostError as error:
            drawing.forget()
            self._draw_again(batch, list(drawing.chunk.requests), error)
            return
        for (record, rollouts), reference, scores in zip(drawing.groups, references, scored, strict=True):
            batch.images += record.num_drawn
            if sum(usable(self.config.reward, member) for member in scores) < 2:
                # Nothing to compare: the group says nothing about which trajectory is better.
                del batch.requests[record.ordinal]
                batch.dropped += 1
                continue
            batch.groups[record.ordinal] = ScoredGroup(record, rollouts, scores, reference)
        self._settle(batch, len(drawing.groups))

    async def _train(self) -> list[asyncio.Task]:
        """Train on one batch after the other and bring the new weights to the workers.

        consumes:     the batches, in the order of their steps.
        waits for:    all groups of the step's batch; the acknowledgements of the version before the new one.
        unblocked by: _score, when the last group of the step is scored; _send.

        Returns the tasks that may still be under way: samples that are saved, the last weights that are sent.
        """
        train, trailing = self.config.train, []
        while self.trainer.step < train.steps:
            batch, watch = self._batch(self.trainer.step), Stopwatch()
            with watch("wait"):
                await self.trainer.unless_halted(batch.ready.wait())
            result = await self._optimise(batch, watch)
            if result is None:
                continue
            metrics, credited = result
            self.entropy.observe(metrics)
            reaction = self.decline.observe(self.trainer.step, metrics.get("reward/trajectory/mean", math.nan))
            del self._batches[batch.step]
            # Before workers get new weights: in synchronous training no prompt is under way at this point.
            self._boundary = self._state()
            if reaction is not None:
                await self._react(reaction)
            if self._sending is not None:
                await self._sending
            self._sending = self._spawn(self._send(await self._publish()))
            if self.trainer.step % train.checkpoint_every == 0 or self.trainer.step == train.steps:
                with watch("checkpoint"):
                    await self.trainer.save(self._boundary)
                    await self.trainer.export_if_due()
            if batch.step % self.config.observe.gallery_every == 0 or self.trainer.step == train.steps:
                trailing.append(self._spawn(self._save_samples(batch, credited)))
            self.trainer.log(metrics | self._metrics(batch, credited, watch))
        return [*trailing, self._sending] if self._sending else []

    async def _send(self, manifest: Manifest) -> None:
        """Bring new weights to the workers, while the learner goes on if it has something to go on with.

        consumes:     a published version.
        waits for:    every worker's acknowledgement, which comes after the work it has.
        unblocked by: _train.
        """
        with self._batch(manifest.version).watch("sync"):
            await asyncio.gather(*(sync.send(manifest) for sync in self.syncs))
        async with self._new_version:
            self._new_version.notify_all()

    # parts of the loops

    async def _publish(self) -> Manifest:
        """The learner's weights on their way to the workers; the learner may go on then."""
        version = self.trainer.step
        with self._batch(version).watch("sync"):
            return await self.trainer.publish(self.sync.invite(version))

    async def _react(self, reaction: Reaction) -> None:
        """Tell of a reaction to the reward curve; what it asks of the reference is done before the next step."""
        self.trainer.say(reaction.line)
        if reaction.kind == "renew_reference":
            self.renewed = await self.trainer.keep_as_reference(self.renewed)
            self._boundary = self._state()

    def _request(self, batch: Batch, prompts: list[tuple[int, Prompt]]) -> None:
        """Make prompts the step's own and queue their groups."""
        size, seed = self.config.train.group_size, self.config.seed
        requests = [GroupRequest(ordinal, prompt, size, seed) for ordinal, prompt in prompts]
        batch.requests |= {request.ordinal: request for request in requests}
        batch.outstanding += len(requests)
        batch.drawn += len(requests)
        self._enqueue(batch, requests)

    def _enqueue(self, batch: Batch, requests: list[GroupRequest]) -> None:
        """Queue requests in chunks of one call each."""
        per_call = self.config.rollout.groups_per_call
        for start in range(0, len(requests), per_call):
            self._work.put_nowait(Chunk(batch, tuple(requests[start : start + per_call])))

    async def _ask_reference(self, batch: Batch, groups: list[ObjectRef]) -> list[ObjectRef | None]:
        """References to the reference policy's log-probs, one per group; None where no actor is asked for them."""
        if self.reference is None:
            return [None] * len(groups)
        timeout, returns = self.config.reference.timeout_s, 1 + len(groups)
        call = self.reference.call("logprobs", groups, self.renewed, timeout_s=timeout, num_returns=returns)
        seconds, *logprobs = await call
        batch.watch.add("reference", seconds / len(self.reference.replicas))
        return logprobs

    def _settle(self, batch: Batch, count: int) -> None:
        """When nothing of a step is under way any more: it is complete, or lacks the groups that were dropped."""
        batch.outstanding -= count
        if batch.outstanding:
            return
        wanted = self.config.train.prompts_per_step
        batch.drop_equal(self.config.credit, self.config.credit.redraws * wanted)
        if len(batch.groups) >= wanted:
            batch.ready.set()
        elif batch.drawn - batch.equal >= MOST_DRAWS * wanted:
            raise ScoresMissing(
                f"step {batch.step + 1}: {batch.dropped} of {batch.drawn} groups had fewer than two scores; "
                f"last reasons: {batch.reasons}"
            )
        else:
            self._request(batch, self.cursor.next(wanted - len(batch.groups)))

    def _draw_again(self, batch: Batch, requests: list[GroupRequest], error: Exception) -> None:
        """Drawn groups are gone with the node that held them: the same requests once more, with the same seeds."""
        batch.lost += 1
        if batch.lost > LOST_DRAWS:
            raise RoleError(f"step {batch.step + 1}: drawn groups lost {batch.lost} times; last: {error}") from error
        batch.ready.clear()
        self._enqueue(batch, requests)

    async def _optimise(self, batch: Batch, watch: Stopwatch) -> tuple[dict[str, float], Credited] | None:
        """One optimiser step on a complete batch; None if some of it got lost and is drawn again."""
        groups = batch.in_order()
        staleness = [batch.step - group.record.policy_version for group in groups]
        if max(staleness) > self.config.max_staleness:
            raise RuntimeError(f"step {batch.step + 1}: staleness {max(staleness)} > {self.config.max_staleness}")
        members = [(group, member) for group in groups for member in range(len(group.scores))]
        credited = assign_credit(
            [group.record.outlines[member] for group, member in members],
            [group.scores[member] for group, member in members],
            [group.record.ordinal for group, _ in members],
            self.config.credit,
            [()] * len(members) if self.with_reference else None,
            self.config.loss.train_eos,
            self.entropy.weights is not None,
        )
        options = ReplayOptions.from_config(self.config.loss)
        tokens = [rough_tokens(item, options) for item in credited.batch.items]
        parts = balance(tokens, self.config.learner.ranks)
        shares = [self._share(groups, credited, frozenset(part)) for part in parts]
        try:
            with watch("assemble"):
                await self.trainer.assemble(shares)
        except ObjectLostError as error:
            batch.outstanding, batch.groups = len(batch.requests), {}
            self._draw_again(batch, list(batch.requests.values()), error)
            return None
        scales = (self.decline.lr_scale, self.decline.kl_scale, self.entropy.weights)
        metrics = await self.trainer.train(credited.batch.denominator, max(staleness) == 0, *scales)
        metrics |= credited.metrics | {
            "train/staleness": sum(staleness) / len(staleness),
            "train/staleness_max": float(max(staleness)),
        }
        return metrics, credited

    async def _save_samples(self, batch: Batch, credited: Credited) -> None:
        """Have a worker write some of a step's trajectories to the run folder: it has their pixels and words."""
        size = self.config.train.group_size
        samples = []
        for number in range(min(self.config.observe.gallery_size, len(credited.batch))):
            # One of each group before a second of any.
            index, member = number % len(batch.groups), number // len(batch.groups) % size
            group, place = batch.in_order()[index], index * size + member
            advantages = tuple(credit.advantage for credit in credited.batch.items[place].credits)
            scores, trajectory = group.scores[member], group.record.outlines[member].trajectory
            said = tuple(reflection_rewards(trajectory, [score.match for score in scores]))
            shown = tuple(s if s.final is None else replace(s, value=s.final) for s in scores)
            samples.append(Sample(group.rollouts, member, shown, said, advantages))
        try:
            where = (self.config.run.dir, batch.step + 1)
            await self.rollout.call("save_samples", *where, samples, timeout_s=self.config.rollout.timeout_s)
        except ObjectLostError as error:
            self.trainer.say(f"step {batch.step + 1}: no samples saved, the rollouts are gone: {error}")

    def _share(self, groups: list[ScoredGroup], credited: Credited, part: frozenset[int]) -> list[Share]:
        """The groups that have items in a rank's part, with the credits of those items alone."""
        shares, index = [], 0
        for group in groups:
            indices = range(index, index + len(group.scores))
            index = indices.stop
            credits = tuple(credited.batch.items[i].credits if i in part else None for i in indices)
            if any(credit is not None for credit in credits):
                shares.append(Share(group.rollouts, credits, group.ref_logprobs))
        return shares

    def _metrics(self, batch: Batch, credited: Credited, watch: Stopwatch) -> dict[str, float]:
        """What the driver knows of a step besides the learner's and the credit's numbers."""
        metrics = batch.metrics(self.config.reward) | self.decline.metrics() | self.entropy.metrics()
        metrics |= canary_correlations(self.config.reward, batch.in_order(), credited.rewards["trajectory"])
        for pool in (self.rollout, *self.panel.pools, self.reference, self.trainer.ranks):
            if pool is not None:
                metrics |= {f"idle/{pool.role}": pool.idle_share(), **pool.counts()}
        return metrics | {"sync/fallbacks": self.sync.fallbacks} | watch.metrics()
