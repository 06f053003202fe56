"""Progress lines and the accuracy bars of the build stages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch


class BuildError(RuntimeError):
    """A stage that did not reach the accuracy it must reach."""


class Meter:
    """Exponential averages of named values, printed every so many steps with the time left."""

    def __init__(self, stage: str, steps: int, every: int = 100) -> None:
        self.stage, self.steps, self.every = stage, steps, every
        self.averages: dict[str, float] = {}
        self.start = time.perf_counter()

    def update(self, step: int, **values: float) -> None:
        for name, value in values.items():
            old = self.averages.get(name, value)
            self.averages[name] = old + 0.05 * (value - old)
        if step % self.every == 0 or step == self.steps:
            elapsed = time.perf_counter() - self.start
            left = elapsed / max(step, 1) * (self.steps - step)
            text = "  ".join(f"{k} {v:.4f}" for k, v in self.averages.items())
            print(f"[{self.stage}] {step}/{self.steps}  {elapsed:.0f} s, {left:.0f} s left  {text}", flush=True)


def learning_rates(steps: int, peak: float, warmup: int = 80, floor: float = 0.02) -> Iterator[float]:
    """Linear warm-up, then a cosine down to `floor * peak`."""
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        yield peak * (min(1.0, (step + 1) / warmup) * cosine * (1 - floor) + floor)


def optimise(loss: torch.Tensor, optimizer: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> None:
    """One clipped step at the given rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    optimizer.step()


def require(stage: str, name: str, value: float, bar: float) -> None:
    """Print a measured accuracy and refuse to go on below its bar."""
    print(f"[{stage}] {name} {value:.4f} (must reach {bar})", flush=True)
    if value < bar:
        raise BuildError(f"{stage}: {name} is {value:.4f}, below {bar}; look at its progress lines, train longer")


def run_stages(build: object, work: Path, stages: Iterable[str]) -> None:
    """Run the methods of `build` named by `stages`; one whose `work`/STAGE.done is there is not run again."""
    for stage in stages:
        done = work / f"{stage}.done"
        if done.exists():
            print(f"[{stage}] done before ({done.read_text().strip()}); remove {done} to run it again", flush=True)
            continue
        start = time.perf_counter()
        run: Callable[[], None] = getattr(build, stage)
        run()
        minutes = f"{(time.perf_counter() - start) / 60:.1f} minutes"
        done.write_text(minutes + "\n")
        print(f"[{stage}] {minutes}", flush=True)
