"""Supervised fine-tuning through the same learner: `python launch/sft.py [--config FILE] [--dry-run] key=value ...`"""

from __future__ import annotations

import sys

from rlpipe.config import parse_args
from rlpipe.data.labels import summary, with_absolute_paths


def main() -> int:
    config, dry_run = parse_args(
        "Supervised fine-tuning: draw, judge, redraw, edit.", "configs/tiny_sft.yaml", job="sft"
    )
    if dry_run:
        return 0
    config.sft = with_absolute_paths(config.sft)
    if line := summary(config.sft):
        print(line, flush=True)
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.jobs import run_job, sft

    return run_job(sft, config)


if __name__ == "__main__":
    sys.exit(main())
