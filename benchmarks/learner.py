"""A learner's step against the official way to it: `python benchmarks/learner.py --size small --json FILE [key=value]`.

Trajectories of random codes and words, every second one says No and has drawn again, go through the learner and
through `reference_rows`, the official five row-forwards: same weights, distributions, loss, in one process and in turn.
First both must give the same loss and gradients; then forward and backward are timed, the median of several behind a
warm-up. tokens_per_second, mfu and peak_memory_bytes are the learner's: tokens and operations are those that no learner
can avoid (`learning.unavoidable_work`), over the peak of large matrix products that was measured here (`limits.py`).
Seconds: of forward and backward, of a whole step, and of gathering the weights; their way on is `weight_sync.py`'s.

--clock cpu counts the seconds of this process alone, on one thread: for a machine that others use meanwhile.
--memory measures log-probs over a vocabulary of 102,400 instead, in chunks and whole, by the length of the sequence.
Overrides are those of a configuration: `learner.micro_batch=8 loss.context=constant policy.lora.rank=64`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from learning import RandomLearner, unavoidable_work
from limits import matmul_flops
from memory import give_back_at_once, peak_memory
from provenance import provenance, write
from rich.console import Console
from rich.table import Table
from sizes import REFLECTION_TOKENS, SIZES
from torch.nn.utils import get_total_norm
from trajectories import SPANS, Example, examples

from rlpipe.config import ConfigError, load_config
from rlpipe.learn.heads import score_group
from rlpipe.learn.layout import Distribution, Group
from rlpipe.schema import Config

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COUNT = {"tiny": 16, "small": 4, "1b": 8, "7b": 8}
"""Trajectories of a step."""
AT_ONCE = {"tiny": 16, "small": 2, "1b": 4, "7b": 2}
"""Trajectories in one forward and backward, of both ways."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Most relative difference of the two losses, and of the gradients in the norm of all of them."""
WIDTH, VOCABULARY, LENGTHS = 768, 102_400, (500, 1000, 2000)


class Bench:
    """Everything measured of one learner; `result` is what the JSON file holds."""

    def __init__(self, arguments: argparse.Namespace, config: Config) -> None:
        self.arguments, self.clock = arguments, CLOCKS[arguments.clock]
        self.learner = RandomLearner(config, arguments.size, arguments.device)
        self.examples = examples(
            self.learner.policy,
            arguments.count,
            REFLECTION_TOKENS[arguments.size],
            arguments.guidance,
            arguments.redraw_context == "reencoded",
            self.learner.options,
        )
        self.ways: dict[str, Callable[[list[Example]], float]] = {
            "learner": self.learner.forward_backward,
            "reference_rows": lambda batch: self.learner.reference_rows(batch, arguments.at_once),
        }
        self.result: dict = {}

    def check(self) -> bool:
        """Whether both ways have the same loss and gradients, on as many trajectories as go together."""
        batch, found = self.examples[: self.arguments.at_once], {}
        losses, gradients = {}, {}
        for name, way in self.ways.items():
            losses[name], gradients[name] = way(batch), self.learner.gradients()
        own, other = gradients["learner"], gradients["reference_rows"]
        norm = get_total_norm(list(other.values())).item()
        # what one way does not touch has gradient zero on the other
        apart = [own.get(n, 0.0) - other.get(n, 0.0) for n in own.keys() | other.keys()]
        found = {
            "loss": losses,
            "loss_difference": abs(losses["learner"] / losses["reference_rows"] - 1),
            "gradient_norm": norm,
            "gradient_difference": get_total_norm(apart).item() / norm,
        }
        found["ok"] = max(found["loss_difference"], found["gradient_difference"]) < TOLERANCE[self.arguments.dtype]
        self.result["check"] = found
        return found["ok"]

    def measure(self) -> None:
        seconds: dict[str, list[float]] = {name: [] for name in self.ways}
        peaks = {}
        for number in range(self.arguments.repeats + 1):
            for name, way in self.ways.items():
                self.learner.strategy.discard()
                with peak_memory(self.arguments.device) as peak:
                    seconds[name].append(self._seconds(lambda way=way: way(self.examples)))
                if number:
                    peaks[name] = max(peak.bytes, peaks.get(name, 0))
        median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        step, sections = self._step(), {}
        self.learner.strategy.discard()
        sections["gather"] = self._seconds(self.learner.weights)
        work = unavoidable_work(self.learner, self.examples)
        flops = matmul_flops(self.arguments.device, getattr(torch, self.arguments.dtype), self.clock)
        for name, value in median.items():
            self.result[name] = {
                "seconds": value,
                "range": [min(seconds[name][1:]), max(seconds[name][1:])],
                "seconds_per_trajectory": value / len(self.examples),
                "tokens_per_second": work.tokens / value,
                "mfu": work.operations / value / flops,
                "peak_memory_bytes": peaks[name],
            }
        own = self.result["learner"]
        self.result |= {
            "ratio": {"reference_rows": median["reference_rows"] / median["learner"]},
            "tokens_per_second": own["tokens_per_second"],
            "mfu": own["mfu"],
            "peak_memory_bytes": own["peak_memory_bytes"],
            "seconds": {"forward_backward": median["learner"], "step": step, **sections},
            "work": {"trajectories": len(self.examples), "tokens": work.tokens, "operations": work.operations},
            "matmul_flops": flops,
        }

    def _step(self) -> float:
        """Median seconds of a whole step: forward, backward, clipping and optimiser."""
        items, denominator = [example.item for example in self.examples], SPANS * len(self.examples)
        times = []
        for number in range(self.arguments.repeats):
            times.append(self._seconds(lambda n=number: self.learner.step(items, denominator, n, 100)))
        return statistics.median(times)

    def _seconds(self, function: Callable[[], object]) -> float:
        started = self.clock()
        function()
        if self.arguments.device.startswith("cuda"):
            torch.cuda.synchronize()
        return self.clock() - started

    def table(self) -> Table:
        a, work = self.arguments, self.result["work"]
        title = f"{a.size}, {a.dtype}, {a.device}: {work['trajectories']} trajectories, {work['tokens']} tokens"
        table = Table(title=title, title_justify="left")
        for column in ("way", "s", "s a trajectory", "tokens/s", "of matmul peak", "peak MiB"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for name in self.ways:
            one = self.result[name]
            columns = [f"{one[key]:.3g}" for key in ("seconds", "seconds_per_trajectory")]
            columns += [f"{one['tokens_per_second']:.0f}", f"{one['mfu']:.1%}"]
            table.add_row(name, *columns, f"{one['peak_memory_bytes'] / 2**20:.0f}")
        return table


def memory_rows(device: str, chunk: int) -> list[dict]:
    """Memory that forward and backward of log-probs take on top, by length, in chunks and whole."""
    torch.manual_seed(0)
    if device == "cpu":
        give_back_at_once()
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, device=device)
    head.weight.grad = torch.zeros_like(head.weight)  # it is there in a run, whatever the sequence
    policy, rows = SimpleNamespace(text_logits=head), []
    for length in LENGTHS:
        row: dict = {"sequence": length}
        for name, size in (("chunked", chunk), ("whole", length)):
            hidden = torch.randn(length, WIDTH, device=device, requires_grad=True)
            target = torch.randint(VOCABULARY, (length,))
            group = Group(Distribution("text"), torch.arange(length), None, target)
            with peak_memory(device) as peak:
                logprobs, _ = score_group(policy, hidden, group, "guided", chunk=size)
                logprobs.mean().backward()
            row[name] = peak.added
        rows.append(row)
    return rows


