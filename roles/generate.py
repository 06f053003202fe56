"""Generation in bulk: rollout workers under Ray Data draw samples and write them to a results folder."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlpipe.config import Config
from rlpipe.data.outputs import (
    OutputError,
    Remark,
    Results,
    SampleRequest,
    files_of,
    generation_prompts,
    program_of,
    record_of,
    requests_of,
    settings_of,
)
from rlpipe.data.prompts import PromptError
from rlpipe.paths import resolve_path
from rlpipe.policy.checkpoint import CheckpointError, read_configs
from rlpipe.policy.pixels import load_image
from rlpipe.policy.templates import Templates, check_prompts
from rlpipe.rollout import programs
from rlpipe.types import Rollout, Sampling
from roles.group import LOST
from roles.placement import Demand, PlacementError, connect, with_absolute_paths
from roles.rollout import RolloutWorker
from roles.work import sampling_of

LOSSES = 3
"""Times that the workers are started again, for what is left, when one of them is lost."""
PLAIN_EVERY_S = 30.0
"""Between two lines of progress where there is no terminal."""
VERDICT_ALONE = Sampling(text_temperature=0.0, max_reflection_tokens=1)
COLUMNS = pa.schema(
    [("name", pa.string()), ("prompt_id", pa.string()), ("text", pa.string())]
    + [("source_image", pa.string()), ("number", pa.int64()), ("seed", pa.int64())]
)


class GenerationError(RuntimeError):
    """Samples that cannot be drawn, in one line."""


class WorkerLost(RuntimeError):
    """A worker that died; its samples are missing."""


EXPECTED = (OutputError, PromptError, PlacementError, CheckpointError, GenerationError)
"""Errors that a person can act on: told in one line, without a traceback."""


class Interrupted(BaseException):
    """The job was asked to stop by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class SampleWorker(RolloutWorker):
    """A rollout worker that serves the weights it was loaded with, as a callable of Ray Data.

    Takes a table of SampleRequests, writes their images and rows, and answers how many, or what is wrong with them.
    """

    draws_groups = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.program = program_of(config)
        self.results = Results(config.generate.dir, self.program)

    def __call__(self, table: pa.Table) -> dict[str, np.ndarray]:
        requests, error = [SampleRequest(**row) for row in table.to_pylist()], ""
        try:
            self._serve(requests)
        except ValueError as wrong:  # Bad input. Ray Data would hand on a traceback without the error itself.
            error = " ".join(str(wrong).split())
        return {"samples": np.array([0 if error else len(requests)]), "error": np.array([error])}

    def _serve(self, requests: Sequence[SampleRequest]) -> None:
        if self.program == "look":
            rows, files = [record_of(r, [remark]) for r, remark in zip(requests, self._look(requests), strict=True)], ()
        else:
            rollouts = self._draw(requests)
            columns = zip(requests, self._remarks(rollouts), rollouts, strict=True)
            rows = [record_of(request, remarks, len(rollout.images)) for request, remarks, rollout in columns]
            files = [files_of(request, rollout) for request, rollout in zip(requests, rollouts, strict=True)]
        self.results.save(requests, rows, files)

    def _sampling(self, seed: int) -> Sampling:
        sampling = sampling_of(self.config.rollout, seed)
        return replace(sampling, verdict_threshold=self.config.generate.verdict_threshold)

    def _sources(self, requests: Sequence[SampleRequest], square: str) -> list[np.ndarray]:
        return [load_image(request.source_image, self.policy.image_size, square) for request in requests]

    def _draw(self, requests: Sequence[SampleRequest]) -> list[Rollout]:
        prompts, ids = [r.prompt for r in requests], [f"{r.prompt_id}/{r.number}" for r in requests]
        samplings = [self._sampling(request.seed) for request in requests]
        if self.program == "edit":
            sources = self._sources(requests, "crop")
            return programs.edit(self.decoder, prompts, sources, samplings, ids, limit=self.limit)
        program = programs.draw_only if self.program == "draw" else programs.introspect
        return program(self.decoder, prompts, samplings, ids, limit=self.limit)

    def _remarks(self, rollouts: Sequence[Rollout]) -> list[list[Remark]]:
        """Per rollout what was said of its images, in order."""
        prompts, images = [], []
        for rollout in rollouts:
            count = len(rollout.trajectory.texts)
            prompts += [rollout.trajectory.prompt] * count
            images += rollout.images[:count]
        # The sampler keeps the log-prob of the verdict, from which temperature or a threshold may have taken P(Yes).
        seen = iter(programs.look(self.decoder, prompts, images, VERDICT_ALONE))
        remarks = []
        for trajectory in (rollout.trajectory for rollout in rollouts):
            words = [self.policy.templates.text(trajectory.segments[i].token_ids) for i in trajectory.texts]
            verdicts = zip(trajectory.verdicts, words, strict=True)
            remarks.append([Remark(said_yes, text, round(next(seen).p_yes, 6)) for said_yes, text in verdicts])
        return remarks

    def _look(self, requests: Sequence[SampleRequest]) -> list[Remark]:
        # One call an image: the rows of one call share their noise.
        remarks = []
        for request, image in zip(requests, self._sources(requests, "pad"), strict=True):
            (seen,) = programs.look(self.decoder, [request.prompt], [image], self._sampling(request.seed))
            remarks.append(Remark(seen.reflection.startswith("Yes"), seen.reflection, round(seen.p_yes, 6)))
        return remarks


