"""What every training job has in common: learner ranks, run folder, checkpoints, resume, metrics, a clean stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from rlpipe.config import Config, to_yaml
from rlpipe.learn.checkpoint import CheckpointError, latest_checkpoint, prune_checkpoints, verify
from rlpipe.learn.saver import Saved
from rlpipe.observe.console import RunView
from rlpipe.observe.gallery import discard_rollouts
from rlpipe.observe.tracker import Tracker
from roles.group import ActorPool, RoleError
from roles.learner import LearnerActor
from roles.placement import Demand
from roles.work import Channel, Manifest, Share


class Stopped(RuntimeError):
    """The run was asked to stop by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Trainer:
    """Drives the learner's ranks as one, and keeps the run folder.

    `step` counts finished optimiser steps; it is the version of the weights that the learner holds.

        trainer = Trainer(config, demand)
        driver_state = await trainer.start()            # None in a fresh run
        await trainer.assemble(shares_of_each_rank)
        metrics = await trainer.train(denominator, fresh=True)
        await trainer.save(driver_state)
    """

    def __init__(self, config: Config, demand: Demand) -> None:
        self.config = config
        self.run_dir = Path(config.run.dir)
        self.step = 0
        self.saved_step = -1
        self.saving_step: int | None = None
        self.failed_saves = 0
        self._not_saved = ""
        self.damaged: list[CheckpointError] = []
        self._halted: asyncio.Future[int] | None = None
        self._tracker: Tracker | None = None
        self.view: RunView | None = None
        ranks = config.learner.ranks

        actor = ray.remote(LearnerActor).options(**demand.options)
        self.ranks = ActorPool(
            "learner",
            lambda rank: actor.remote(config, rank, ranks),
            ranks,
            start_timeout_s=config.learner.timeout_s,
            failures=0,
        )

    async def start(self) -> dict[str, Any] | None:
        """Start the ranks; restore the checkpoint that `resume` names, if there is one, with the driver's state."""
        self._halted = asyncio.get_running_loop().create_future()
        await self.ranks.start()
        address = await self._ask_first("rendezvous")
        await self._ask_all("start", address)
        state = None
        checkpoint = await asyncio.to_thread(self._checkpoint_to_resume)
        if checkpoint is not None:
            states = await self._ask_all("load", str(checkpoint))
            state = states[0]
            self.step = self.saved_step = state["step"]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        yaml = to_yaml(self.config)
        (self.run_dir / "config.yaml").write_text(yaml)
        discard_rollouts(self.run_dir, self.step)
        self._tracker = Tracker(self.run_dir, self.config.observe, yaml, self.step)
        observe, steps = self.config.observe, self.config.train.steps
        self.view = RunView(observe.terminal, steps, str(self.run_dir), self.step)
        self.view.__enter__()
        for error in self.damaged:
            self.view.say(f"checkpoint passed over: {error}")
        if state is not None:
            self.view.say(f"resume: step {self.step}, from {checkpoint}")
        return state

    def _checkpoint_to_resume(self) -> Path | None:
        if self.config.resume == "never":
            return None
        if self.config.resume == "auto":
            return latest_checkpoint(self.run_dir / "checkpoints", self.damaged.append)
        verify(self.config.resume)
        return Path(self.config.resume)

    async def assemble(self, shares: list[list[Share]]) -> None:
        """Have each rank fetch its part of the next batch."""
        await self.ranks.gather("assemble", [(s,) for s in shares], self.config.learner.timeout_s)

    async def assemble_items(self, items: ObjectRef, count: int) -> None:
        """Have each rank fetch its part of a batch of ready-made items."""
        await self._ask_all("assemble_items", [items], count)

    async def train(
        self,
        denominator: float,
        fresh: bool = True,
        lr_scale: float = 1.0,
        kl_scale: float = 1.0,
        entropy_weights: tuple[float, float] | None = None,
    ) -> dict[str, float]:
        """One optimiser step on what was assembled. Raises LearnerError, weights untouched, if it is refused."""
        steps = self.config.train.steps
        scales = (lr_scale, kl_scale, entropy_weights)
        metrics = await self._ask_all("step", denominator, self.step, steps, fresh, *scales)
        self.step += 1
        await self._note_saved()
        return metrics[0]

    async def publish(self, channel: Channel | None = None) -> Manifest:
        """The present weights, in the object store or by a channel, under the number of steps as their version."""
        return (await self._ask_all("publish", self.step, channel))[0]

    def first_rank(self) -> ActorHandle:
        """The actor that publishes."""
        return self.ranks.replicas[0].handle

    async def publish_initial(self) -> Manifest:
        """The weights of policy.path, version 0."""
        return (await self._ask_all("publish_initial", 0))[0]

    async def save(self, driver_state: dict[str, Any]) -> None:
        """Begin a checkpoint of this step, unless there is one. In memory it is complete; it may be on disk later."""
        if self.saved_step == self.step:
            return
        await self._note_saved(wait=True)
        folder = self.run_dir / "checkpoints"
        await self._ask_all("save", str(folder), self.step, {**driver_state, "step": self.step})
        self.saved_step = self.saving_step = self.step
        await self._note_saved()

    async def _note_saved(self, wait: bool = False) -> None:
        """Take note of how the save that is under way has ended, if it has; drop the oldest checkpoints after it."""
        if self.saving_step is None:
            return
        saved: Saved | None = (await self._ask_all("saved", wait))[0]
        if saved is None:
            return
        self.saving_step = None
        if saved.error is not None:
            self.failed_saves += 1
            self.saved_step, self._not_saved = -1, saved.error
            self.say(f"no checkpoint of step {saved.step}: {saved.error}")
            return
        train = self.config.train
        prune_checkpoints(self.run_dir / "checkpoints", train.keep_checkpoints, train.keep_every)

    async def export(self, folder: Path) -> None:
        """The present policy in the transformers layout."""
        await self._ask_all("export", str(folder))

    async def export_adapter(self, folder: Path) -> None:
        """The present adapters in peft's format."""
        await self._ask_all("export_adapter", str(folder))

    async def export_if_due(self) -> None:
        """Every train.export_every steps the present policy, there as a whole or not at all."""
        every = self.config.train.export_every
        if every and self.step % every == 0:
            await self._export_whole(self.run_dir / "exports")

    async def _export_whole(self, home: Path) -> Path:
        folder, unfinished = home / f"step_{self.step:06d}", home / "unfinished"
        await self.export(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        return folder

    async def keep_as_reference(self, held: str | None) -> str:
        """The present policy as a checkpoint in the run folder, there as a whole or not at all; its path.

        Earlier ones go, but those that a checkpoint of the run names and `held`, which is still in use.
        """
        await self._note_saved(wait=True)  # What it names is on disk then.
        home = self.run_dir / "reference"
        named = "".join(path.read_text() for path in (self.run_dir / "checkpoints").glob("step_*/state.json"))
        for folder in home.glob("*") if home.is_dir() else ():
            if str(folder) != held and json.dumps(str(folder)) not in named:
                shutil.rmtree(folder)
        return str(await self._export_whole(home))

    def log(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl and of the terminal."""
        metrics = metrics | {
            "failures/saves": self.failed_saves,
            "failures/damaged_checkpoints": len(self.damaged),
        }
        self._tracker.log(self.step, metrics)
        self.view.step(self.step, metrics)

    def say(self, text: str) -> None:
        """One line on the terminal."""
        if self.view is not None:
            self.view.say(text)

    async def _ask_first(self, method: str) -> Any:
        return (await self.ranks.gather(method, [()], self.config.learner.timeout_s))[0]

    async def _ask_all(self, method: str, *args: Any) -> list[Any]:
        return await self.ranks.broadcast(method, *args, timeout_s=self.config.learner.timeout_s)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Within: SIGTERM and ctrl-C halt the run where it is safe, in place of ending it; a second one ends it."""
        loop = asyncio.get_running_loop()

        def stop(signum: int) -> None:
            if self._halted.done():
                raise KeyboardInterrupt
            self.say(f"{signal.Signals(signum).name}: saving a checkpoint; once more to quit at once")
            self._halted.set_result(signum)

        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop, signum)
        try:
            yield
        finally:
            for signum in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(signum)

    @contextlib.asynccontextmanager
    async def saving(self, state: Callable[[], dict[str, Any]]) -> AsyncIterator[None]:
        """Within: whatever ends the training early, the steps that were finished are in a checkpoint first.

        What is being saved then is waited for; where that failed it is tried once more. Raises CheckpointError if the
        training has come to its end, and that is not on disk.
        """
        try:
            yield
        except Exception:
            try:
                await self._save_last(state())
                self.say(f"checkpoint of step {self.step} saved")
            except (RoleError, RayTaskError, CheckpointError) as error:
                self.say(f"checkpoint: {error}")
            raise
        await self._save_last(state())

    async def _save_last(self, driver_state: dict[str, Any]) -> None:
        """Have this step on disk. Raises CheckpointError."""
        await self._note_saved(wait=True)
        await self.save(driver_state)
        await self._note_saved(wait=True)
        if self.saved_step != self.step:
            try:
                newest = await asyncio.to_thread(latest_checkpoint, self.run_dir / "checkpoints")
            except CheckpointError:
                newest = None
            raise CheckpointError(
                f"no checkpoint of step {self.step}: {self._not_saved}; the newest usable one is {newest or 'none'}"
            )

    def fail(self, error: BaseException) -> None:
        """Halt the run with an error from one of the driver's loops; the first one counts."""
        if not self._halted.done():
            self._halted.set_exception(error)
            self._halted.exception()

    async def unless_halted(self, wanted: Awaitable) -> Any:
        """The result of `wanted`; or, as soon as the run is to halt, Stopped or the error that another loop met."""
        task = asyncio.ensure_future(wanted)
        try:
            await asyncio.wait({task, self._halted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if self._halted.done():
            raise Stopped(self._halted.result())
        return task.result()

    def close(self) -> None:
        if self.view is not None:
            self.view.__exit__(None, None, None)
        if self._tracker is not None:
            self._tracker.close()
        self.ranks.close()


class Stopwatch:
    """Seconds by phase of one step, as `time/<phase>` metrics.

    with watch("sync"): ...
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(phase, time.monotonic() - started)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def metrics(self) -> dict[str, float]:
        return {
            **{f"time/{phase}": seconds for phase, seconds in self.seconds.items()},
            "time/step": time.monotonic() - self._started,
        }
