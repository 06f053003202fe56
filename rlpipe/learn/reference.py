"""Log-probs of the policy that the KL term holds on to, where the learner has it itself: the base of its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from rlpipe.learn.layout import Replay, ReplayOptions
from rlpipe.learn.replay import replay_logprobs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import AdaptedEmbedder, scaled_adapters
from rlpipe.schema import Config
from rlpipe.types import TrainItem


def reference_options(config: Config) -> ReplayOptions:
    """How a reference lays out what it scores: what a segment looks back at is its own, or the policy's."""
    context = "constant" if config.reference.context == "policy" else "live"
    return replace(ReplayOptions.from_config(config.loss), context=context)


def lacks_reference(items: Sequence[TrainItem]) -> bool:
    """Whether any item has a KL weight and no reference log-probs."""
    return any(credit.kl and not item.ref_logprobs for item in items for credit in item.credits)


def base_logprobs(policy: JanusPolicy, replay: Replay, head_chunk: int) -> torch.Tensor:
    """float32 [S] log-probs under the base of the policy's adapters, of a replay of `reference_options`.

    A replay without a token sends a single one through, as other ranks do forwards meanwhile.
    """
    with scaled_adapters(policy, 0.0):
        if not len(replay):
            bos = torch.tensor([[policy.templates.bos]], device=policy.device)
            policy.hidden(policy.embed_text(bos), torch.zeros_like(bos))
        context = AdaptedEmbedder(policy) if replay.options.context == "constant" else None
        return replay_logprobs(policy, replay, context_policy=context, head_chunk=head_chunk)[0]


def with_reference(items: Sequence[TrainItem], replay: Replay, logprobs: torch.Tensor) -> list[TrainItem]:
    """The items with the log-probs [S] that a reference gives to the scored tokens of their replay.

    As `TrainItem.ref_logprobs` wants them: None for a segment that is not scored, NaN for a token that is not.
    """
    values = logprobs.float().cpu().numpy()
    arrays: list[list[np.ndarray | None]] = [[None] * len(item.trajectory.segments) for item in items]
    for item, segment, tokens, offsets in replay.by_segment():
        array = np.full(len(items[item].trajectory.segments[segment]), np.nan, np.float32)
        array[offsets] = values[tokens]
        arrays[item][segment] = array
    return [replace(item, ref_logprobs=tuple(found)) for item, found in zip(items, arrays, strict=True)]
