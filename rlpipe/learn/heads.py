"""From hidden states to log-probs and entropies, in float32, a chunk of tokens at a time.

Logits are the largest tensors of a step: 2,000 tokens over a vocabulary of 102,400 are 0.8 GB, and the backward pass
wants several of that size. Here no more than a chunk's exist at once, in either pass: the backward pass makes each
chunk's logits again.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from rlpipe.learn.layout import Distribution, Group
from rlpipe.policy.guidance import GuidanceLogits, guide
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.sampling import truncate

Scores = tuple[torch.Tensor, torch.Tensor | None]
"""float32 [M] log-probs, and float32 [M] entropies if they were asked for, both with gradients."""


def score_group(
    policy: JanusPolicy,
    hidden: torch.Tensor,
    group: Group,
    mode: GuidanceLogits,
    entropy: bool = False,
    chunk: int = 1024,
) -> Scores:
    """Log-probs of a group's tokens under the distribution that they were drawn from, and its entropy in nats.

    hidden: [T, D] of the row that the group points into.
    chunk:  tokens whose logits exist at once; of a guided pair both rows' do.
    """
    device = hidden.device
    # One gather for all chunks, so that the backward pass scatters into a tensor of the row's size once.
    parts = [hidden[group.at.to(device)].split(chunk), group.target.to(device).split(chunk)]
    if group.unconditional is not None:
        parts.append(hidden[group.unconditional.to(device)].split(chunk))
    whole = len(parts[0]) == 1 or not torch.is_grad_enabled()
    scores = []
    for arguments in zip(*parts, strict=True):
        fixed = (policy, group.distribution, mode, entropy)
        if whole:
            scores.append(_score(*fixed, *arguments))
        else:
            # The state of the random numbers too: a head may hold an adapter with dropout.
            scores.append(checkpoint(_score, *fixed, *arguments, use_reentrant=False, preserve_rng_state=True))
    logprobs, entropies = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _score(
    policy: JanusPolicy,
    drawn: Distribution,
    mode: GuidanceLogits,
    entropy: bool,
    hidden: torch.Tensor,
    target: torch.Tensor,
    unconditional: torch.Tensor | None = None,
) -> Scores:
    """Of hidden states [M, D] and tokens [M]."""
    logits = token_logits(policy, drawn, mode, hidden, unconditional)
    if drawn.top_k > 0 or drawn.top_p < 1.0:
        # A sampled token stays allowed, even where rounding or an update has moved the border of the set.
        own = target[:, None]
        logits = truncate(logits, drawn.top_k, drawn.top_p).scatter(-1, own, logits.gather(-1, own))
    every = logits.log_softmax(-1)
    logprobs = every.gather(-1, target[:, None])[:, 0]
    if not entropy:
        return logprobs, None
    # A token that cannot be drawn has probability 0; its log-prob of -inf must not make a NaN of that.
    return logprobs, -(every.exp() * every.clamp(min=torch.finfo(every.dtype).min)).sum(-1)


def token_logits(
    policy: JanusPolicy,
    drawn: Distribution,
    mode: GuidanceLogits,
    hidden: torch.Tensor,
    unconditional: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [M, V] logits of hidden states [M, D], guided, over the temperature, not yet truncated."""
    if drawn.head == "image":
        twin = None if unconditional is None else policy.image_logits(unconditional)
        logits = guide(policy.image_logits(hidden), twin, drawn.guidance, mode)
    else:
        logits = policy.text_logits(hidden).float()
        if drawn.head == "verdict":
            logits = logits[:, [policy.templates.no, policy.templates.yes]]
    return logits if drawn.temperature == 1.0 else logits / drawn.temperature
