"""The one loss: policy gradient, KL to the reference, entropy and cross-entropy, over flat token tensors.

Each segment contributes the mean over its scored tokens times its credit's weights; the sum of all of them is
divided by one global denominator that is passed in. So the result does not depend on micro-batches or ranks,
and supervised training is the cross-entropy term alone (official GRPO loss; paper section 3.3). The variants are
named in `ratio.py`, `kl.py` and `weighting.py`; a `Variant` chooses among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from rlpipe.learn.kl import KL_ESTIMATES
from rlpipe.learn.ratio import CORRECTIONS, RATIOS, Bounds, importance_ratio
from rlpipe.learn.replay import Replay, ReplayOptions
from rlpipe.learn.stats import Stats
from rlpipe.schema import LossSection
from rlpipe.types import TrainItem


@dataclass(frozen=True)
class Variant:
    """Which form of the loss; fields as in the `loss` section of the configuration."""

    clip_high: float | None = None
    ratio: str = "token"
    correction: str = "clipped"
    correction_cap: float = 2.0
    kl: str = "k3"

    def __post_init__(self) -> None:
        for name, known in (("ratio", RATIOS), ("correction", CORRECTIONS), ("kl", KL_ESTIMATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"loss.{name}: {getattr(self, name)!r} is none of {', '.join(known)}")

    @classmethod
    def from_config(cls, section: LossSection) -> Variant:
        return cls(*(getattr(section, f.name) for f in fields(cls)))


OFFICIAL = Variant()


@dataclass(frozen=True)
class TokenTerms:
    """What is known of each scored token before the model runs; all [S], in the order of the replay.

    behaviour: float32, the sampler's log-prob; NaN where nobody sampled the token, or where the replay scores it
               under another distribution (`scaled`, `conditional`, `full`): there the ratio is 1, as officially.
    reference: float32, the reference policy's log-prob; NaN where there is none.
    advantage, kl, ce, entropy: float32, the segment's weights divided by its number of scored tokens
               (`ce` of a text gives its first token the share `verdict_ce_share`).
    image:     bool, whether the token is an image token.
    segment, sequence: int64, numbers of its segment and its trajectory, from 0 on within these tokens.
    """

    behaviour: torch.Tensor
    reference: torch.Tensor
    advantage: torch.Tensor
    kl: torch.Tensor
    ce: torch.Tensor
    entropy: torch.Tensor
    image: torch.Tensor
    segment: torch.Tensor
    sequence: torch.Tensor

    def to(self, device: torch.device) -> TokenTerms:
        return TokenTerms(*(getattr(self, f.name).to(device) for f in fields(self)))


def token_terms(items: Sequence[TrainItem], replay: Replay, verdict_ce_share: float = 0.8) -> TokenTerms:
    """Spread the items' credits and stored log-probs over the scored tokens of their replay.

    Raises ValueError, naming the trajectory, where a KL weight meets a segment without reference log-probs.
    """
    size = len(replay)
    advantage, kl, ce, entropy = (np.zeros(size, np.float32) for _ in range(4))
    behaviour, reference = (np.full(size, np.nan, np.float32) for _ in range(2))
    image, number = np.zeros(size, bool), np.zeros(size, np.int64)
    for count, (index, position, tokens, offsets) in enumerate(replay.by_segment()):
        item = items[index]
        segment, credit = item.trajectory.segments[position], item.credits[position]
        image[tokens], number[tokens] = segment.kind == "image", count
        advantage[tokens] = credit.advantage / len(tokens)
        kl[tokens] = credit.kl / len(tokens)
        entropy[tokens] = credit.entropy / len(tokens)
        ce[tokens] = credit.ce * _ce_shares(len(tokens), segment.kind, verdict_ce_share)
        if segment.logprobs is not None:
            same = _sampled_as_scored(replay.options, item, segment.kind, offsets)
            behaviour[tokens] = np.where(same, segment.logprobs[offsets], np.nan)
        stored = item.ref_logprobs[position] if item.ref_logprobs else None
        if stored is not None:
            reference[tokens] = stored[offsets]
        elif credit.kl:
            raise ValueError(f"trajectory {item.trajectory.id}: segment {position} has a KL weight, no reference")
    arrays = (behaviour, reference, advantage, kl, ce, entropy, image, number)
    return TokenTerms(*map(torch.from_numpy, arrays), replay.item)


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
    variant: Variant = OFFICIAL,
    entropies: torch.Tensor | None = None,
    entropy_weights: tuple[float, float] = (0.0, 0.0),
) -> tuple[torch.Tensor, Stats]:
    """Loss of the scored tokens, a scalar, and its metrics.

    logprobs: float32 [S] with gradients, under the policy that is trained.
    clip:     how far the ratio may be from 1 before it stops mattering; None switches clipping off.
    fresh:    the weights are those that sampled, for all tokens or bool [S]; only then is the gap to `behaviour` one
              of implementations.
    entropies: float32 [S] with gradients, of the distributions that the tokens are scored under, in nats; None: the
              loss has no such term. Its weights are of image and text; a negative one rewards entropy.

    Per token, officially: -min(ratio * A, clip(ratio) * A) + kl_beta * k3 and -ce * logprob, with
    ratio = exp(logprob - behaviour) and k3 = exp(reference - logprob) - (reference - logprob) - 1.
    A token that nobody sampled (teacher-forced) has ratio 1 with the gradient of its log-prob (official).
    """
    units = {"token": None, "segment": terms.segment, "sequence": terms.sequence}
    ratio = importance_ratio(logprobs, terms.behaviour, units[variant.ratio])
    bounds = Bounds(clip, variant.clip_high, variant.correction_cap)
    surrogate, held_back = CORRECTIONS[variant.correction](logprobs, ratio, terms.advantage, bounds)
    compared = torch.where(terms.reference.isnan(), logprobs.detach(), terms.reference)
    divergence = KL_ESTIMATES[variant.kl](compared - logprobs)
    parts = {
        "policy": -surrogate.sum() / denominator,
        "kl": kl_beta * (terms.kl * divergence).sum() / denominator,
        "ce": -(terms.ce * logprobs).sum() / denominator,
    }
    if entropies is not None:
        weights = torch.where(terms.image, *entropy_weights) * terms.entropy
        parts["entropy"] = (weights * entropies).sum() / denominator
    stats = _stats(parts, ratio.detach(), held_back, terms)
    for name, of_kind in (("image", terms.image), ("text", ~terms.image)):
        _kind_stats(stats, name, of_kind, divergence.detach(), logprobs.detach(), terms, fresh)
        weighted = of_kind & (terms.entropy != 0)
        if entropies is not None and weighted.any():
            stats.mean(f"entropy/{name}", entropies.detach()[weighted].sum(), weighted.sum())
    return sum(parts.values()), stats


@torch.no_grad()
def _stats(
    parts: Mapping[str, torch.Tensor], ratio: torch.Tensor, held_back: torch.Tensor | None, terms: TokenTerms
) -> Stats:
    """The terms of the loss that are in use, and the ratio to the sampler."""
    stats = Stats()
    stats.total("loss/total", sum(parts.values()))
    weights = {"policy": terms.advantage, "kl": terms.kl, "ce": terms.ce, "entropy": terms.entropy}
    for name, value in parts.items():
        if weights[name].any():
            stats.total(f"loss/{name}", value)
    sampled = (terms.advantage != 0) & ~terms.behaviour.isnan()
    if sampled.any():
        if held_back is not None:
            stats.mean("loss/clip_fraction", (held_back & sampled).sum(), sampled.sum())
        stats.mean("loss/ratio_mean", ratio[sampled].sum(), sampled.sum())
        stats.maximum("loss/ratio_max", ratio[sampled].max())
    return stats


def _kind_stats(
    stats: Stats,
    name: str,
    of_kind: torch.Tensor,
    divergence: torch.Tensor,
    logprobs: torch.Tensor,
    terms: TokenTerms,
    fresh: bool | torch.Tensor,
) -> None:
    """KL, cross-entropy and the sampler-learner gap of one segment kind."""
    compared = of_kind & ~terms.reference.isnan()
    if compared.any():
        stats.mean(f"kl/{name}", divergence[compared].sum(), compared.sum())
    supervised = of_kind & (terms.ce != 0)
    if supervised.any():
        stats.mean(f"loss/ce_{name}", -logprobs[supervised].sum(), supervised.sum())
    sampled = of_kind & ~terms.behaviour.isnan() & fresh
    if sampled.any():
        gap = (logprobs - terms.behaviour)[sampled].abs()
        for prefix in ("mismatch", f"mismatch/{name}"):
            stats.maximum(f"{prefix}/max_abs", gap.max())
            stats.mean(f"{prefix}/mean_abs", gap.sum(), gap.numel())
