"""Learning rate of a step: a pure function of the learner's configuration and the run's length."""

from __future__ import annotations

import math

from rlpipe.schema import LearnerSection

SCHEDULES = ("constant", "linear", "cosine", "linear_then_linear", "linear_then_cosine")


def learning_rate(section: LearnerSection, step: int, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0 is the first) of a run of `total_steps`.

    constant             lr
    linear, cosine       lr falls to min_lr at total_steps
    linear_then_linear   lr falls to convert_lr at convert_steps, then to min_lr at total_steps (official code)
    linear_then_cosine   the same with a cosine at the end (paper)

    All begin with a linear warm-up over warmup_steps, W: of the first three, step x has lr (x + 1) / W; the other two
    have lr x / W as officially, so that their step 0 changes no weight.
    """
    name, warmup, peak = section.schedule, section.warmup_steps, section.lr
    if name not in SCHEDULES:
        raise ValueError(f"learner.schedule: {name!r} is none of {', '.join(SCHEDULES)}")
    two_parts = name.startswith("linear_then_")
    if step < warmup:
        return peak * (step if two_parts else step + 1) / warmup
    if name == "constant":
        return peak
    if not two_parts:
        return _fall(name, peak, section.min_lr, step, warmup, total_steps)
    convert = section.convert_steps
    if not warmup <= convert <= total_steps:
        raise ValueError(
            f"learner.convert_steps: {convert} is not within warmup_steps={warmup} and {total_steps} steps"
        )
    if step < convert:
        return _fall("linear", peak, section.convert_lr, step, warmup, convert)
    return _fall(name.removeprefix("linear_then_"), section.convert_lr, section.min_lr, step, convert, total_steps)


def _fall(shape: str, high: float, low: float, step: int, start: int, end: int) -> float:
    """From `high` at `start` to `low` at `end` and after it."""
    done = min(1.0, (step - start) / max(1, end - start))
    if shape == "cosine":
        done = 0.5 * (1.0 - math.cos(math.pi * done))
    return high + (low - high) * done
