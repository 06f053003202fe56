"""Scores of any images by the scorers of `reward`: `python launch/score.py [--config FILE] [--dry-run] key=value ...`

e.g. score.images=photos/ score.caption="a cat" score.out=runs/cats
"""

from __future__ import annotations

import sys

from rlpipe.config import parse_args


def main() -> int:
    config, dry_run = parse_args("Score a folder or a list of images.", "configs/tiny_score.yaml", job="score")
    if dry_run:
        from rlpipe.reward.scorer import scorers_fit

        return 0 if scorers_fit(config.reward) else 2
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.jobs import run_job
    from roles.scoring import score

    return run_job(score, config)


if __name__ == "__main__":
    sys.exit(main())