def run(config: Config) -> int:
    """Draw what is missing and return the process's exit status."""
    try:
        generate(config)
    except Interrupted as stopped:
        print("stopped; go on with the same command", file=sys.stderr)
        return 128 + stopped.signum
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


def generate(config: Config) -> list[dict[str, Any]]:
    """Draw every sample that is not there yet; all rows of the records, in order.

    Raises OutputError, PromptError, PlacementError, CheckpointError, GenerationError; Interrupted by a signal.
    """
    config = with_absolute_paths(config)
    config.generate.dir = str(Path(config.generate.dir).absolute())
    prompts, program = generation_prompts(config), program_of(config)
    tokenizer, *_ = read_configs(resolve_path(config.policy.path))
    check_prompts(prompts, Templates(tokenizer).configured(config), program)
    results, requests = Results(config.generate.dir, program), requests_of(config, prompts)
    results.begin(settings_of(config, prompts))
    rows = results.gather(requests)
    todo = [request for request in requests if request.key not in rows]
    view = ProgressView(config.observe.terminal, len(requests), len(rows))
    if todo:
        section = config.rollout
        demand = Demand("rollout", section.workers, section.num_cpus, section.num_gpus, "rollout.workers")
        connect(config, {"rollout": demand})
        with interruptible(), view:
            rows = draw_all(config, results, requests, todo, view)
    results.end()
    said = [row["correct"] for row in rows.values() if "correct" in row]
    yes = f", {sum(said)} of the first images said to match" if said else ""
    view.say(f"samples: {len(rows)}, prompts: {len(prompts)}{yes}; {results.records}")
    return list(rows.values())


