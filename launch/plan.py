"""Memory of a policy in every role, before anything is loaded: `python launch/plan.py [--model FILE] key=value ...`

python launch/plan.py --model configs/models/janus_pro_7b.json policy.dtype=bfloat16 learner.ranks=8
"""

from __future__ import annotations

import argparse
import json
import sys

from rlpipe.config import DEFAULT_CONFIG, ConfigError, load_config


def main() -> int:
    parser = argparse.ArgumentParser(description="Every parameter's shape, type and bytes per rank, without weights.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--model", metavar="PATH", help="config.json or checkpoint folder; default: policy.path")
    parser.add_argument("--parameters", action="store_true", help="list every parameter, not only the parts")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. learner.ranks=8")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        # Torch is loaded only for a configuration that can be read.
        from rlpipe.policy.plan import make_plan, plan_json, plan_table

        plan = make_plan(config, arguments.model)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(plan_json(plan, arguments.parameters), indent=1))
    else:
        print(plan_table(plan, arguments.parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
