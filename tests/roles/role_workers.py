"""Rollout workers of the tests, which go on only when something else has happened."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlpipe.config import Config
from rlpipe.types import Rollout
from roles.rollout import RolloutWorker

LIMIT_S = 60


class PatientWorker(RolloutWorker):
    """Ends a call only when a Recorder's file names the first images of all its trajectories."""

    def __init__(self, config: Config, index: int, log: str) -> None:
        super().__init__(config, index)
        self.log = Path(log)

    def _ask_at_the_end(self, rollouts: list[Rollout]) -> Iterator[Any]:
        deadline = time.monotonic() + LIMIT_S
        while not all(f'"{r.trajectory.id}/0"' in self._told() for r in rollouts):
            if time.monotonic() > deadline:
                raise RuntimeError("nobody has asked about the first images")
            time.sleep(0.01)
        yield from super()._ask_at_the_end(rollouts)

    def _told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""
