"""Everything that only a GPU can show, in one command of nine minutes: `python benchmarks/gpu_suite.py --json FILE`.

agreement   tokens of the native engine against the reference loop in float32, greedy and sampled; its log-probs
            against the learner's replay in float32 and bfloat16
modes       the engine's ways to run a step against each other (`DECODERS`), one image per row
rollout     full trajectories and single images of 1B and 7B over the batch, with and without guidance, against the
            reference loop and transformers, with the share of the measured limit
learner     one optimiser step: tokens per second, share of the matmul peak, memory
judge       P(yes) of a judge of 8B: images per second

Needs torch and transformers alone; without an installed rlpipe: `PYTHONPATH=. python benchmarks/gpu_suite.py`.
What the time does not reach is left out and named, and so is what fails: one part never takes the others with it.
`--rehearse` runs all parts with small models, also on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from agreement import agreement
from engines import Engines
from limits import Machine, Unavoidable, bandwidth, matmul_flops
from provenance import provenance, write
from sizes import REFLECTION_TOKENS, build, rows
from workloads import judge_step, learner_step

from rlpipe.rollout.decoder import Decoder
from rlpipe.types import Sampling

DECODERS: dict[str, dict] = {
    "eager": {},
    "graphs": {"graphs": True},
    "float8": {"graphs": True, "cache_dtype": "float8_e4m3"},
}
"""Keywords of `Decoder` by the name of the mode that they choose."""
FULL_RUN = {
    "agreement": [("tiny", "float32", 8), ("small", "float32", 4), ("small", "bfloat16", 8), ("1b", "bfloat16", 8)],
    "modes": ("1b", 16),
    "rollout": [("1b", "bfloat16"), ("7b", "bfloat16")],
    "batches": {"1b": [7, 64, 256], "7b": [7, 32, 96]},
    "learner": ("1b", 8),
    "judge": ("8b", 64),
}
REHEARSAL = {
    "agreement": [("tiny", "float32", 4), ("tiny", "bfloat16", 4)],
    "modes": ("tiny", 4),
    "rollout": [("tiny", "float32")],
    "batches": {"tiny": [2, 4]},
    "learner": ("tiny", 4),
    "judge": ("tiny", 4),
}


@dataclass
class Suite:
    """Runs parts until a deadline; `result` holds what each measured, or why there is nothing."""

    device: str
    plan: Mapping
    deadline: float
    result: dict = field(default_factory=dict)
    machines: dict[str, Machine] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def part(self, name: str, function: Callable[[], dict], needs_s: float = 0.0) -> None:
        """Run one part; a failure is written down and the memory it held given back."""
        started = time.perf_counter()
        if self.left < needs_s:
            self.result[name] = {"left_out": f"{self.left:.0f} s left, it needs about {needs_s:.0f} s"}
        else:
            try:
                self.result[name] = function()
            except Exception as error:  # out of memory on a smaller GPU, a kernel that is missing there
                traceback.print_exc()
                self.result[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            self.result[name]["part_seconds"] = round(time.perf_counter() - started, 1)
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        print(f"[{self.left:5.0f} s left] {name}: {json.dumps(self.result[name])}", flush=True)

    def machine(self, dtype: str) -> Machine:
        if dtype not in self.machines:
            flops = matmul_flops(self.device, getattr(torch, dtype))
            self.machines[dtype] = Machine(flops, bandwidth(self.device))
        return self.machines[dtype]

    def run(self) -> None:
        after = 0.15 * self.left  # for the learner and the judge
        rehearsed = self.plan is REHEARSAL
        for size, dtype, count in self.plan["agreement"]:
            self.part(f"agreement {size} {dtype}", lambda s=size, d=dtype, n=count: self.agreement(s, d, n))
        self.part("modes", self.modes)
        for size, dtype in self.plan["rollout"]:
            share = self.left - after if size == self.plan["rollout"][-1][0] else self.left / 4
            self.part(f"rollout {size}", lambda s=size, d=dtype, t=share: self.rollouts(s, d, max(t, 1.0)))
        machine = self.machine("float32" if rehearsed else "bfloat16")
        self.part(
            "learner", lambda: learner_step(*self.plan["learner"], self.device, machine.flops), 15 * (not rehearsed)
        )
        self.part("judge", lambda: judge_step(*self.plan["judge"], self.device, machine.flops), 15 * (not rehearsed))

    def agreement(self, size: str, dtype: str, count: int) -> dict:
        engines = Engines(build(size, getattr(torch, dtype), self.device))
        sampling = _sampling(size)
        still = replace(sampling, image_temperature=0.0, text_temperature=0.0)
        tf32 = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            return agreement(engines, rows(count, 7, sampling), rows(count, 7, still), dtype)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32

    def modes(self) -> dict:
        """Seconds of one image per row in every mode of the decoder."""
        size, count = self.plan["modes"]
        engines, sampling = Engines(build(size, _dtype(self.device), self.device)), _sampling(size)
        result = {}
        for name, keywords in DECODERS.items():
            engines.decoder = Decoder(engines.policy, **keywords)
            measured, _ = engines.measure("native_draw", rows(count, 7, sampling), 1, 60.0)
            result[name] = measured.summary()
        return result

    def rollouts(self, size: str, dtype: str, budget_s: float) -> dict:
        """Every engine over the batch, the native one first: what the budget does not reach is named."""
        end = time.perf_counter() + budget_s
        policy = build(size, getattr(torch, dtype), self.device)
        engines, unavoidable, machine = Engines(policy), Unavoidable(policy), self.machine(dtype)
        batches = self.plan["batches"][size]
        wanted = [("native", batch, 5.0) for batch in batches]
        wanted += [("native_draw", batches[-1], 5.0), ("native_draw", batches[-1], 1.0)]
        wanted += [("reference_loop", batch, 5.0) for batch in batches[:2]] + [("transformers", batches[1], 5.0)]
        wanted += [("native_draw", batches[1], 5.0)]
        measured: dict = {"machine": {"flops": machine.flops, "bandwidth": machine.bandwidth}, "runs": []}
        for name, batch, guidance in wanted:
            label = {"engine": name, "batch": batch, "guidance": guidance}
            left = end - time.perf_counter()
            if left < 0:
                measured["runs"].append(label | {"left_out": "no time"})
                continue
            try:
                drawn = rows(batch, 7, replace(_sampling(size), guidance=guidance))
                one, rollouts = engines.measure(name, drawn, 1, left / 6)
            except torch.OutOfMemoryError as error:
                measured["runs"].append(label | {"failed": str(error).splitlines()[0]})
                continue
            if name in ("native", "reference_loop"):
                phases = unavoidable.trajectories(rollouts)
            else:
                prompts = {prompt.text for prompt in drawn[0]}
                length = len(policy.templates.prompt(drawn[0][0].text))
                phases = unavoidable.images(len(prompts), batch, length, 1 if guidance == 1.0 else 2)
            limit = one.images / sum(phase.seconds(machine) for phase in phases.values())
            speed = one.images / one.seconds
            bounds = {"limit_images_per_second": limit, "share_of_limit": speed / limit}
            measured["runs"].append(label | one.summary() | bounds)
            print("   ", json.dumps(measured["runs"][-1]), flush=True)
        return measured | {"ratio": _ratio(measured["runs"])}


def _ratio(runs: list[dict]) -> dict:
    """The native engine's best over the reference loop: at its official batch, and at its own best."""

    def speeds(name: str) -> dict[int, float]:
        return {r["batch"]: r["images_per_second"] for r in runs if r["engine"] == name and "seconds" in r}

    native, loop = speeds("native"), speeds("reference_loop")
    if not native or not loop:
        return {}
    best = max(native.values())
    return {"official_batch": best / loop[min(loop)], "its_best_batch": best / max(loop.values())}


