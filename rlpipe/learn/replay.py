"""Log-probs of the tokens of trajectories, each under the distribution that it was drawn from.

Learner and reference share it: `lay_out` says which sequences the language model sees, `token_logprobs` runs it on
all of them in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from rlpipe.learn.heads import score_group
from rlpipe.learn.layout import Distribution, Group, Replay, ReplayOptions, lay_out, num_tokens
from rlpipe.learn.packing import micro_batches
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import TrainItem

__all__ = [
    "Distribution",
    "Embedder",
    "Group",
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
    policy: JanusPolicy,
    replay: Replay,
    entropy: bool = False,
    context_policy: Embedder | None = None,
    head_chunk: int = 1024,
) -> TokenLogprobs:
    """Log-probs, entropies if asked, of the scored tokens under `policy`, with gradients unless they are switched off.

    One forward; heads run only on the hidden states that are read, `head_chunk` tokens at a time. In a replay whose
    context is constant, what stands before a scored segment is embedded by `context_policy` (None: by `policy`) and
    carries no gradient; the segment's own tokens are embedded by `policy`.
    """
    logprobs, entropies = policy(replay_logprobs, replay, entropy, context_policy, head_chunk)
    return TokenLogprobs(logprobs, replay.item, replay.segment, entropies)


def replay_logprobs(
    policy: JanusPolicy,
    replay: Replay,
    entropy: bool = False,
    context_policy: Embedder | None = None,
    head_chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `token_logprobs`, for a caller that is inside the policy's forward already."""
    device = policy.device
    if not replay.groups:
        return torch.zeros(0, device=device), None
    source, pool = replay.source.to(device), _pool(policy, replay)
    embeddings = F.embedding(source, pool)
    if replay.options.context == "constant":
        with torch.no_grad():
            constants = pool if context_policy is None else _pool(context_policy, replay).to(pool)
            constants = F.embedding(source, constants)
        embeddings = torch.where(replay.context.to(device)[:, None], constants, embeddings)
    elif context_policy is not None:
        raise ValueError("replay: a context_policy needs a replay of ReplayOptions(context='constant')")
    hidden = policy.hidden(embeddings[None], replay.positions.to(device)[None], replay.lengths)[0]
    mode = replay.options.logits
    scores = [score_group(policy, hidden, group, mode, entropy, head_chunk) for group in replay.groups]
    logprobs, entropies = zip(*scores, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if entropy else None


def _pool(policy: Embedder, replay: Replay) -> torch.Tensor:
    """All embeddings [A + B + C * N, D] that the row indexes into."""
    parts = [policy.embed_text(replay.text_ids.to(policy.device))]
    if len(replay.codes):
        parts.append(policy.embed_codes(replay.codes.to(policy.device)))
    if replay.images is not None:
        parts.append(policy.embed_pixels(replay.images.to(policy.device)).flatten(0, 1))
    return torch.cat([part.to(parts[0].dtype) for part in parts])


@torch.no_grad()
def segment_logprobs(
    policy: JanusPolicy,
    items: Sequence[TrainItem],
    options: ReplayOptions | None = None,
    micro_batch: int = 64,
    context_policy: Embedder | None = None,
    token_budget: int | None = None,
    head_chunk: int = 1024,
) -> list[tuple[np.ndarray | None, ...]]:
    """Per item and segment the float32 [T] log-probs under `policy`; what `TrainItem.ref_logprobs` takes.

    Segments with a trained credit are scored, the others are None; tokens left out by `train_eos` are NaN. One forward
    has `micro_batch` items, or with a `token_budget` as many as have so many tokens.
    """
    sizes = [num_tokens(item, policy.templates, options) for item in items]
    results: list[tuple[np.ndarray | None, ...]] = [()] * len(items)
    for indices in micro_batches(sizes, micro_batch, token_budget):
        chunk = [items[index] for index in indices]
        replay = lay_out(chunk, policy.templates, options)
        scored = token_logprobs(policy, replay, context_policy=context_policy, head_chunk=head_chunk)
        logprobs = scored.logprobs.cpu().numpy()
        arrays: list[list[np.ndarray | None]] = [[None] * len(item.credits) for item in chunk]
        for item, segment, tokens, offsets in replay.by_segment():
            values = np.full(len(chunk[item].trajectory.segments[segment]), np.nan, np.float32)
            values[offsets] = logprobs[tokens]
            arrays[item][segment] = values
        for index, row in zip(indices, arrays, strict=True):
            results[index] = tuple(row)
    return results
