"""Images per second of the rollout engines, side by side: `python benchmarks/rollout.py --size small --json FILE`.

In one process: the native engine, the official algorithm (`reference_loop`), transformers' own image generation, and
the limit that was measured on this machine (`limits.py`). A full trajectory is drawn, looked at, and drawn again after
"No"; the coin of a row's seed decides (`sizes.py`), so that the same half of the rows says No in every engine. The
official algorithm draws a second image for every row; only those that a trajectory keeps are counted, for all alike.

--clock cpu counts the seconds of this process alone, on one thread: for a machine that others use meanwhile.
--check compares tokens with the reference loop and log-probs with the learner instead of measuring anything.
--budget shares its seconds among the measurements. Each runs at least once; one that has no time for a second run
reports its warm-up (`runs: 0`); what comes after the budget is used up is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from agreement import agreement
from engines import DRAWING, ENGINES, FULL, Engines
from limits import Machine, Unavoidable, bandwidth, matmul_flops
from picture import Line, panels
from provenance import provenance, write
from rich.console import Console
from rich.table import Table
from sizes import REFLECTION_TOKENS, SIZES, build, rows

from rlpipe.types import Rollout, Sampling

BATCHES = {"tiny": [7, 8, 64, 256], "small": [7, 8, 16], "1b": [7, 16, 64, 128], "7b": [7, 16, 64]}
"""Largest last: what the budget does not reach is the largest."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Bench:
    """All measurements of one policy; `result` is what the JSON file holds."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.dtype = arguments, getattr(torch, arguments.dtype)
        policy = build(arguments.size, self.dtype, arguments.device)
        self.clock = CLOCKS[arguments.clock]
        self.engines, self.unavoidable = Engines(policy, self.clock), Unavoidable(policy)
        self.sampling = Sampling(
            guidance=arguments.guidance,
            max_reflection_tokens=REFLECTION_TOKENS[arguments.size],
            redraw_context=arguments.redraw_context,
            reflection_room="group",
        )
        self.result: dict = {"engines": {name: {} for name in arguments.engines}}
        self.phase_limits: dict[tuple[str, int], dict[str, float]] = {}

    def rows(self, batch: int):
        return rows(batch, self.arguments.group, self.sampling)

    def check(self) -> bool:
        """Tokens and log-probs of a few rows; prints and keeps what was found."""
        sampled = self.rows(self.arguments.check)
        still = replace(self.sampling, image_temperature=0.0, text_temperature=0.0)
        greedy = rows(self.arguments.check, self.arguments.group, still)
        self.result["check"] = found = agreement(self.engines, sampled, greedy, self.arguments.dtype)
        Console().print_json(data=found)
        return found["ok"]

    def measure(self, console: Console) -> None:
        started, todo = time.perf_counter(), self._todo()
        self.flops = matmul_flops(self.arguments.device, self.dtype, self.clock)
        full: dict[int, list[Rollout]] = {}
        for number, (name, batch) in enumerate(todo):
            left = self.arguments.budget - (time.perf_counter() - started)
            if left <= 0:
                console.print(f"[yellow]{name} at {batch}: not measured, --budget {self.arguments.budget:g} is used up")
                continue
            share = left / (len(todo) - number)
            measured, rollouts = self.engines.measure(name, self.rows(batch), self.arguments.repeats, share)
            self.result["engines"][name][str(batch)] = measured.summary()
            if name in FULL:
                full.setdefault(batch, rollouts)
            console.print(f"{name} at {batch}: {measured.images / measured.seconds:.3f} images/s, {measured.runs} runs")
        self._limits(full)
        self._ratios()

    def _todo(self) -> list[tuple[str, int]]:
        """Engine and batch, smaller batches first."""
        arguments = self.arguments
        pairs = {(name, batch) for name in arguments.engines for batch in arguments.batches}
        if "reference_loop" in arguments.engines:
            pairs.add(("reference_loop", arguments.group))
        return sorted(pairs, key=lambda pair: (pair[1], ENGINES.index(pair[0])))

    # what is worked out from the measurements

    def _limits(self, full: Mapping[int, list[Rollout]]) -> None:
        """Per batch the seconds that nobody can avoid, of full trajectories and of the image part alone."""
        per_batch: dict[str, dict] = {}
        engines = self.result["engines"]
        for batch in sorted({int(batch) for measured in engines.values() for batch in measured}):
            prompts = [self.engines.policy.templates.prompt(prompt.text) for prompt in self.rows(batch)[0]]
            length, twins = max(map(len, prompts)), 1 if self.sampling.guidance == 1.0 else 2
            slots = length + self.engines.policy.num_image_tokens
            working_set = self.unavoidable.working_set(twins * batch, slots)
            machine = Machine(self.flops, bandwidth(self.arguments.device, working_set, self.clock))
            entry: dict = {"bandwidth": machine.bandwidth, "working_set_bytes": working_set}
            drawing = self.unavoidable.images(len(set(map(tuple, prompts))), batch, length, twins)
            parts = {"draw": (drawing, batch)}
            if batch in full:
                images = sum(len(rollout.images) for rollout in full[batch])
                parts["full"] = (self.unavoidable.trajectories(full[batch]), images)
            for part, (phases, images) in parts.items():
                seconds = {name: phase.seconds(machine) for name, phase in phases.items()}
                overlapped = sum(phase.overlapped(machine) for phase in phases.values())
                entry[part] = {
                    "images_per_second": images / sum(seconds.values()),
                    "images_per_second_overlapped": images / overlapped,
                    "phases": seconds,
                }
                for name in FULL if part == "full" else DRAWING:
                    if str(batch) in engines.get(name, {}):
                        one = engines[name][str(batch)]
                        one["share_of_limit"] = one["images_per_second"] / entry[part]["images_per_second"]
            per_batch[str(batch)] = entry
        self.result["limit"] = {"flops": self.flops, "by_batch": per_batch}

    def _ratios(self) -> None:
        engines = self.result["engines"]
        speed = {name: {b: one["images_per_second"] for b, one in by.items()} for name, by in engines.items()}
        native, loop = speed.get("native", {}), speed.get("reference_loop", {})
        ratio: dict = {"by_batch": {b: native[b] / loop[b] for b in native if b in loop}}
        if native:
            best = max(native, key=native.get)
            limit = self.result["limit"]
            limit["images_per_second"] = limit["by_batch"][best]["full"]["images_per_second"]
            limit["best_batch"] = int(best)
            self.result["share_of_limit"] = engines["native"][best]["share_of_limit"]
            if str(self.arguments.group) in loop:
                ratio["official_batch"] = native[best] / loop[str(self.arguments.group)]
            if ratio["by_batch"]:
                ratio["equal_batch"] = ratio["by_batch"][max(ratio["by_batch"], key=native.get)]
        ours, theirs = engines.get("native_draw", {}), engines.get("transformers", {})
        both = [b for b in ours if b in theirs]
        ratio["transformers"] = {b: theirs[b]["seconds"] / ours[b]["seconds"] for b in both}
        ratio["transformers_tokens"] = {b: _tokens_s(theirs[b]) / _tokens_s(ours[b]) for b in both}
        self.result["ratio"] = ratio

    # what is shown

    def table(self) -> Table:
        phases = ("prompt", "draw", "decode pixels", "see pixels", "look", "encode pixels", "redraw", "other")
        arguments = self.arguments
        title = f"{arguments.size}, {arguments.dtype}, {arguments.device}, guidance {arguments.guidance:g}"
        table = Table(title=title, title_justify="left")
        for column in ("engine", "batch", "images/s", "trajectories/s", "of limit", "MiB", *(f"{p} s" for p in phases)):
            table.add_column(column, justify="left" if column == "engine" else "right")
        limits = self.result["limit"]["by_batch"]
        for name, by_batch in self.result["engines"].items():
            for batch, one in by_batch.items():
                memory = "" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 2**20:.0f}"
                seconds = [f"{one['phases'][p]:.3g}" if p in one["phases"] else "" for p in phases]
                share = f"{one['share_of_limit']:.0%}"
                speeds = [f"{one[key]:.3g}" for key in ("images_per_second", "trajectories_per_second")]
                table.add_row(name, batch, *speeds, share, memory, *seconds)
        for part in ("full", "draw"):
            for batch, entry in limits.items():
                if part in entry:
                    seconds = [f"{entry[part]['phases'].get(p, 0):.3g}" for p in phases[:-1]]
                    speed = f"{entry[part]['images_per_second']:.3g}"
                    table.add_row(f"limit, {part}", batch, speed, "", "", "", *seconds, "")
        return table

    def picture(self) -> str:
        speed = {
            name: {int(b): one["images_per_second"] for b, one in by.items()}
            for name, by in self.result["engines"].items()
        }
        limits = self.result["limit"]["by_batch"]
        charts = {}
        for part, title, names in (("full", "Full trajectories", FULL), ("draw", "One image", DRAWING)):
            lines = [Line(name, speed[name]) for name in names if name in speed]
            bound = {int(b): entry[part]["images_per_second"] for b, entry in limits.items() if part in entry}
            if any(line.values for line in lines):
                charts[title] = [*lines, Line("limit", bound, limit=True)]
        return panels(f"Rollouts of {self.arguments.size}", charts)


def _tokens_s(one: dict) -> float:
    """Seconds up to the tokens, without their pixels."""
    return one["seconds"] - one["phases"]["decode pixels"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batches", type=int, nargs="+", help="rows of a call; default by size")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on CPU")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--group", type=int, default=7, help="rows of one prompt; also the official batch")
    parser.add_argument("--redraw-context", choices=("reencoded", "sampled"), default="reencoded")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, with --threads 1")
    parser.add_argument("--repeats", type=int, default=3, help="runs behind the warm-up, the median counts")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all measurements")
    parser.add_argument("--check", type=int, metavar="ROWS", help="compare tokens and log-probs of so many rows")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--picture", type=Path, help="where the SVG goes")
    arguments = parser.parse_args()
    arguments.batches = arguments.batches or BATCHES[arguments.size]
    for name in ("group", "threads", "repeats", "check"):
        if (getattr(arguments, name) or 1) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: give 1 or more")
    if arguments.clock == "cpu" and (arguments.threads != 1 or arguments.device != "cpu"):
        parser.error("--clock cpu: adds up all threads and sees no GPU; give --threads 1 --device cpu too")
    if min(arguments.batches) < 1:
        parser.error(f"--batches {min(arguments.batches)}: give 1 or more")
    return arguments


def main() -> int:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    bench, console, ok = Bench(arguments), Console(), True
    if arguments.check:
        ok = bench.check()
    else:
        bench.measure(console)
        wide = console if console.is_terminal else Console(width=190)
        wide.print(bench.table())
        wide.print_json(data={"ratio": bench.result["ratio"], "share_of_limit": bench.result.get("share_of_limit")})
        if arguments.picture is not None:
            arguments.picture.parent.mkdir(parents=True, exist_ok=True)
            arguments.picture.write_text(bench.picture())
    told = provenance(arguments.threads, arguments.device, ["torch", "transformers"])
    told |= {key: getattr(arguments, key) for key in ("size", "dtype", "group", "guidance", "redraw_context", "clock")}
    write(arguments.json, told | bench.result)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
