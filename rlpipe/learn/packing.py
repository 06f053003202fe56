"""Which trajectories go together: over ranks and over micro-batches, by the tokens that the language model sees."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from rlpipe.learn.layout import ReplayOptions
from rlpipe.types import TrainItem


def balance(sizes: Sequence[int], parts: int, most: int | None = None) -> list[list[int]]:
    """Indices into `sizes` in `parts` parts whose sums are nearly equal; the same answer everywhere.

    The largest goes first, each to the part with the least so far (Graham's LPT rule: no sum is above 4/3 of the best
    possible one). most: of indices in a part. Each part is in ascending order.
    """
    if most is not None and parts * most < len(sizes):
        raise ValueError(f"balance: {len(sizes)} sizes do not fit into {parts} parts of at most {most}")
    members: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, part = heapq.heappop(heap)
        members[part].append(index)
        if len(members[part]) != most:
            heapq.heappush(heap, (total + sizes[index], part))
    return [sorted(indices) for indices in members]


def micro_batches(
    sizes: Sequence[int], micro_batch: int, token_budget: int | None = None, least: int = 0
) -> list[list[int]]:
    """Indices into `sizes`, tokens per trajectory, of what goes through the model together: as few parts as will do.

    A part has at most `micro_batch` trajectories, or with a `token_budget` at most so many tokens instead; a trajectory
    that is longer goes alone. least: so many parts at least, some of them empty if need be (as many as another rank
    has).
    """
    if not token_budget:
        return balance(sizes, max(-(-len(sizes) // micro_batch), least), micro_batch)
    # Trajectories without anything to train have no tokens, but belong to a part all the same.
    parts = max(-(-sum(min(size, token_budget) for size in sizes) // token_budget), least, min(len(sizes), 1))
    while True:
        members = balance(sizes, parts)
        if all(len(m) <= 1 or sum(sizes[i] for i in m) <= token_budget for m in members):
            return members
        parts += 1


def rough_tokens(item: TrainItem, options: ReplayOptions) -> int:
    """About what `layout.num_tokens` is, of an item that may lack its tokens and pixels (the driver's outlines).

    The strings around prompt, images and reflections are left out, and four letters of a prompt are a token.
    """
    trajectory, sampling = item.trajectory, item.trajectory.sampling
    lengths = [len(segment) for segment in trajectory.segments]
    trained = [number for number, credit in enumerate(item.credits) if credit.trained]
    images, texts = ([n // 2 for n in trained if n % 2 == kind] for kind in (0, 1))
    prompt = len(trajectory.prompt.text) // 4
    whole, live = sampling.history == "all", options.context == "live"
    if live and sampling.redraw_context == "sampled":  # A later image's sequence has what an earlier one needs.
        images = images[-1:] if whole else images[images[:2] == [0, 1] :]
    texts = texts[-1:] if live and whole else texts
    source = 0 if trajectory.source_codes is None else len(trajectory.source_codes)
    drawn = [prompt + source + sum(lengths[0 if whole else max(2 * n - 2, 0) : 2 * n + 1]) for n in images]
    seen = [prompt + sum(lengths[0 if whole else 2 * n : 2 * n + 2]) for n in texts]
    paired = sampling.guidance != 1.0 and options.logits != "conditional"
    return sum(drawn) * (1 + paired) + sum(seen)
