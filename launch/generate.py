"""Images, verdicts and redrawn images in bulk: `python launch/generate.py [--config FILE] key=value ...`

e.g. generate.caption="a photo of two red circles", or data.prompts=my.txt generate.dir=results/mine
"""

from __future__ import annotations

import sys

from rlpipe.config import parse_args


def main() -> int:
    config, dry_run = parse_args("Draw, look and draw again, for any number of prompts.", job="generate")
    if dry_run:
        return 0
    # Torch and Ray are loaded only for a configuration that can be run.
    from roles.generate import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
