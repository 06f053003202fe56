"""The one loss: clipped policy gradient, k3 KL to the reference and cross-entropy, over flat token tensors.

Each segment contributes the mean over its scored tokens times its credit's weights; the sum of all of them is
divided by one global denominator that is passed in. So the result does not depend on micro-batches or ranks,
and supervised training is the cross-entropy term alone (official GRPO loss; paper section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from rlpipe.learn.replay import Replay, ReplayOptions
from rlpipe.learn.stats import Stats
from rlpipe.types import TrainItem


@dataclass(frozen=True)
class TokenTerms:
    """What is known of each scored token before the model runs; all [S], in the order of the replay.

    behaviour: float32, the sampler's log-prob; NaN where nobody sampled the token, or where the replay scores it
               under another distribution (`scaled`, `conditional`, `full`): there the ratio is 1, as officially.
    reference: float32, the reference policy's log-prob; NaN where there is none.
    advantage, kl, ce: float32, the segment's weights divided by its number of scored tokens
               (`ce` of a text gives its first token the share `verdict_ce_share`).
    image:     bool, whether the token is an image token.
    """

    behaviour: torch.Tensor
    reference: torch.Tensor
    advantage: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor
    image: torch.Tensor

    def to(self, device: torch.device) -> TokenTerms:
        return TokenTerms(*(getattr(self, f.name).to(device) for f in fields(self)))


def token_terms(items: Sequence[TrainItem], replay: Replay, verdict_ce_share: float = 0.8) -> TokenTerms:
    """Spread the items' credits and stored log-probs over the scored tokens of their replay.

    Raises ValueError, naming the trajectory, where a KL weight meets a segment without reference log-probs.
    """
    size = len(replay)
    advantage, kl, ce = (np.zeros(size, np.float32) for _ in range(3))
    behaviour, reference = (np.full(size, np.nan, np.float32) for _ in range(2))
    image = np.zeros(size, bool)
    for index, position, tokens, offsets in replay.by_segment():
        item = items[index]
        segment, credit = item.trajectory.segments[position], item.credits[position]
        image[tokens] = segment.kind == "image"
        advantage[tokens] = credit.advantage / len(tokens)
        kl[tokens] = credit.kl / len(tokens)
        ce[tokens] = credit.ce * _ce_shares(len(tokens), segment.kind, verdict_ce_share)
        if segment.logprobs is not None:
            same = _sampled_as_scored(replay.options, item, segment.kind, offsets)
            behaviour[tokens] = np.where(same, segment.logprobs[offsets], np.nan)
        stored = item.ref_logprobs[position] if item.ref_logprobs else None
        if stored is not None:
            reference[tokens] = stored[offsets]
        elif credit.kl:
            raise ValueError(f"trajectory {item.trajectory.id}: segment {position} has a KL weight, no reference")
    arrays = (behaviour, reference, advantage, kl, ce, image)
    return TokenTerms(*map(torch.from_numpy, arrays))


def _sampled_as_scored(options: ReplayOptions, item: TrainItem, kind: str, offsets: np.ndarray) -> np.ndarray:
    """Which tokens of a segment the replay scores under the distribution that they were drawn from, bool [T]."""
    if kind == "image":
        exact = options.logits == "guided" or item.trajectory.sampling.guidance == 1.0
        return np.full(len(offsets), exact)
    return (offsets > 0) | (options.verdict == "restricted")


def _ce_shares(count: int, kind: str, verdict_share: float) -> np.ndarray | float:
    """Weights of a segment's tokens in its cross-entropy; they sum to 1."""
    if kind == "image" or count == 1:
        return 1.0 / count
    shares = np.full(count, (1.0 - verdict_share) / (count - 1), np.float32)
    shares[0] = verdict_share
    return shares


