"""Seconds that a configuration's steps take to draw, by another checkout's code and by this one's.

    git worktree add ../before COMMIT
    python benchmarks/drawing.py --before ../before --json FILE       # configs/tiny_grpo.yaml

Each step draws `train.prompts_per_step` groups of `train.group_size` trajectories, as a rollout worker does. The two
checkouts take turns, step by step, each in a process of its own. What they draw is compared: in float32 the rows are
the same, but for one in hundreds where a chance falls between the roundings of two orders of sums. --clock cpu counts
the seconds of the drawing process, on one thread, for a machine that others use meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROOT = Path(__file__).resolve().parents[1]


def draw(arguments: argparse.Namespace) -> None:
    """Behind each line of the standard input, the number of a step: a line of JSON with its seconds and tokens."""
    import torch

    from rlpipe.config import load_config
    from rlpipe.data.prompts import load_prompts
    from rlpipe.policy.janus import JanusPolicy
    from rlpipe.rollout.decoder import Decoder
    from rlpipe.rollout.programs import introspect
    from roles.work import sampling_of

    torch.set_num_threads(arguments.threads)
    config, clock = load_config(arguments.config), CLOCKS[arguments.clock]
    policy = JanusPolicy.from_config(config, getattr(torch, config.policy.dtype)).requires_grad_(False)
    decoder, prompts = Decoder(policy), load_prompts(config.data.prompts)
    group, count = config.train.group_size, config.train.prompts_per_step
    for line in sys.stdin:
        first = int(line) * count
        chosen = [prompts[(first + row // group) % len(prompts)] for row in range(group * count)]
        samplings = [sampling_of(config.rollout, 1000 * first + row) for row in range(len(chosen))]
        started = clock()
        rollouts = introspect(decoder, chosen, samplings, [str(row) for row in range(len(chosen))])
        seconds = clock() - started
        segments = [rollout.trajectory.segments for rollout in rollouts]
        tokens = [[hashlib.md5(s.token_ids.astype("int64")).hexdigest() for s in row] for row in segments]
        images = sum(len(rollout.images) for rollout in rollouts)
        print(json.dumps({"seconds": seconds, "images": images, "tokens": tokens}), flush=True)


class Checkout:
    """A process that draws with the code of a checkout."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--config", str(arguments.config), "--threads", str(arguments.threads)]
        self.process = subprocess.Popen(
            [*command, "--clock", arguments.clock, "--draw"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self, number: int) -> dict:
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"drawing in {self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny_grpo.yaml"), help="as both checkouts have it")
    parser.add_argument("--steps", type=int, default=3, help="that are measured, behind one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--draw", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments)
        return 0
    if arguments.before is None or not (arguments.before / "rlpipe").is_dir():
        parser.error(f"--before {arguments.before}: give a folder with another checkout of this repository")
    from provenance import provenance, write

    checkouts = {"before": Checkout(arguments.before.resolve(), arguments), "now": Checkout(ROOT, arguments)}
    steps = [
        {name: checkout.step(number) for name, checkout in checkouts.items()} for number in range(arguments.steps + 1)
    ]
    for checkout in checkouts.values():
        checkout.close()
    seconds = {name: statistics.median(step[name]["seconds"] for step in steps[1:]) for name in checkouts}
    tokens = [[row for step in steps for row in step[name].pop("tokens")] for name in checkouts]
    apart = sum(one != other for one, other in zip(*tokens, strict=True))
    result = {
        "config": str(arguments.config),
        "clock": arguments.clock,
        "rows": len(tokens[0]),
        "rows_apart": apart,
        "seconds_per_step": seconds,
        "faster": seconds["before"] / seconds["now"],
        "steps": steps[1:],
    }
    print(json.dumps({key: value for key, value in result.items() if key != "steps"}, indent=1))
    write(arguments.json, provenance(arguments.threads, packages=["torch", "transformers"]) | result)
    return 1 if apart > len(tokens[0]) / 50 else 0


if __name__ == "__main__":
    sys.exit(main())
