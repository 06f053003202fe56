"""`check_run.py RUN_DIR STEPS`: does a finished run's folder hold what the README promises?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MAX_GAP = 1e-4
"""Largest gap between a sampler's and the learner's log-prob, in float32, of the same policy version."""


def main(run_dir: Path, steps: int) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    for policy in ("sft", "rl"):
        for introspection in ("without", "with"):
            cell = summary["table"][policy][introspection]
            low, high = cell["ci95"]
            assert low <= cell["accuracy"] <= high, f"table.{policy}.{introspection}: {cell}"
            assert cell["by_tag"], f"table.{policy}.{introspection}.by_tag is empty"
    for key in ("repaired", "damaged", "prompts", "seconds"):
        assert key in summary, f"summary.json has no {key}"
    for key in ("accuracy", "balanced_accuracy"):
        assert key in summary["verdict"], f"summary.json has no verdict.{key}"

    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == steps, f"metrics.jsonl has {len(rows)} lines, not {steps}"
    for row in rows:
        gap = row["mismatch/max_abs"]
        assert gap <= MAX_GAP, f"step {row['train/step']}: mismatch/max_abs {gap} is above {MAX_GAP}"
        assert any(key.startswith("time/") for key in row), f"step {row['train/step']} has no time/*"
    for name in ("config.yaml", "report/index.html", "checkpoints"):
        assert (run_dir / name).exists(), f"no {name} in {run_dir}"
    print(f"summary.json: {summary['prompts']} prompts; metrics.jsonl: {len(rows)} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