def _sampling(size: str) -> Sampling:
    return Sampling(
        guidance=5.0,
        max_reflection_tokens=REFLECTION_TOKENS[size],
        redraw_context="reencoded",
        reflection_room="group",
    )


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def print_table(result: Mapping) -> None:
    print(f"\n{'part':<16}{'engine':<16}{'batch':>6}{'guidance':>9}{'images/s':>10}{'of limit':>9}{'GiB':>7}")
    for name, part in result.items():
        for run in part.get("runs", ()):
            columns = f"{name:<16}{run['engine']:<16}{run['batch']:>6}{run['guidance']:>9g}"
            if "seconds" in run:
                memory = (run["memory_bytes"] or 0) / 2**30
                columns += f"{run['images_per_second']:>10.3f}{run['share_of_limit']:>9.0%}{memory:>7.1f}"
            else:
                columns += f"  {run.get('left_out') or run.get('failed')}"
            print(columns)
    for name, part in result.items():
        if "runs" not in part:
            print(f"{name:<28}{json.dumps(part)[:150]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes; written anew after every part")
    parser.add_argument("--seconds", type=float, default=530.0, help="no part starts later")
    parser.add_argument("--rehearse", action="store_true", help="small models, so that every part runs in a minute")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.rehearse:
        parser.error("this machine has no GPU; try the parts out with --rehearse")
    started = time.perf_counter()
    suite = Suite(device, REHEARSAL if arguments.rehearse else FULL_RUN, started + arguments.seconds)
    hardware = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{hardware}, torch {torch.__version__}", flush=True)
    try:
        suite.run()
    finally:
        told = provenance(torch.get_num_threads(), device, ["torch", "transformers"])
        write(arguments.json, told | {"seconds": time.perf_counter() - started, "parts": suite.result})
    print_table(suite.result)


if __name__ == "__main__":
    main()
