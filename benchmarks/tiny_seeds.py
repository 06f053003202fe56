"""The tiny world's result over several seeds: `python benchmarks/tiny_seeds.py --json FILE [key=value ...]`.

Runs `launch/grpo.py` once a seed and gathers the summaries in one list. `--parallel 2` runs two at a time, which says
nothing about speed. Overrides are handed on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from provenance import commit, hardware, write

from rlpipe.paths import ROOT


def run_seed(seed: int, folder: Path, overrides: list[str], threads: int | None) -> dict:
    """One training run with its evaluation; its summary, the largest log-prob gap of any step, and its command."""
    run = folder / f"seed_{seed}"
    command = [sys.executable, "launch/grpo.py", f"seed={seed}", f"run.dir={run}", "observe.terminal=plain", *overrides]
    if threads:
        roles = ("rollout", "reference", "learner", "reward.0")
        command += [f"{role}.threads={threads}" for role in roles] + ["placement.local_cpus=2"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    run.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(run / "output.txt", "a") as output:
        print(f"seed {seed}: {' '.join(command)}", flush=True)
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    print(f"seed {seed}: done in {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return {
        "seed": seed,
        "command": " ".join(["python", *command[1:]]).replace(str(folder), "RUNS"),
        "steps": len(rows),
        "max_mismatch": max(row["mismatch/max_abs"] for row in rows),
        **summary,
    }


def print_rows(summaries: list[dict]) -> None:
    columns = "seed   SFT without/with/fresh   RL without/with/fresh   gain   repaired damaged  verdict near-miss  gap"
    print(columns)
    for summary in summaries:
        cells = [
            "/".join(f"{100 * summary['table'][policy][name]['accuracy']:.1f}" for name in ("without", "with", "fresh"))
            for policy in ("sft", "rl")
        ]
        gain = summary["table"]["rl"]["with"]["accuracy"] - summary["table"]["sft"]["with"]["accuracy"]
        verdict = summary["verdict"]
        print(
            f"{summary['seed']:<6} {cells[0]:<24} {cells[1]:<23} {100 * gain:+.1f}  {summary['repaired']:.3f}    "
            f"{summary['damaged']:.3f}    {verdict['balanced_accuracy']:.3f}   "
            f"{verdict['near_miss_balanced_accuracy']:.3f}      {summary['max_mismatch']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny_seeds"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="where the list of summaries goes")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="torch threads of each role")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    arguments = parser.parse_args()
    folder = arguments.runs.resolve()
    with ThreadPoolExecutor(arguments.parallel) as executor:
        jobs = [executor.submit(run_seed, s, folder, arguments.overrides, arguments.threads) for s in arguments.seeds]
        summaries = [job.result() for job in jobs]
    print_rows(summaries)
    if arguments.json:
        for summary in summaries:
            summary |= {"commit": commit(), "hardware": hardware()}
        write(arguments.json, summaries)


if __name__ == "__main__":
    main()
