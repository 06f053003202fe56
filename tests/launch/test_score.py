"""`launch/score.py` and `launch/calibrate_judge.py` as a person runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from rlpipe.paths import ROOT

LIMIT_S = 280
SLOW_SCORER = """
import time
from rlpipe.types import Score

class Slow:
    def score(self, requests):
        time.sleep(0.15 * len(requests))
        return [Score(id=r.id, value=r.image.mean() / 255) for r in requests]
"""


def environment(folder: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / script), *arguments]
    env = environment(folder)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S)


def interrupt(folder: Path, arguments: list[str], shards: Path, count: int, signum: int) -> subprocess.Popen[str]:
    """Run score.py until so many shards are there, send it a signal, and wait for its end."""
    command = [sys.executable, str(ROOT / "launch/score.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment(folder), **pipes)
    deadline = time.monotonic() + LIMIT_S
    while len(list(shards.glob("*.jsonl"))) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    process.wait(LIMIT_S)
    return process


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Arguments that score forty images by a scorer that takes 0.15 s for each, two a shard."""
    (tmp_path / "slow_scorer.py").write_text(SLOW_SCORER)
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(tmp_path / "images" / f"{i:02d}.png")
    scorer = ["reward.0.scorer=slow_scorer:Slow", "reward.0.path=null", "reward.0.options={}", "reward.0.name=slow"]
    return [*scorer, "reward.0.batch_size=1", "score.images=images", "score.world=0", "score.shard_size=2"]


@pytest.mark.parametrize("script", ["score.py", "calibrate_judge.py"])
def test_a_dry_run_names_what_is_wrong_with_a_scorer(tmp_path: Path, script: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    arguments = [
        "--dry-run",
        "score.images=.",
        "score.world=0",
        "calibrate.labels=checker",
        "reward.0.scorer=decomposed",
    ]
    ended = launch(tmp_path, script, *arguments, "reward.0.options={questions: nowhere.jsonl}")
    assert ended.returncode == 2
    said = f"error: reward[judge].options.questions: {tmp_path / 'nowhere.jsonl'} is no .jsonl or .csv file; give one"
    assert ended.stderr.strip() == said


def test_every_wrong_input_is_one_line_before_torch_or_ray_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "none.png", "prompt": "a cross"}\n')
    (tmp_path / "scores.jsonl").write_text('{"image": "none.png", "scores": {"judge": {"value": 1}}}\n')
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    wrong = {
        ("score.py", "score.images="): "score.images: empty",
        ("score.py", "score.images=nowhere"): f"score.images: {tmp_path / 'nowhere'} does not exist",
        ("score.py", "score.images=one.png"): f"score.images: {tmp_path / 'one.png'} is no .jsonl file",
        ("score.py", "score.images=rows.jsonl"): f"{tmp_path / 'rows.jsonl'}:1: image is 'none.png'; no such file",
        ("score.py", "score.out=one.png"): "score.out: 'one.png' is no folder",
        ("score.py", "score.shard_size=0"): "score.shard_size: 0 is too small",
        ("score.py", "score.prompts=nowhere.txt"): "score.prompts: ",
        ("score.py", "reward.0.path=nowhere"): f"reward.0.path: {tmp_path / 'nowhere'} does not exist",
        ("score.py", "reward.0.scorer=internvll"): "reward.0.scorer: 'internvll' is unknown",
        ("score.py", "score.wich=first"): "score.wich: no such key; did you mean score.which?",
        ("calibrate_judge.py", "calibrate.scores=nowhere"): f"calibrate.scores: {tmp_path / 'nowhere'} is no file",
        ("calibrate_judge.py", "calibrate.scores=rows.jsonl"): f"{tmp_path / 'rows.jsonl'}:1: no image with scores",
        ("calibrate_judge.py", "calibrate.scores=scores.jsonl"): "calibrate.labels: 'rows', and no row has a label",
        ("calibrate_judge.py", "calibrate.labels=mine"): "calibrate.labels: 'mine' is none of rows, checker",
        ("calibrate_judge.py", "calibrate.scorer=other"): "calibrate.scorer: 'other' is none of reward: judge",
    }
    code = (
        "import runpy, sys\n"
        f"for script, argument in {list(wrong)!r}:\n"
        "    sys.argv = [script, 'score.world=0', 'score.images=.', 'calibrate.labels=rows', argument]\n"
        "    if 'labels' in argument or 'scorer=other' in argument: sys.argv[3] = 'calibrate.labels=checker'\n"
        f"    try: runpy.run_path({str(ROOT / 'launch')!r} + '/' + script, run_name='__main__')\n"
        "    except SystemExit as e: print(e.code, sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code]
    env = environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout.splitlines() == ["2 []"] * len(wrong), done.stderr
    for line, expected in zip(done.stderr.splitlines(), wrong.values(), strict=True):
        assert line.startswith(expected)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_killed_or_stopped_goes_on_and_leaves_the_file_of_one_that_was_not(
    tmp_path: Path, images: list[str]
) -> None:
    straight = launch(tmp_path, "score.py", *images, "score.out=straight")
    assert straight.returncode == 0, straight.stderr
    assert "images 40/40" in straight.stdout and "slow: 40 scores" in straight.stdout

    arguments, shards = [*images, "score.out=cut"], tmp_path / "cut/shards"
    killed = interrupt(tmp_path, arguments, shards, 3, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and 3 <= len(list(shards.glob("*.jsonl"))) < 20
    torn, *whole = sorted(shards.glob("*.jsonl"))  # shards end in any order: no name is certain
    torn.write_text(torn.read_text()[:50])
    finished = {path: path.stat().st_mtime_ns for path in whole}

    stopped = interrupt(tmp_path, arguments, shards, len(finished) + 3, signal.SIGTERM)
    told = stopped.stderr.read()
    assert stopped.returncode == 128 + signal.SIGTERM, told
    assert told.count("\n") == 1 and "go on with the same command" in told
    assert not (tmp_path / "cut/scores.jsonl").exists()

    again = launch(tmp_path, "score.py", *arguments)
    assert again.returncode == 0 and "resume: " in again.stdout, again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert (tmp_path / "cut/scores.jsonl").read_bytes() == (tmp_path / "straight/scores.jsonl").read_bytes()

    other = launch(tmp_path, "score.py", *arguments, "score.limit=10")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "holds scores of other settings: images (" in other.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_tiny_judge_is_held_against_the_exact_checker_from_nothing(tmp_path: Path) -> None:
    arguments = ["score.images=cases.jsonl", "score.world=60", "score.out=out", "calibrate.resamples=100"]
    done = launch(tmp_path, "calibrate_judge.py", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/calibration.json").read_text())
    assert result["cases"] > 100 and result["base_rate"] == 0.5 and len(result["by_kind"]) == 6
    assert result["numbers"]["balanced_accuracy"]["value"] > 0.9 and result["mass"]["mean"] > 0.99
    assert "By kind of prompt" in done.stdout and (tmp_path / "out/calibration.svg").is_file()
