"""Estimates of KL(policy || reference) from one sampled token (Schulman, "Approximating KL divergence").

Each takes difference = reference - logprob, float32 [S] with gradients. With d = logprob - reference:

    k1   d                      the gradient of d itself has mean 0 and holds nothing back; so k1 has, as a KL that is
                                subtracted from the reward has, the gradient d * grad log pi
    k2   d^2 / 2                that gradient too: unbiased for the KL of the policy to the reference
    k3   exp(-d) + d - 1        never negative, little variance (official); its gradient: KL(reference || policy)'s
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def k1(difference: torch.Tensor) -> torch.Tensor:
    known = -difference.detach()
    return known * (1.0 - difference - known)


def k2(difference: torch.Tensor) -> torch.Tensor:
    return 0.5 * difference.square()


def k3(difference: torch.Tensor) -> torch.Tensor:
    return torch.exp(difference) - difference - 1.0


KL_ESTIMATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
