"""What a slow, a flaky and a dead judge do to a run: `python benchmarks/reward_faults.py --parts slow --json FILE`.

slow:  seconds a step with a judge whose calls take one second longer (`concurrency` 8), against the same judge without
       the delay, both asynchronous (max_staleness 1); pairs of runs in turn, median of all steps but the first three.
flaky: a whole run in which a fifth of all calls fail at random, against one without: rewards of the last steps,
       and failures that the judge made against those that the run counted. `--baseline` names the folder of a finished
       run without failures, which is then not made again.
dead:  a run in which every call fails: its exit status, its error, its checkpoint.

Every run is `launch/grpo.py` with configs/tiny_grpo.yaml. Overrides are handed on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from provenance import provenance, write

from rlpipe.paths import ROOT

WARM_UP = 3
SPANS = ("first", "reflection", "final")
"""Rewards whose sum is a trajectory's under credit rule v1."""


def train(folder: Path, overrides: list[str], check: bool = True) -> tuple[list[dict], subprocess.CompletedProcess]:
    """One run: the rows of its metrics.jsonl, and how its process ended."""
    command = [sys.executable, "launch/grpo.py", f"run.dir={folder}", "observe.terminal=plain", *overrides]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)  # where Ray's workers find the scorers
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if check and done.returncode:
        raise SystemExit(f"reward_faults: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return rows_of(folder), done


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, if there is one."""
    metrics = folder / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []


def slow(folder: Path, repeats: int, steps: int, overrides: list[str]) -> dict:
    """Seconds a step with and without the delay, and their ratio."""
    seconds: dict[float, list[float]] = {0.0: [], 1.0: []}
    for number in range(repeats):
        for delay, found in seconds.items():
            how = [
                "reward.0.scorer=benchmarks.faulty:SlowJudge",
                f"reward.0.options={{delay_s: {delay}}}",
                "reward.0.concurrency=8",
                "reward.0.batch_size=32",
                "reward.0.cache=0",
                "max_staleness=1",
                f"train.steps={steps}",
                "evaluate.limit=6",
                "evaluate.guidance_sweep=[]",
            ]
            rows, _ = train(folder / f"slow_{delay:g}_{number}", [*how, *overrides])
            found += [row["time/step"] for row in rows[WARM_UP:]]
    medians = {f"{delay:g}": float(np.median(found)) for delay, found in seconds.items()}
    ratio = medians["1"] / medians["0"]
    print(f"step with an instant judge {medians['0']:.2f} s, with a slow one {medians['1']:.2f} s: ratio {ratio:.3f}")
    return {"step_s": medians, "ratio": ratio, "steps": {f"{d:g}": len(found) for d, found in seconds.items()}}


def flaky(folder: Path, share: float, last: int, baseline: Path | None, overrides: list[str]) -> dict:
    """Rewards with and without failing calls, and the failures as made and as counted."""
    log = folder / "failed_calls.jsonl"
    judge = "reward.0.scorer=benchmarks.faulty:FlakyJudge"
    result: dict = {"share": share, "last_steps": last}
    for name, failing in (("without", 0.0), ("with", share)):
        run = folder / f"flaky_{name}"
        if baseline is not None and not failing:
            run, rows = baseline, rows_of(baseline)
        else:
            options = f"reward.0.options={{share: {failing}, log: {log}}}"
            rows, _ = train(run, [judge, options, "reward.0.batch_size=32", *overrides])
        ended = (run / "metrics.jsonl").stat().st_mtime
        rewards = np.array([sum(row[f"reward/{span}/mean"] for span in SPANS) for row in rows[-last:]])
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
        summary = json.loads((run / "summary.json").read_text())
        result[name] = {
            "steps": len(rows),
            "reward": float(rewards.mean()),
            "reward_standard_error": float(rewards.std(ddof=1) / len(rewards) ** 0.5),
            "accuracy_with_introspection": summary["table"]["rl"]["with"]["accuracy"],
            "failed_calls_made": sum(line["time"] <= ended for line in lines),
            "failed_calls_counted": sum(row.get("failures/judge/attempts", 0) for row in rows),
            "missing_scores": sum(row.get("failures/judge/missing", 0) for row in rows),
            "groups_drawn_again": sum(row["failures/groups"] for row in rows),
        }
        print(json.dumps({name: result[name]}), flush=True)
    difference = result["with"]["reward"] - result["without"]["reward"]
    noise = float(np.hypot(result["with"]["reward_standard_error"], result["without"]["reward_standard_error"]))
    print(f"mean reward of the last {last} steps: {difference:+.4f} with failures, standard error {noise:.4f}")
    return result | {"difference": difference, "standard_error": noise}


def dead(folder: Path, overrides: list[str]) -> dict:
    """How a run ends whose judge never answers from the start."""
    options = f"reward.0.options={{share: 1.0, log: {folder / 'dead_calls.jsonl'}}}"
    how = ["reward.0.scorer=benchmarks.faulty:FlakyJudge", options, "reward.0.batch_size=32"]
    rows, done = train(folder / "dead", [*how, *overrides], check=False)
    checkpoints = sorted(path.name for path in (folder / "dead" / "checkpoints").glob("step_*"))
    error = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    print(f"exit status {done.returncode}, checkpoints {checkpoints}\n{error}")
    return {"exit_status": done.returncode, "steps": len(rows), "checkpoints": checkpoints, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("slow", "flaky", "dead"), default=["slow", "flaky", "dead"])
    parser.add_argument("--runs", type=Path, default=Path("runs/reward_faults"), help="folder of the runs")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs of part slow")
    parser.add_argument("--steps", type=int, default=14, help="steps of each run of part slow")
    parser.add_argument("--share", type=float, default=0.2, help="of calls that fail in part flaky")
    parser.add_argument("--baseline", type=Path, help="run folder without failures, for part flaky")
    parser.add_argument("--last", type=int, default=40, help="steps at the end whose rewards are compared")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    arguments = parser.parse_args()
    folder = arguments.runs.resolve() / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    found: dict = {}
    if "slow" in arguments.parts:
        found["slow"] = slow(folder, arguments.repeats, arguments.steps, arguments.overrides)
    if "dead" in arguments.parts:
        found["dead"] = dead(folder, arguments.overrides)
    if "flaky" in arguments.parts:
        found["flaky"] = flaky(folder, arguments.share, arguments.last, arguments.baseline, arguments.overrides)
    if arguments.json:
        about = provenance()
        before = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
        merged = {**before, **{part: {**values, **about} for part, values in found.items()}}
        write(arguments.json, merged)


if __name__ == "__main__":
    main()