def policy_loss(
    logprobs: torch.Tensor,
    terms: TokenTerms,
    denominator: float,
    clip: float | None = 0.2,
    kl_beta: float = 0.04,
    fresh: bool | torch.Tensor = True,
) -> tuple[torch.Tensor, Stats]:
    """Loss of the scored tokens, a scalar, and its metrics.

    logprobs: float32 [S] with gradients, under the policy that is trained.
    clip:     how far the ratio may be from 1 before it stops mattering; None switches clipping off.
    fresh:    the weights are those that sampled, for all tokens or bool [S]; only then is the gap to `behaviour` one
              of implementations.

    Per token: -min(ratio * A, clip(ratio) * A) + kl_beta * k3 and -ce * logprob, with
    ratio = exp(logprob - behaviour) and k3 = exp(reference - logprob) - (reference - logprob) - 1.
    A token that nobody sampled (teacher-forced) has ratio 1 with the gradient of its log-prob (official).
    """
    detached = logprobs.detach()
    sampled = ~terms.behaviour.isnan()
    ratio = torch.exp(logprobs - torch.where(sampled, terms.behaviour, detached))
    surrogate = ratio * terms.advantage
    if clip is not None:
        surrogate = torch.minimum(surrogate, ratio.clamp(1 - clip, 1 + clip) * terms.advantage)
    difference = torch.where(terms.reference.isnan(), detached, terms.reference) - logprobs
    k3 = torch.exp(difference) - difference - 1.0
    policy = -surrogate.sum() / denominator
    kl = kl_beta * (terms.kl * k3).sum() / denominator
    ce = -(terms.ce * logprobs).sum() / denominator
    loss = policy + kl + ce
    stats = _stats(policy, kl, ce, ratio.detach(), k3.detach(), detached, terms, clip, fresh)
    return loss, stats


@torch.no_grad()
def _stats(
    policy: torch.Tensor,
    kl: torch.Tensor,
    ce: torch.Tensor,
    ratio: torch.Tensor,
    k3: torch.Tensor,
    logprobs: torch.Tensor,
    terms: TokenTerms,
    clip: float | None,
    fresh: bool | torch.Tensor,
) -> Stats:
    stats = Stats()
    stats.total("loss/total", policy + kl + ce)
    for name, value, weight in (
        ("policy", policy, terms.advantage),
        ("kl", kl, terms.kl),
        ("ce", ce, terms.ce),
    ):
        if weight.any():
            stats.total(f"loss/{name}", value)
    credited = terms.advantage != 0
    sampled = credited & ~terms.behaviour.isnan()
    if sampled.any():
        if clip is not None:
            outside = torch.where(terms.advantage > 0, ratio > 1 + clip, ratio < 1 - clip) & sampled
            stats.mean("loss/clip_fraction", outside.sum(), sampled.sum())
        stats.mean("loss/ratio_mean", ratio[sampled].sum(), sampled.sum())
        stats.maximum("loss/ratio_max", ratio[sampled].max())
    for name, of_kind in (("image", terms.image), ("text", ~terms.image)):
        _kind_stats(stats, name, of_kind, k3, logprobs, terms, fresh)
    return stats


def _kind_stats(
    stats: Stats,
    name: str,
    of_kind: torch.Tensor,
    k3: torch.Tensor,
    logprobs: torch.Tensor,
    terms: TokenTerms,
    fresh: bool | torch.Tensor,
) -> None:
    """KL, cross-entropy and the sampler-learner gap of one segment kind."""
    compared = of_kind & ~terms.reference.isnan()
    if compared.any():
        stats.mean(f"kl/{name}", k3[compared].sum(), compared.sum())
    supervised = of_kind & (terms.ce != 0)
    if supervised.any():
        stats.mean(f"loss/ce_{name}", -logprobs[supervised].sum(), supervised.sum())
    sampled = of_kind & ~terms.behaviour.isnan() & fresh
    if sampled.any():
        gap = (logprobs - terms.behaviour)[sampled].abs()
        for prefix in ("mismatch", f"mismatch/{name}"):
            stats.maximum(f"{prefix}/max_abs", gap.max())
            stats.mean(f"{prefix}/mean_abs", gap.sum(), gap.numel())
