"""What to do when the reward curve declines: the paper's procedure by hand, made a rule.

    fell sharply                                          -> the learning rate is multiplied by lr_factor
    declines slowly, the reference is young               -> the KL weight is multiplied by kl_factor
    declines slowly, the reference is reference_age old   -> the present policy becomes the reference

The curve is the mean over the last `window` steps. It fell sharply if it is lower, by a share sharp_fall, than the mean
over the window before; it declines slowly if for `patience` steps in a row it is lower by slow_fall than it was at its
best. A reaction starts the curve anew after `cooldown` steps: what was before is no longer compared with.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from rlpipe.schema import DeclineSection

Kind = Literal["lower_lr", "lower_kl", "renew_reference"]
KINDS: tuple[Kind, ...] = ("lower_lr", "lower_kl", "renew_reference")


@dataclass(frozen=True)
class Reaction:
    """What is done after a step, and the numbers that led to it in one line."""

    kind: Kind
    line: str


class Decline:
    """Follows the curve and holds what came of it.

    decline = Decline(section)
    reaction = decline.observe(step, reward)    # None, or a Reaction that lr_scale and kl_scale reflect already
    decline.lr_scale, decline.kl_scale          # for the next steps
    decline.reference_step                      # step whose weights are the reference; 0: none was renewed
    """

    def __init__(self, section: DeclineSection) -> None:
        self.section = section
        self.lr_scale, self.kl_scale, self.reference_step = 1.0, 1.0, 0
        self._rewards: deque[float] = deque(maxlen=2 * section.window)
        self._best, self._below, self._pause = -math.inf, 0, 0
        self._falls = {"sharp": 0.0, "slow": 0.0}
        self._last: Kind | None = None

    def observe(self, step: int, reward: float) -> Reaction | None:
        """Take the mean trajectory reward of step number `step` (1 is the first); a step without one does not count."""
        self._last, self._falls = None, {"sharp": 0.0, "slow": 0.0}
        if self.section.action == "none" or math.isnan(reward):
            return None
        if self._pause:
            self._pause -= 1
            return None
        self._rewards.append(reward)
        kind = self._judge(step)
        if kind is None:
            return None
        return self._react(kind, step)

    def _judge(self, step: int) -> Kind | None:
        """What the curve asks for, now that it has a new point."""
        section, rewards = self.section, list(self._rewards)
        if len(rewards) < section.window:
            return None
        now = _mean(rewards[-section.window :])
        self._best = max(self._best, now)
        self._falls["slow"] = _fall(self._best, now)
        if len(rewards) == 2 * section.window:
            self._falls["sharp"] = _fall(_mean(rewards[: section.window]), now)
        if self._falls["sharp"] > section.sharp_fall:
            return "lower_lr"
        self._below = self._below + 1 if self._falls["slow"] > section.slow_fall else 0
        if self._below < section.patience:
            return None
        return "lower_kl" if step - self.reference_step < section.reference_age else "renew_reference"

    def _react(self, kind: Kind, step: int) -> Reaction:
        section, age = self.section, step - self.reference_step
        fell = f"fell by {self._falls['sharp']:.1%} within a window of {section.window} steps (sharp: over "
        fell += f"{section.sharp_fall:.1%})"
        declined = f"is {self._falls['slow']:.1%} below its best for {self._below} steps (slow: over "
        declined += f"{section.slow_fall:.1%} for {section.patience})"
        if kind == "lower_lr":
            self.lr_scale *= section.lr_factor
            why, what = fell, f"learning rate x {section.lr_factor:g}, {self.lr_scale:g} of its schedule"
        elif kind == "lower_kl":
            self.kl_scale *= section.kl_factor
            why = f"{declined}, the reference is {age} steps old (young: under {section.reference_age})"
            what = f"KL weight x {section.kl_factor:g}, {self.kl_scale:g} of loss.kl_beta"
        else:
            self.reference_step = step
            why = f"{declined}, the reference is {age} steps old (old: from {section.reference_age})"
            what = "the present policy becomes the reference"
        self._rewards.clear()
        self._best, self._below, self._pause = -math.inf, 0, section.cooldown
        self._last = kind
        return Reaction(kind, f"decline: after step {step} the reward {why}: {what}")

    def metrics(self) -> dict[str, float]:
        """decline/*: how far the curve is below, what holds now, and which reactions the last step led to."""
        if self.section.action == "none":
            return {}
        return {
            **{f"decline/{name}_fall": value for name, value in self._falls.items()},
            "decline/lr_scale": self.lr_scale,
            "decline/kl_scale": self.kl_scale,
            "decline/reference_step": float(self.reference_step),
            **{f"decline/{kind}": float(kind == self._last) for kind in KINDS},
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values."""
        return {
            "lr_scale": self.lr_scale,
            "kl_scale": self.kl_scale,
            "reference_step": self.reference_step,
            "rewards": list(self._rewards),
            "best": None if math.isinf(self._best) else self._best,
            "below": self._below,
            "pause": self._pause,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr_scale, self.kl_scale = state["lr_scale"], state["kl_scale"]
        self.reference_step = state["reference_step"]
        self._rewards.clear()
        self._rewards.extend(state["rewards"])
        self._best = -math.inf if state["best"] is None else state["best"]
        self._below, self._pause = state["below"], state["pause"]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _fall(before: float, now: float) -> float:
    """How far `now` lies below `before`, as a share of its size; 0 where it does not."""
    return max(0.0, before - now) / max(abs(before), 1e-9)
