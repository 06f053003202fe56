"""`launch/sft.py` as a person runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlpipe.observe.tracker import read_metrics
from rlpipe.paths import ROOT
from rlpipe.policy.janus import JanusPolicy

SFT = ROOT / "launch" / "sft.py"


def sft(*arguments: str, limit_s: float = 240) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SFT), *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)


def test_a_ratio_of_nothing_is_refused_with_status_2_and_the_key() -> None:
    done = sft("sft.draw=0", "sft.judge=0", "sft.redraw=0", limit_s=60)
    assert done.returncode == 2 and "sft.draw" in done.stderr


def test_a_bad_label_row_is_refused_with_status_2_and_its_line(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "flux_0.7.jsonl").write_text('{"promptid": 1, "prompt": "a photo of a circle"}\n')
    done = sft(f"sft.data={tmp_path}", "--dry-run", limit_s=60)
    assert done.returncode == 2 and "flux_0.7.jsonl:1: data is None" in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_fine_tuning_of_the_shipped_policy_resumes_and_leaves_a_policy(tmp_path: Path) -> None:
    common = [f"run.dir={tmp_path / 'run'}", "sft.batch_size=8", "sft.num_samples=200", "train.checkpoint_every=2"]
    first = sft(*common, "train.steps=3")
    assert first.returncode == 0, first.stdout + first.stderr
    second = sft(*common, "train.steps=5")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resume: step 3" in second.stdout
    rows = read_metrics(tmp_path / "run").rows
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4, 5]
    tasks = {task for row in rows for task in ("draw", "judge", "redraw") if f"loss/{task}" in row}
    assert len(tasks) >= 2
    JanusPolicy.load(tmp_path / "run" / "policy")
    assert (tmp_path / "run" / "report" / "index.html").is_file()
