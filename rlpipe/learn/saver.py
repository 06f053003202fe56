"""Saving while training goes on: the state is copied to the host's memory, and a thread writes the copy."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from rlpipe.learn.checkpoint import Checkpointable, CheckpointError, Snapshot, save_checkpoint

_FREE_SHARE = 0.8
"""Of the free memory of a host that copies may take."""


@dataclass(frozen=True)
class Saved:
    """How a save ended: the step, the seconds of writing, and why there is no checkpoint (None: there is one)."""

    step: int
    seconds: float
    error: str | None = None


class Saver:
    """Saves the checkpoints of one learner, at most one at a time; all ranks call every method at the same time.

    mode: "always" copies and writes in the background, "never" writes at once, "auto" copies where the free memory
          of every rank's host holds the copies of all its ranks.

        saver = Saver(learner, "auto", timeout_s=1800)
        saver.save("runs/mine/checkpoints", 20, driver_state)    # when it returns, the learner may go on
        saver.ended(wait=True)                                   # Saved(step=20, seconds=3.1, error=None)
    """

    def __init__(self, learner: Checkpointable, mode: Literal["auto", "always", "never"], timeout_s: float) -> None:
        self.learner, self.mode = learner, mode
        self._group: dist.ProcessGroup | None = None
        self._on_host = 1
        if learner.world_size > 1:
            # Of its own, so that the thread's collectives never meet those of training; gloo, for tensors on the host.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._on_host = self._everyones(socket.gethostname()).count(socket.gethostname())
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Saved] | None = None

    def save(self, checkpoints: str | Path, step: int, driver: Mapping[str, Any]) -> None:
        """Begin to save; waits for a save that is under way.

        What goes wrong in the background is told by `ended`. Raises CheckpointError if it is written at once.
        """
        self._wait()
        state = self.learner.state_dict()
        if self._copies_fit(state):
            snapshot = self._snapshot(_copied(state))
            self._writing = self._threads.submit(self._write, checkpoints, step, snapshot, dict(driver))
            return
        self._writing = Future()
        self._writing.set_result(self._write(checkpoints, step, self._snapshot(state), driver))
        if (error := self._writing.result().error) is not None:
            raise CheckpointError(error)

    def ended(self, wait: bool) -> Saved | None:
        """How the last save ended, told once; None if none was begun since or, without `wait`, if it is under way."""
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def close(self) -> None:
        """Wait for the save that is under way."""
        self._wait()
        self._threads.shutdown()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _snapshot(self, state: dict[str, torch.Tensor]) -> Snapshot:
        learner = self.learner
        return Snapshot(learner.rank, learner.world_size, learner.policy_version, state)

    def _write(self, checkpoints: str | Path, step: int, snapshot: Snapshot, driver: Mapping[str, Any]) -> Saved:
        started, error = time.monotonic(), None
        try:
            save_checkpoint(checkpoints, step, snapshot, driver, self._group)
        except Exception as caught:  # Told by `ended`: training goes on without this checkpoint.
            error = str(caught) if isinstance(caught, CheckpointError) else f"{type(caught).__name__}: {caught}"
        return Saved(step, time.monotonic() - started, error)

    def _copies_fit(self, state: dict[str, torch.Tensor]) -> bool:
        if self.mode != "auto":
            return self.mode == "always"
        needed = sum(_local(tensor).nbytes for tensor in state.values()) * self._on_host
        return all(self._everyones(needed <= _FREE_SHARE * free_host_bytes()))

    def _everyones(self, value: Any) -> list[Any]:
        values = [value] * self.learner.world_size
        if self._group is not None:
            dist.all_gather_object(values, value, group=self._group)
        return values


def free_host_bytes() -> int:
    """Memory that this process may still take: what the kernel calls available, within the limit of its cgroup."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used + int(cached.get("inactive_file", 0)))


def _copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in memory of their own on the host; a DTensor stays one, with its own shard."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(state)
    finally:
        # Which forgets its buffers, so that their memory is free again after the save.
        stager.close()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
