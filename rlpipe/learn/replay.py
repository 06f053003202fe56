"""Log-probs of the tokens of trajectories, each under the distribution that it was drawn from.

Learner and reference share it: `lay_out` says which rows the language model sees, `token_logprobs` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from rlpipe.learn.layout import Distribution, Group, Pass, Replay, ReplayOptions, lay_out
from rlpipe.policy.guidance import guide
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.sampling import truncate
from rlpipe.types import TrainItem

__all__ = [
    "Distribution",
    "Embedder",
    "Group",
    "Pass",
    "Replay",
    "ReplayOptions",
    "TokenLogprobs",
    "lay_out",
    "replay_logprobs",
    "segment_logprobs",
    "token_logprobs",
]


class Embedder(Protocol):
    """What makes embeddings [.., D] of vocabulary ids, codes and pixels; a `JanusPolicy` does."""

    device: torch.device

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor: ...

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor: ...

    def embed_pixels(self, images: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class TokenLogprobs:
    """float32 [S] log-probs in the order of the replay, the item and segment of each; entropy if asked."""

    logprobs: torch.Tensor
    item: torch.Tensor
    segment: torch.Tensor
    entropy: torch.Tensor | None = None


def token_logprobs(
    policy: JanusPolicy, replay: Replay, entropy: bool = False, context_policy: Embedder | None = None
) -> TokenLogprobs:
    """Log-probs, entropies if asked, of the scored tokens under `policy`, with gradients unless they are switched off.

    One forward per pass of the replay; heads run only on the hidden states that are read. In a replay whose context
    is constant, what stands before a scored segment is embedded by `context_policy` (None: by `policy`) and carries
    no gradient; the segment's own tokens are embedded by `policy`.
    """
    logprobs, entropies = policy(replay_logprobs, replay, entropy, context_policy)
    return TokenLogprobs(logprobs, replay.item, replay.segment, entropies)


def replay_logprobs(
    policy: JanusPolicy, replay: Replay, entropy: bool = False, context_policy: Embedder | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `token_logprobs`, for a caller that is inside the policy's forward already."""
    device = policy.device
    if not replay.groups:
        return torch.zeros(0, device=device), None
    pool = _pool(policy, replay)
    constants = None
    if replay.options.context == "constant":
        with torch.no_grad():
            constants = pool.detach() if context_policy is None else _pool(context_policy, replay).to(pool)
    elif context_policy is not None:
        raise ValueError("replay: a context_policy needs a replay of ReplayOptions(context='constant')")
    read = []
    for rows in replay.passes:
        source = rows.source.to(device)
        embeddings = pool[source]
        if constants is not None:
            held = torch.arange(source.shape[1], device=device) < rows.context.to(device)[:, None]
            embeddings = torch.where(held[..., None], constants[source], embeddings)
        hidden = policy.hidden(embeddings, rows.positions.to(device))
        read.append(hidden.flatten(0, 1)[rows.read.to(device)])
    hidden = torch.cat(read)
    logprobs, entropies = [], []
    for group in replay.groups:
        logits = _logits(policy, hidden, group, replay.options)
        logprobs.append(-F.cross_entropy(logits, group.target.to(device), reduction="none"))
        if entropy:
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _pool(policy: Embedder, replay: Replay) -> torch.Tensor:
    """All embeddings [A + B + C * N, D] that the rows index into."""
    parts = [policy.embed_text(replay.text_ids.to(policy.device))]
    if len(replay.codes):
        parts.append(policy.embed_codes(replay.codes.to(policy.device)))
    if replay.images is not None:
        parts.append(policy.embed_pixels(replay.images.to(policy.device)).flatten(0, 1))
    return torch.cat([part.to(parts[0].dtype) for part in parts])


def _logits(policy: JanusPolicy, hidden: torch.Tensor, group: Group, options: ReplayOptions) -> torch.Tensor:
    """float32 [M, V] logits of the distribution that the group's tokens were drawn from."""
    drawn = group.distribution
    if drawn.head == "image":
        logits = policy.image_logits(hidden[group.at.to(hidden.device)])
        twin = None
        if group.unconditional is not None:
            twin = policy.image_logits(hidden[group.unconditional.to(hidden.device)])
        logits = guide(logits, twin, drawn.guidance, options.logits)
    else:
        logits = policy.text_logits(hidden[group.at.to(hidden.device)]).float()
        if drawn.head == "verdict":
            logits = logits[:, [policy.templates.no, policy.templates.yes]]
    if drawn.temperature != 1.0:
        logits = logits / drawn.temperature
    if drawn.top_k > 0 or drawn.top_p < 1.0:
        target = group.target.to(hidden.device)[:, None]
        # A sampled token stays allowed, even where rounding or an update has moved the border of the set.
        logits = truncate(logits, drawn.top_k, drawn.top_p).scatter(-1, target, logits.gather(-1, target))
    return logits


@torch.no_grad()
def segment_logprobs(
    policy: JanusPolicy,
    items: Sequence[TrainItem],
    options: ReplayOptions | None = None,
    micro_batch: int = 64,
    context_policy: Embedder | None = None,
) -> list[tuple[np.ndarray | None, ...]]:
    """Per item and segment the float32 [T] log-probs under `policy`; what `TrainItem.ref_logprobs` takes.

    Segments with a trained credit are scored, the others are None; tokens left out by `train_eos` are NaN.
    """
    results: list[tuple[np.ndarray | None, ...]] = []
    for start in range(0, len(items), micro_batch):
        chunk = items[start : start + micro_batch]
        replay = lay_out(chunk, policy.templates, options)
        logprobs = token_logprobs(policy, replay, context_policy=context_policy).logprobs.cpu().numpy()
        arrays: list[list[np.ndarray | None]] = [[None] * len(item.credits) for item in chunk]
        for item, segment, tokens, offsets in replay.by_segment():
            values = np.full(len(chunk[item].trajectory.segments[segment]), np.nan, np.float32)
            values[offsets] = logprobs[tokens]
            arrays[item][segment] = values
        results.extend(map(tuple, arrays))
    return results
