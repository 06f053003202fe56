"""A judge against labels: `python launch/calibrate_judge.py [--config FILE] [--dry-run] key=value ...`

Over scores that are there (calibrate.scores=runs/mine/scores.jsonl), or scoring score.images first.
"""

from __future__ import annotations

import sys

from rlpipe.config import ConfigError, parse_args


def main() -> int:
    description = "Hold a judge's scores against labels: accuracy, calibration, by kind of prompt."
    config, dry_run = parse_args(description, "configs/tiny_score.yaml", job="calibrate")
    if dry_run:
        from rlpipe.reward.scorer import check_scorers

        try:
            check_scorers([] if config.calibrate.scores else config.reward)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.jobs import run_job
    from roles.scoring import calibrate_judge

    return run_job(calibrate_judge, config)


if __name__ == "__main__":
    sys.exit(main())
