"""A judge against labels: `python launch/calibrate_judge.py [--config FILE] [--dry-run] key=value ...`

Over scores that are there (calibrate.scores=runs/mine/scores.jsonl), or scoring score.images first.
"""

from __future__ import annotations

import sys

from rlpipe.config import parse_args


def main() -> int:
    description = "Hold a judge's scores against labels: accuracy, calibration, by kind of prompt."
    config, dry_run = parse_args(description, "configs/tiny_score.yaml", job="calibrate")
    if dry_run:
        from rlpipe.reward.scorer import scorers_fit

        return 0 if scorers_fit([] if config.calibrate.scores else config.reward) else 2
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.jobs import run_job
    from roles.scoring import calibrate_judge

    return run_job(calibrate_judge, config)


if __name__ == "__main__":
    sys.exit(main())