def memory_table(rows: list[Mapping], chunk: int) -> Table:
    table = Table(title=f"Peak MiB of log-probs, vocabulary {VOCABULARY:,}, width {WIDTH}", title_justify="left")
    for column in ("sequence", f"chunks of {chunk}", "whole"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["sequence"]), *(f"{row[name] / 2**20:.0f}" for name in ("chunked", "whole")))
    return table


def parse() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--count", type=int, help="trajectories of a step, half of them Yes; default by size")
    parser.add_argument("--at-once", type=int, help="trajectories in one forward of either way; default by size")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on CPU")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--redraw-context", choices=("sampled", "reencoded"), default="sampled")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, with --threads 1")
    parser.add_argument("--repeats", type=int, default=3, help="runs behind the warm-up, the median counts")
    parser.add_argument("--memory", action="store_true", help="the table of log-probs by sequence length alone")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of --memory whose logits exist at once")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    arguments = parser.parse_intermixed_args()
    arguments.count = arguments.count or COUNT[arguments.size]
    arguments.at_once = arguments.at_once or AT_ONCE[arguments.size]
    for name in ("count", "at_once", "threads", "repeats", "chunk"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give 1 or more")
    if arguments.clock == "cpu" and (arguments.threads != 1 or arguments.device != "cpu"):
        parser.error("--clock cpu: adds up all threads and sees no GPU; give --threads 1 --device cpu too")
    own = [
        f"policy.dtype={arguments.dtype}",
        f"policy.lora.rank={arguments.lora}",
        f"rollout.guidance={arguments.guidance}",
        f"learner.micro_batch={arguments.at_once}",
        f"learner.num_gpus={int(arguments.device != 'cpu')}",
        "loss.max_mismatch=1e9",
    ]
    try:
        return arguments, load_config(overrides=[*own, *arguments.overrides])
    except ConfigError as error:
        parser.error(str(error))


def main() -> int:
    arguments, config = parse()
    torch.set_num_threads(arguments.threads)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    about = provenance(arguments.threads, arguments.device, ["torch", "transformers", "peft"])
    if arguments.memory:
        rows = memory_rows(arguments.device, arguments.chunk)
        console.print(memory_table(rows, arguments.chunk))
        write(arguments.json, about | {"chunk": arguments.chunk, "rows": rows})
        return 0
    bench = Bench(arguments, config)
    ok = bench.check()
    console.print_json(data=bench.result["check"])
    if not ok:
        print("learner: the two ways differ; nothing was timed", file=sys.stderr)
    else:
        bench.measure()
        console.print(bench.table())
        console.print_json(data={key: bench.result[key] for key in ("ratio", "mfu", "seconds")})
    options = {key: getattr(arguments, key) for key in ("size", "dtype", "lora", "guidance", "redraw_context", "clock")}
    write(arguments.json, about | options | {"overrides": arguments.overrides} | bench.result)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
