"""An InternVL judge from the original layout to transformers': `python launch/convert_judge.py --source DIR --out DIR`

    python launch/convert_judge.py --source InternVL2_5-26B --out InternVL2_5-26B-hf --dry-run
    python launch/convert_judge.py --source InternVL2_5-26B --out InternVL2_5-26B-hf

InternVL2.5 and InternVL3 with InternLM2 or Qwen2. No code of the checkpoint runs; the weights are copied shard by shard
and keep their type.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="checkpoint in the original layout")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be done, write nothing"
    )
    arguments = parser.parse_args(argv)

    from rlpipe.reward.convert import Plan, check_target, write
    from rlpipe.reward.original import OriginalError

    out = arguments.out.expanduser().absolute()
    try:
        plan = Plan.of(arguments.source.expanduser())
        for line in plan.lines():
            print(line)
        check_target(plan, out)
        if arguments.dry_run:
            print(f"{plan.bytes / 2**30:.2f} GiB would be written to {arguments.out}")
            return 0
        write(plan, out, report=lambda line: print(line, flush=True))
    except (FileNotFoundError, OriginalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {plan.bytes / 2**30:.2f} GiB, {plan.config.text_config.model_type} judge")
    return 0


if __name__ == "__main__":
    sys.exit(main())
