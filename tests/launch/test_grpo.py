"""`launch/grpo.py` as a person runs it."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlpipe.observe.tracker import read_metrics
from rlpipe.paths import ROOT
from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.prompts import write_prompts

GRPO = ROOT / "launch" / "grpo.py"
LIMIT_S = 240


def environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_wrong_key_ends_with_status_2_and_one_line_before_torch_or_ray_are_loaded() -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['grpo.py', 'train.stepz=3', 'run.dir=/nonexistent/x']\n"
        f"try: runpy.run_path({str(GRPO)!r}, run_name='__main__')\n"
        "except SystemExit as e: print(e.code, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "2 []"
    assert done.stderr.count("\n") == 1 and "train.stepz" in done.stderr and "train.steps" in done.stderr


def test_a_dry_run_prints_the_configuration_and_starts_nothing(
    tiny_policy_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = settings(tmp_path, tiny_policy_path)
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--dry-run", *overrides])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(GRPO), run_name="__main__")
    assert not ended.value.code
    assert "prompts_per_step: 2" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def settings(folder: Path, policy: Path) -> list[str]:
    """A run of seconds: redness as the reward, no reference, eighteen held-out prompts of the tiny world."""
    for split in ("train", "test"):
        write_prompts(folder / f"{split}.jsonl", split, 3, seed=0)
    return [
        f"run.dir={folder / 'run'}",
        f"policy.path={policy}",
        f"data.prompts={folder / 'train.jsonl'}",
        f"evaluate.prompts={folder / 'test.jsonl'}",
        "evaluate.guidance_sweep=[2.0]",
        "reward.0.scorer=redness",
        "reward.0.path=null",
        "loss.kl_beta=0",
        "rollout.max_reflection_tokens=6",
        "train.prompts_per_step=2",
        "train.group_size=2",
        "train.steps=400",
        "placement.local_cpus=2",
    ]


def ended_within(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_is_terminated_saves_itself_and_the_same_command_finishes_it(
    tiny_policy_path: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(GRPO), *settings(tmp_path, tiny_policy_path)]
    run_dir = tmp_path / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    deadline = time.monotonic() + LIMIT_S
    while not read_metrics(run_dir).rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    status, output = ended_within(process, LIMIT_S)
    assert status == 128 + signal.SIGTERM, output
    assert "resume=auto" in output
    done = read_metrics(run_dir).rows[-1]["train/step"]
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{done:06d}"

    command += [f"train.steps={done + 1}"]
    status, output = ended_within(subprocess.Popen(command, cwd=tmp_path, **pipes), LIMIT_S)
    assert status == 0, output
    rows = read_metrics(run_dir).rows
    assert [row["train/step"] for row in rows] == list(range(1, done + 2))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["prompts"] == 18 and set(summary["table"]) == {"sft", "rl"}
    assert [row["guidance"] for row in summary["best_guidance"]["sft"]["sweep"]] == [1.0, 2.0]
    assert "with introspection" in output and str(run_dir / "report" / "index.html") in output
    assert (run_dir / "report" / "index.html").is_file()
    JanusPolicy.load(run_dir / "policy")
