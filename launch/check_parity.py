"""Parity with the official code: `python launch/check_parity.py --golden DIR [--json FILE]`.

Runs sampler, replay, credit and loss on a golden directory and prints, for every part, the largest difference, what it
may be, and pass or fail. Exit status 0 if all pass, 1 if one fails, 2 if the directory cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rlpipe.evaluate.parity import Check, GoldenError, check_parity
from rlpipe.policy.checkpoint import CheckpointError
from rlpipe.policy.pixels import ImageError


def line(check: Check) -> str:
    bound = f"{check.bound:g} {check.unit}".strip()
    return f"{'pass' if check.passed else 'FAIL'}  {check.name:<40} {check.difference:<12.4g} at most {bound}"


def report(folder: Path, checks: list[Check]) -> dict:
    rows = [
        {
            "name": check.name,
            # JSON has no infinity and no NaN.
            "difference": check.difference if abs(check.difference) < float("inf") else None,
            "bound": check.bound,
            "unit": check.unit,
            "passed": check.passed,
        }
        for check in checks
    ]
    return {"golden": str(folder), "passed": all(check.passed for check in checks), "parts": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, required=True, metavar="DIR", help="golden directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    arguments = parser.parse_args(argv)
    checks = []
    try:
        for check in check_parity(arguments.golden):
            checks.append(check)
            print(line(check), flush=True)
    except (GoldenError, CheckpointError, ImageError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(report(arguments.golden, checks), indent=1) + "\n", "utf-8")
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} parts pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
