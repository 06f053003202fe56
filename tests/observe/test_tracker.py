"""metrics.jsonl survives crashes, resumes and numbers that JSON cannot hold; mirrors are optional."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlpipe.config import ObserveSection
from rlpipe.observe.tracker import Tracker, read_metrics


def write_steps(run_dir: Path, first: int, last: int, value: float, resumed_step: int = 0) -> None:
    with Tracker(run_dir, ObserveSection(), resumed_step=resumed_step) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {"loss/total": value})


def test_every_step_is_one_flushed_line(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, ObserveSection())
    tracker.log(1, {"loss/total": 0.25, "train/step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"train/step": 1, "loss/total": 0.25}\n'
    tracker.close()


def test_a_resumed_run_counts_no_step_twice(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5, value=0.0)
    write_steps(tmp_path, 4, 6, value=1.0, resumed_step=3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["train/step"], row["loss/total"]) for row in rows] == [
        (1, 0.0),
        (2, 0.0),
        (3, 0.0),
        (4, 1.0),
        (5, 1.0),
        (6, 1.0),
    ]


def test_a_half_written_line_is_skipped_and_said_and_gone_after_a_resume(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3, value=0.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"train/step": 4, "los')
    log = read_metrics(tmp_path)
    assert [row["train/step"] for row in log.rows] == [1, 2, 3]
    assert log.damaged_lines == (4,)
    write_steps(tmp_path, 4, 4, value=0.0, resumed_step=3)
    assert read_metrics(tmp_path).damaged_lines == ()
    assert len(path.read_text().splitlines()) == 4


def test_of_two_lines_of_one_step_the_later_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1, "a": 1}\n[2]\n{"train/step": 1, "a": 3}\n{"a": 4}\n')
    log = read_metrics(tmp_path)
    assert [row["a"] for row in log.rows] == [3]
    assert log.damaged_lines == (2, 4)


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    with Tracker(tmp_path, ObserveSection()) as tracker:
        tracker.log(1, {"kl/image": float("nan"), "loss/total": float("inf"), "train/lr": 2e-4})
    (row,) = read_metrics(tmp_path).rows
    assert row == {"train/step": 1, "kl/image": None, "loss/total": None, "train/lr": 2e-4}


def test_a_run_without_metrics_reads_as_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path).rows == ()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, ObserveSection(tensorboard=True)) as tracker:
        tracker.log(1, {"loss/total": 0.5, "kl/image": float("nan")})
        tracker.log(2, {"loss/total": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/total")] == [(1, 0.5), (2, 0.25)]
    assert "kl/image" not in events.Tags()["scalars"]


def test_wandb_writes_offline_into_the_run_folder_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with Tracker(tmp_path, ObserveSection(wandb=True), "seed: 3\n") as tracker:
        tracker.log(1, {"loss/total": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
