"""GRPO on a unified multimodal model: `python launch/grpo.py [--config FILE] [--dry-run] key=value ...`"""

from __future__ import annotations

import sys

from rlpipe.config import parse_args


def main() -> int:
    config, dry_run = parse_args("Reinforcement learning with GRPO, then the table on held-out prompts.")
    if dry_run:
        from rlpipe.policy.plan import make_plan, plan_table
        from rlpipe.reward.scorer import scorers_fit

        if not scorers_fit(config.reward):
            return 2
        # As comments, so that what is printed is still the configuration.
        print(*(f"# {line}".rstrip() for line in plan_table(make_plan(config)).splitlines()), sep="\n")
        return 0
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.jobs import grpo, run_job

    return run_job(grpo, config)


if __name__ == "__main__":
    sys.exit(main())
