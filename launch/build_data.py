"""Build the set of supervised fine-tuning: `python launch/build_data.py [--config FILE] [--dry-run] key=value ...`"""

from __future__ import annotations

import sys

from rlpipe.config import parse_args


def main() -> int:
    description = "Draw images of prompts, let the judge score and explain them, write label files."
    config, dry_run = parse_args(description, "configs/tiny_data.yaml", job="factory")
    if dry_run:
        return 0
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.factory import build_data
    from roles.jobs import run_job

    return run_job(build_data, config)


if __name__ == "__main__":
    sys.exit(main())
