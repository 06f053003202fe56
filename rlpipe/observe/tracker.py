"""Where metrics go: metrics.jsonl always, wandb and TensorBoard by one switch each."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from rlpipe.config import ObserveSection

METRICS_FILE = "metrics.jsonl"
STEP = "train/step"


@dataclass(frozen=True)
class MetricsLog:
    """The rows of a metrics.jsonl in file order, and the numbers of the lines that could not be read."""

    rows: tuple[dict[str, float | None], ...]
    damaged_lines: tuple[int, ...]


def read_metrics(run_dir: str | Path) -> MetricsLog:
    """Read `run_dir`/metrics.jsonl; a damaged or half-written line is skipped and its number (from 1) kept.

    A missing file is an empty log. Where a step stands twice the later line counts.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return MetricsLog((), ())
    rows: dict[int, dict[str, float | None]] = {}
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            damaged.append(number)
        else:
            rows.pop(row[STEP], None)
            rows[row[STEP]] = row
    return MetricsLog(tuple(rows.values()), tuple(damaged))


def _parse(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get(STEP), int) else None


def _finite_or_none(value: float) -> float | int | None:
    number = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    return number if math.isfinite(number) else None


class Tracker:
    """Writes one line a step and mirrors it to wandb and TensorBoard if asked.

    `train/step` counts finished optimiser steps from 1. NaN and infinity become null, which JSON can hold.

        tracker = Tracker(run_dir, config.observe, config_yaml, resumed_step=40)   # drops lines after step 40
        tracker.log(41, {"loss/total": 0.12})
        tracker.close()
    """

    def __init__(
        self, run_dir: str | Path, observe: ObserveSection, config_yaml: str = "", resumed_step: int = 0
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewind(resumed_step)
        self._file = open(self.path, "a", encoding="utf-8")
        self._wandb = _start_wandb(self.path.parent, config_yaml) if observe.wandb else None
        self._board = _start_tensorboard(self.path.parent, resumed_step) if observe.tensorboard else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write and flush one step's line."""
        row = {
            STEP: step,
            **{name: _finite_or_none(value) for name, value in metrics.items() if name != STEP},
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        known = {name: value for name, value in row.items() if value is not None}
        if self._wandb is not None:
            self._wandb.log(known, step=step)
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rewind(self, step: int) -> None:
        """Keep the whole lines up to `step` and nothing else, by an atomic replacement."""
        if not self.path.exists():
            return
        rows = [row for row in read_metrics(self.path.parent).rows if row[STEP] <= step]
        partial = self.path.with_suffix(".jsonl.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)


def _start_wandb(run_dir: Path, config_yaml: str):
    """A wandb run in `run_dir`: online with an API key, else (or if the server does not answer) offline."""
    import wandb

    def start(mode: str):
        return wandb.init(
            project="rlpipe",
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=OmegaConf.to_container(OmegaConf.create(config_yaml)) if config_yaml else None,
            mode=mode,
            settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
        )

    mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    if mode != "online":
        return start(mode)
    try:
        return start("online")
    except wandb.errors.Error as error:
        print(f"observe.wandb: no online run ({error}); writing offline to {run_dir}/wandb", file=sys.stderr)
        return start("offline")


def _start_tensorboard(run_dir: Path, resumed_step: int):
    from torch.utils.tensorboard import SummaryWriter

    # Events after the checkpoint belong to steps that are about to be done again.
    purge_step = resumed_step + 1 if resumed_step else None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
