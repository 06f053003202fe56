"""`launch/generate.py` as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlpipe.paths import ROOT

GENERATE = ROOT / "launch" / "generate.py"
LIMIT_S = 240


def environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GENERATE), *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)


def test_every_wrong_input_is_one_line_before_torch_or_ray_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "reason.jsonl").write_text("{}\n")
    wrong = {
        "generate.samples=0": "generate.samples: 0 is too small",
        "generate.verdict_threshold=2": "generate.verdict_threshold: 2 is no probability",
        "rollout.image_top_p=0": "rollout.image_top_p: 0 keeps no token",
        "rollout.program=sing": "rollout.program: 'sing' is none of",
        "rollout.program=edit": "data.prompts: prompt 'caption' has no source_image",
        "resume=checkpoint": "resume: 'checkpoint' is no way to go on",
        "generate.images=nowhere": f"generate.images: {tmp_path / 'nowhere'} does not exist",
        "policy.path=nowhere": "policy.path: no config.json",
        "generate.dirr=x": "generate.dirr: no such key; did you mean generate.dir?",
        "generate.dir=used": f"generate.dir: {tmp_path / 'used'} holds reason.jsonl of something else",
    }
    code = (
        "import runpy, sys\n"
        f"for argument in {list(wrong)!r}:\n"
        "    sys.argv = ['generate.py', 'generate.caption=a cross', argument]\n"
        f"    try: runpy.run_path({str(GENERATE)!r}, run_name='__main__')\n"
        "    except SystemExit as e: print(e.code, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.splitlines() == ["2 []"] * len(wrong), done.stderr
    for line, expected in zip(done.stderr.splitlines(), wrong.values(), strict=True):
        assert line.startswith(expected)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_command_and_draws_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a photo of two red circles\na photo of a blue square\n")
    arguments = ["data.prompts=prompts.txt", "generate.samples=20", "generate.batch_size=1", "rollout.threads=1"]
    results = tmp_path / "results"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, str(GENERATE), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes)
    deadline = time.monotonic() + LIMIT_S
    while len(list(results.glob("parts/*.jsonl"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    parts = [json.loads(path.read_text()) for path in results.glob("parts/*.jsonl")]
    assert 3 <= len(parts) < 40, "killed too late to be in the middle"
    finished = {row["filename"]: (results / "samples" / row["filename"]).stat().st_mtime_ns for row in parts}

    again = run(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert "of 40 samples were there" in again.stdout and "samples: 40, prompts: 2" in again.stdout
    rows = [json.loads(line) for line in (results / "reason.jsonl").read_text().splitlines()]
    names = [f"{i:04d}.png" for i in range(40)]
    assert [row["filename"] for row in rows] == names
    assert [(row["id"], row["sample"]) for row in rows] == [
        (f"prompts-{line:05d}", sample) for line in (1, 2) for sample in range(20)
    ]
    for folder in ("samples", "regen_samples"):
        assert sorted(path.name for path in (results / folder).iterdir()) == names
    assert {name: (results / "samples" / name).stat().st_mtime_ns for name in finished} == finished
    assert not (results / "parts").exists()

    other = run(tmp_path, *arguments, "rollout.guidance=2")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "rollout.guidance (1.0 -> 2.0); give another generate.dir" in other.stderr
