"""The policy that is trained against the one that sampled: importance ratios, and what is done with them.

`ratio` says what a ratio is taken over. One optimiser step is made on a batch, so the policy before the step is the
proximal policy of decoupled PPO (Hilton et al. 2021; AReaL): the ratio to it is 1 and only its gradient
is left, while w, the detached ratio to the sampler, corrects for samples that are stale. `correction` names the choice:

    clipped     min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A)     PPO; asymmetric: DAPO 3.1
    truncated   min(w, cap) A log pi                                     truncated importance sampling
    masked      w A log pi where 1/cap <= w <= cap, else 0
    none        A log pi: stale samples are taken as fresh
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

RATIOS = ("token", "segment", "sequence")


@dataclass(frozen=True)
class Bounds:
    """How far a ratio may go; fields as in the `loss` section, `high` and `low` around 1."""

    low: float | None = 0.2
    high: float | None = None
    cap: float = 2.0


def importance_ratio(logprobs: torch.Tensor, behaviour: torch.Tensor, unit: torch.Tensor | None = None) -> torch.Tensor:
    """Ratios [S] of the trained policy to the sampler, with gradients; 1 where nobody sampled (behaviour NaN).

    unit: int64 [S]; tokens of one unit have one ratio, the geometric mean of theirs (GSPO 4.1), and each the gradient
          of its own log-prob, so that their advantages may differ (GSPO-token, 4.3). None: each token its own.
    """
    detached = logprobs.detach()
    sampled = ~behaviour.isnan()
    gap = logprobs - torch.where(sampled, behaviour, detached)
    if unit is None or not len(unit):
        return torch.exp(gap)
    sums = torch.zeros(int(unit.max()) + 1, dtype=gap.dtype, device=gap.device)
    counts = torch.zeros_like(sums).index_add(0, unit, sampled.to(gap.dtype))
    means = sums.index_add(0, unit, gap.detach()) / counts.clamp_min(1.0)
    return torch.exp(torch.where(sampled, means[unit], 0.0) + logprobs - detached)


Corrected = tuple[torch.Tensor, torch.Tensor | None]
"""What is maximised, per token [S], and which tokens were held back, bool [S] (None: this form holds none back)."""


def clipped(logprobs: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, bounds: Bounds) -> Corrected:
    surrogate = ratio * advantage
    if bounds.low is None:
        return surrogate, None
    low, high = 1 - bounds.low, 1 + (bounds.low if bounds.high is None else bounds.high)
    outside = torch.where(advantage > 0, ratio > high, ratio < low)
    return torch.minimum(surrogate, ratio.clamp(low, high) * advantage), outside


def truncated(logprobs: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, bounds: Bounds) -> Corrected:
    weight = ratio.detach()
    return weight.clamp(max=bounds.cap) * _score(logprobs) * advantage, weight > bounds.cap


def masked(logprobs: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, bounds: Bounds) -> Corrected:
    weight = ratio.detach()
    outside = (weight > bounds.cap) | (weight < 1 / bounds.cap)
    return torch.where(outside, 0.0, weight) * _score(logprobs) * advantage, outside


def uncorrected(logprobs: torch.Tensor, ratio: torch.Tensor, advantage: torch.Tensor, bounds: Bounds) -> Corrected:
    return _score(logprobs) * advantage, None


def _score(logprobs: torch.Tensor) -> torch.Tensor:
    """1 with the gradient of the log-prob."""
    return torch.exp(logprobs - logprobs.detach())


CORRECTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bounds], Corrected]] = {
    "clipped": clipped,
    "truncated": truncated,
    "masked": masked,
    "none": uncorrected,
}
