"""Whether the native engine draws what the official algorithm draws, and what the learner says of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from engines import Engines, Rows

from rlpipe.learn.replay import segment_logprobs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Rollout, SegmentCredit, TrainItem

BOUNDS = {"float32": {"max": 1e-4}, "bfloat16": {"mean": 0.02}}
"""Of the distance between the sampler's log-probs and the learner's, by dtype."""


def agreement(engines: Engines, sampled: Rows, greedy: Rows, dtype: str) -> dict:
    """Tokens against the reference loop (float32 alone), log-probs against the learner's replay.

    `ok` is False where rows differ or a bound of `BOUNDS` is exceeded.
    """
    result: dict = {"rows": len(sampled[0])}
    ok = True
    if dtype == "float32":
        for name, rows in (("sampled", sampled), ("greedy", greedy)):
            ours, theirs = engines.run("native", rows), engines.run("reference_loop", rows)
            parted = [_parting(one, other) for one, other in zip(ours, theirs, strict=True)]
            result[name] = {
                "identical": parted.count(None),
                "differ": [place for place in parted if place is not None],
            }
            ok &= all(place is None for place in parted)
    distances = replay_distances(engines.policy, engines.run("native", sampled))
    result["replay"] = {
        "max": float(distances.max()),
        "mean": float(distances.mean()),
        "tokens": len(distances),
    }
    ok &= all(result["replay"][key] <= bound for key, bound in BOUNDS[dtype].items())
    return result | {"ok": bool(ok)}


def replay_distances(policy: JanusPolicy, rollouts: Sequence[Rollout]) -> np.ndarray:
    """|sampler - learner| of the log-prob of every token."""
    items = []
    for rollout in rollouts:
        segments = rollout.trajectory.segments
        looked_at = rollout.images[: sum(segment.kind == "text" for segment in segments)]
        items.append(TrainItem(rollout.trajectory, looked_at, (SegmentCredit(ce=1.0),) * len(segments)))
    distances = []
    for item, replayed in zip(items, segment_logprobs(policy, items, micro_batch=4), strict=True):
        for segment, logprobs in zip(item.trajectory.segments, replayed, strict=True):
            distances.append(np.abs(segment.logprobs - logprobs))
    return np.concatenate(distances)


def _parting(one: Rollout, other: Rollout) -> dict | None:
    """Where two rollouts part: row, segment, token; None if nowhere."""
    pairs = zip(one.trajectory.segments, other.trajectory.segments, strict=False)
    for number, (mine, reference) in enumerate(pairs):
        length = min(len(mine), len(reference))
        differ = np.flatnonzero(mine.token_ids[:length] != reference.token_ids[:length])
        if len(differ) or len(mine) != len(reference):
            token = int(differ[0]) if len(differ) else length
            return {"row": one.trajectory.id, "segment": number, "kind": mine.kind, "token": token}
    return None
