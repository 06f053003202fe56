"""What is measured: the native engine and the baselines, behind one call, with the seconds of every phase.

native             draw, look, draw again: `rlpipe.rollout.programs.introspect`
reference_loop     the same by the official algorithm, see `reference_loop.py`
native_draw        one image per row: `rlpipe.rollout.programs.draw_only`
transformers       the same by transformers' own `generate(generation_mode="image")`
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from reference_loop import ReferenceLoop
from sizes import generation_config
from transformers import JanusForConditionalGeneration

from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.batch import Batch
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only, introspect
from rlpipe.types import Prompt, Rollout, Sampling

Rows = tuple[list[Prompt], list[Sampling], list[str]]
FULL, DRAWING = ("native", "reference_loop"), ("native_draw", "transformers")
ENGINES = FULL + DRAWING
_TIMED = {
    JanusPolicy: {"decode_codes": "decode pixels", "encode_pixels": "encode pixels", "embed_pixels": "see pixels"},
    Batch: {"__init__": "prompt", "draw": "draw", "look": "look", "redraw": "redraw"},
    ReferenceLoop: {"draw": "draw", "look": "look", "redraw": "redraw"},
    JanusForConditionalGeneration: {"generate": "draw"},
}


@dataclass(frozen=True)
class Measured:
    """One engine at one batch size. An image counts where a trajectory has it: a second one only after "No".

    seconds: of the median run. phases: seconds of each in that run; what is left over is `other`.
    runs: how many were measured behind the warm-up; 0 if the warm-up alone used up the time (then it is reported).
    memory: most bytes held above what was held before the run; None where nobody can tell.
    """

    trajectories: int
    images: int
    seconds: float
    phases: dict[str, float]
    runs: int
    memory: int | None

    def summary(self) -> dict:
        return {
            "images_per_second": self.images / self.seconds,
            "trajectories_per_second": self.trajectories / self.seconds,
            "seconds": self.seconds,
            "phases": self.phases,
            "runs": self.runs,
            "memory_bytes": self.memory,
        }


class Engines:
    """The engines of one policy. `clock`: what runs and phases are timed by, in seconds."""

    def __init__(self, policy: JanusPolicy, clock: Callable[[], float] = time.perf_counter) -> None:
        self.policy, self.decoder, self.clock = policy, Decoder(policy), clock

    def run(self, name: str, rows: Rows) -> list[Rollout]:
        """One batch. `transformers` returns rollouts without trajectories' log-probs: an empty list."""
        prompts, samplings, ids = rows
        if name == "native":
            return introspect(self.decoder, prompts, samplings, ids)
        if name == "reference_loop":
            return ReferenceLoop(self.policy, prompts, samplings).run(ids)
        if name == "native_draw":
            return draw_only(self.decoder, prompts, samplings, ids)
        _generate(self.policy, prompts, samplings[0])
        return []

    def measure(self, name: str, rows: Rows, repeats: int, budget_s: float) -> tuple[Measured, list[Rollout]]:
        """A warm-up of the same batch, then up to `repeats` runs within `budget_s`, at least one run in all."""
        started, records, rollouts = time.perf_counter(), [], []
        device = self.policy.device
        while len(records) <= repeats:
            spent = time.perf_counter() - started
            if records and spent * (1 + 1 / len(records)) > budget_s:
                break
            with _peak_memory(device) as memory, _phases(device, self.clock) as phases:
                begin = self.clock()
                rollouts = self.run(name, rows)
                _synchronise(device)
                seconds = self.clock() - begin
            phases["other"] = seconds - sum(phases.values())
            records.append((seconds, dict(phases), memory[0]))
        warm = records[1:] or records
        middle = sorted(warm, key=lambda record: record[0])[(len(warm) - 1) // 2]
        count = len(rows[0])
        images = sum(len(rollout.images) for rollout in rollouts) if rollouts else count
        seconds = statistics.median(record[0] for record in warm)
        return Measured(count, images, seconds, middle[1], len(records) - 1, middle[2]), rollouts


def _generate(policy: JanusPolicy, prompts: Sequence[Prompt], sampling: Sampling) -> torch.Tensor:
    """One image per row by transformers; pixels uint8 [B, H, W, 3]. Every prompt comes with a blank twin by itself."""
    sequences = [policy.templates.prompt(prompt.text) for prompt in prompts]
    width, pad = max(map(len, sequences)), policy.templates.pad
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in sequences], device=policy.device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=policy.device)
    codes = policy.janus.generate(
        ids,
        attention_mask=mask,
        generation_mode="image",
        generation_config=generation_config(policy, sampling.guidance),
    )
    return policy.decode_codes(codes)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _phases(device: torch.device, clock: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds of the phases while this is open; time inside an inner phase is the inner one's alone."""
    seconds: dict[str, float] = {}
    inner: list[float] = []

    def timed(function: Callable, phase: str) -> Callable:
        def call(*args, **kwargs):
            _synchronise(device)
            inner.append(0.0)
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                _synchronise(device)
                spent = clock() - start
                seconds[phase] = seconds.get(phase, 0.0) + spent - inner.pop()
                if inner:
                    inner[-1] += spent

        return call

    originals = [(cls, name, getattr(cls, name)) for cls, names in _TIMED.items() for name in names]
    for cls, name, function in originals:
        setattr(cls, name, timed(function, _TIMED[cls][name]))
    try:
        yield seconds
    finally:
        for cls, name, function in originals:
            setattr(cls, name, function)


@contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[int | None]]:
    """The first entry becomes the most bytes held above those at the start: the device's, or the process's (Linux)."""
    result: list[int | None] = [None]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield result
        result[0] = torch.cuda.max_memory_allocated(device) - before
        return
    before = None
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident set so far
        before = _status("VmRSS")
    yield result
    if before is not None:
        result[0] = _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
