"""Which tokens count how much: the share of each span in the loss, and the one denominator of all of them.

A span is a segment as a credit rule pays it: v1 pays an accepted first image twice, so that image is two spans. With N
trajectories, P_i spans in the i-th of them, T_ip trained tokens in the p-th span and l_ipt the loss of a token:

    segment    1/N sum_i 1/P_i sum_p 1/T_ip sum_t l_ipt           every span counts alike (v1 to v3, `segments`)
    sequence   1/N sum_i 1/(sum_p T_ip) sum_p sum_t l_ipt         each trajectory counts alike (GRPO, DeepSeekMath 4.1)
    token      1/(sum_i sum_p T_ip) sum_i sum_p sum_t l_ipt       every token of the batch counts alike (DAPO 3.3)
    constant   1/(N L) sum_i sum_p sum_t l_ipt                    L: tokens of the longest trajectory there can be; no
                                                                  length is favoured (Dr. GRPO, section 3)

A span whose score is missing has no loss and still counts in the denominators, as a trajectory does under every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlpipe.types import Trajectory


@dataclass(frozen=True)
class Part:
    """A reward's claim on one segment, a span: its advantage and its KL are added with weight times share.

    weight: of the reward, as configured. share: of the span in its trajectory, unless `credit.weighting` says.
    """

    segment: int
    reward: str
    weight: float
    share: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What a rule makes of scores, before trajectories are compared.

    terms:   the parts of a trajectory make so many shares of the loss.
    longest: images and reflections in the parts of the longest trajectory there can be.
    """

    rewards: dict[str, np.ndarray]
    parts: list[list[Part]]
    terms: int = 1
    longest: tuple[int, int] = (2, 1)

    @property
    def compared(self) -> list[str]:
        """Names of the rewards that are compared within a group."""
        return list(dict.fromkeys(part.reward for parts in self.parts for part in parts))


Counts = Sequence[Sequence[int]]
"""Trained tokens of each span, by trajectory."""


class Weighting(NamedTuple):
    """Weight of each span's token mean, by trajectory; what the sum of all of them is divided by."""

    shares: list[list[float]]
    denominator: float


def segment(counts: Counts, longest: int) -> Weighting:
    return Weighting([[1.0 / len(row)] * len(row) for row in counts], float(len(counts)))


def sequence(counts: Counts, longest: int) -> Weighting:
    return Weighting([[count / sum(row) for count in row] for row in counts], float(len(counts)))


def token(counts: Counts, longest: int) -> Weighting:
    return Weighting(_sums(counts), float(sum(map(sum, counts))))


def constant(counts: Counts, longest: int) -> Weighting:
    return Weighting(_sums(counts), float(len(counts) * longest))


def _sums(counts: Counts) -> list[list[float]]:
    """Weights that turn token means into token sums."""
    return [[float(count) for count in row] for row in counts]


WEIGHTINGS: dict[str, Callable[[Counts, int], Weighting]] = {
    "segment": segment,
    "sequence": sequence,
    "token": token,
    "constant": constant,
}


def weigh(
    plan: Plan, trajectories: Sequence[Trajectory], weighting: str, train_eos: bool
) -> tuple[list[list[float]], float]:
    """Weight of each part's token mean, and the denominator of the sum of all of them."""
    if weighting == "rule":
        weights = [[part.weight * part.share for part in parts] for parts in plan.parts]
        return weights, float(plan.terms * len(trajectories))
    trained = [num_trained(trajectory, train_eos) for trajectory in trajectories]
    counts = [[row[part.segment] for part in parts] for row, parts in zip(trained, plan.parts, strict=True)]
    images, texts = plan.longest
    longest = max(images * len(t.segments[0]) + texts * t.sampling.max_reflection_tokens for t in trajectories)
    shares, denominator = WEIGHTINGS[weighting](counts, longest)
    pairs = [zip(parts, row, strict=True) for parts, row in zip(plan.parts, shares, strict=True)]
    return [[part.weight * share for part, share in row] for row in pairs], denominator


def rounds(trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """Images and reflections of the longest trajectory there can be; its last image is not looked at."""
    images = max((trajectory.sampling.max_images for trajectory in trajectories), default=1)
    return images, max(images - 1, 1)


def num_trained(trajectory: Trajectory, train_eos: bool) -> list[int]:
    """Tokens in the loss by segment; a reflection that was not cut off ends with an end-of-sentence token."""
    counts = [len(segment) for segment in trajectory.segments]
    if not train_eos:
        for text, cut in zip(trajectory.texts, trajectory.truncated, strict=True):
            counts[text] -= not cut
    return counts
