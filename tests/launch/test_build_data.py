"""`launch/build_data.py` as a person runs it, and fine-tuning on what it built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from rlpipe.config import SftSection
from rlpipe.data.labels import load_labels
from rlpipe.observe.tracker import read_metrics
from rlpipe.paths import ROOT


def launch(script: str, *arguments: str, limit_s: float = 250) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)


def test_nothing_to_label_is_refused_with_status_2_and_the_key() -> None:
    done = launch("build_data.py", "factory.images_per_prompt=0", limit_s=60)
    assert done.returncode == 2 and "factory.images_per_prompt" in done.stderr


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_set_is_built_gone_on_with_and_learned_from(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (64, 48), (250, 250, 250)).save(elsewhere / "3_0.png")
    (elsewhere / "3_1.png").write_bytes(b"no image")
    out = tmp_path / "set"
    arguments = [f"factory.out={out}", f"run.dir={out}", f"factory.images={elsewhere}", "factory.images_source=blank"]
    arguments += ["factory.limit=60", "factory.images_per_prompt=6", "factory.shard_size=30"]
    arguments += ["factory.max_failed_share=0.5"]
    first = launch("build_data.py", *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "without label 1" in first.stdout
    label_file = out / "labels" / "janus_0.7.jsonl"
    whole = label_file.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["promptid"] for row in rows] == list(range(60)) and all(len(row["data"]) == 6 for row in rows)
    blank = json.loads((out / "labels" / "blank_0.7.jsonl").read_text())
    assert [image["img_path"] for image in blank["data"]] == [str(elsewhere / "3_0.png")]

    lost = out / "shards" / "janus" / "00001.jsonl"
    lost.unlink()
    untouched = (out / "shards" / "janus" / "00000.jsonl").stat().st_mtime_ns
    again = launch("build_data.py", *arguments)
    assert again.returncode == 0 and "2 of 3 shards are there" in again.stdout, again.stdout + again.stderr
    assert label_file.read_text() == whole
    assert (out / "shards" / "janus" / "00000.jsonl").stat().st_mtime_ns == untouched
    other = launch("build_data.py", *arguments, "seed=5", limit_s=60)
    assert other.returncode == 2 and "other settings: seed (0 -> 5)" in other.stderr

    labels = load_labels(SftSection(data=str(out)))
    assert labels.targets and labels.wrong and labels.redraws
    run = tmp_path / "run"
    tuned = launch("sft.py", f"sft.data={out}", f"run.dir={run}", "sft.batch_size=8", "train.steps=6")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    metrics = read_metrics(run).rows
    assert [row["train/step"] for row in metrics] == list(range(1, 7))
    assert len({task for row in metrics for task in ("draw", "judge", "redraw") if f"loss/{task}" in row}) >= 2
    assert list((run / "codes").glob("*.codes")) and (run / "policy" / "config.json").is_file()