def draw_all(
    config: Config,
    results: Results,
    requests: Sequence[SampleRequest],
    todo: Sequence[SampleRequest],
    view: ProgressView,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Draw the samples `todo`, again those that a lost worker left; the rows of all `requests` by their keys."""
    losses = 0
    while todo:
        try:
            for count in drawn(config, batches(config, todo)):
                view.advance(count)
        except WorkerLost as lost:
            losses += 1
            if losses > LOSSES:
                raise GenerationError(f"rollout: workers were lost {losses} times; the last: {lost}") from lost
            view.say(f"a worker was lost, what is left starts again: {lost}")
        finally:
            rows = results.gather(requests)
            todo, view.done = [request for request in requests if request.key not in rows], len(rows)
    return rows


def batches(config: Config, requests: Sequence[SampleRequest]) -> list[list[SampleRequest]]:
    """What workers draw in one call each: generate.batch_size samples, or fewer if workers would go idle.

    With rollout.reflection_room group a call has whole prompts, because a sample then depends on its prompt's others.
    """
    size = min(config.generate.batch_size, math.ceil(len(requests) / config.rollout.workers))
    whole = config.rollout.reflection_room == "group" and program_of(config) == "introspect"
    calls: list[list[SampleRequest]] = []
    for request in requests:
        full = not calls or len(calls[-1]) >= size
        if full and not (whole and calls and calls[-1][-1].prompt_id == request.prompt_id):
            calls.append([])
        calls[-1].append(request)
    return calls


def drawn(config: Config, calls: Sequence[Sequence[SampleRequest]]) -> Iterator[int]:
    """Draw and save the samples of each call on the rollout workers; yields how many were saved, as they are.

    Waits for the next call's end for rollout.timeout_s at most (the first one includes loading the policy).
    Raises WorkerLost with work left, GenerationError where going on would not help.
    """
    section = config.rollout
    # Ray Data's own console output says nothing that the progress here does not.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    tables = [pa.Table.from_pylist([asdict(request) for request in call], COLUMNS) for call in calls]
    with warnings.catch_warnings():
        # Ray Data's own restarts know no limit, and a batch that kills its worker would do so for ever. The pinned Ray
        # warns of these options, and has no others.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.from_arrow(tables).map_batches(
            SampleWorker,
            fn_constructor_args=(config,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=section.workers),
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        )
    late = f"no sample within {section.timeout_s:g} s; raise rollout.timeout_s or lower generate.batch_size"
    try:
        # Closed, because Ray Data draws on for as long as anything holds its iterator.
        with closing(iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))) as answers:
            while True:
                with deadline(section.timeout_s, GenerationError(f"rollout: {late}")):
                    answer = next(answers, None)
                if answer is None:
                    return
                if error := next(filter(None, answer["error"]), ""):
                    raise GenerationError(f"rollout: {error}")
                yield int(answer["samples"].sum())
    except LOST as error:
        lines = str(error).strip().splitlines()
        # A worker that cannot even load its policy will not do better the next time.
        if getattr(error, "actor_init_failed", False):
            raise GenerationError(f"rollout: {lines[-1]}") from error
        raise WorkerLost(lines[0]) from error


class ProgressView:
    """Samples done so far: a bar on a terminal, a line now and then elsewhere, or nothing (observe.terminal)."""

    def __init__(self, mode: str, total: int, done: int) -> None:
        self.console = Console(file=sys.stdout, highlight=False)
        self.mode, self.total, self.done, self.told = mode, total, done, time.monotonic()
        columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=mode != "auto" or not self.console.is_terminal)
        self.task = self.bar.add_task("samples", total=total, completed=done)

    def __enter__(self) -> ProgressView:
        self.bar.start()
        if self.done:
            self.say(f"{self.done} of {self.total} samples were there")
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self, count: int) -> None:
        self.done += count
        self.bar.update(self.task, completed=self.done)
        if self.bar.disable and time.monotonic() - self.told >= PLAIN_EVERY_S:
            self.told = time.monotonic()
            self.say(f"{self.done} of {self.total} samples")

    def say(self, text: str) -> None:
        if self.mode != "off":
            self.console.print(text, soft_wrap=True, markup=False)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted in here. Ray has its own handlers: enter after it has started."""

    def interrupt(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def deadline(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` if the main thread is still in here after so long; only inside `interruptible`."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    timer = threading.Timer(seconds, expire)
    timer.start()
    try:
        yield
    except Interrupted:
        if expired.is_set():
            raise error from None
        raise
    finally:
        timer.cancel()
