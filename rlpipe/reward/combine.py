"""From the scores of several scorers to what one image of a trajectory is worth."""

from __future__ import annotations

from collections.abc import Sequence

from rlpipe.config import ScorerSection
from rlpipe.types import ImageScore, Score

NO_REQUEST = ""
"""Id of a missing score that stands for requests that never reached a scorer."""


def looks_at(section: ScorerSection, first: bool, final: bool) -> bool:
    """Whether a scorer is asked about an image that is its trajectory's first, final, both or neither."""
    places = {"every_image", *(["first_image"] if first else []), *(["final_image"] if final else [])}
    return not places.isdisjoint(section.sees)


def combine(sections: Sequence[ScorerSection], scores: Sequence[Score | None], final: bool = False) -> ImageScore:
    """One image's rewards from one score per section, in order; None where a scorer does not look at it.

    final: the trajectory ends with this image.

    The reward is the weighted sum over the scorers of `rewards: generation` that look at such an image (0 if none
    does), `match` the weighted mean over those of `rewards: comprehension`. Either is missing as soon as one score of
    a weight other than 0 is: a sum over the rest would be on another scale than those of its group. `parts` keeps
    every value there is, under the section's name, and a scorer's own parts under name/part.

        combine(config.reward, [Score("0-1/0", 0.9)], final=True)      # value 0.9, final 0.9, match 0.9
    """
    if len(scores) != len(sections):
        raise ValueError(f"combine: {len(scores)} scores of {len(sections)} scorers")
    asked = [(section, score) for section, score in zip(sections, scores, strict=True) if score is not None]
    ids = {score.id for _, score in asked} - {NO_REQUEST} or {NO_REQUEST}
    if len(ids) != 1:
        raise ValueError(f"combine: scores of several images: {sorted(ids)}")
    parts: dict[str, float] = {}
    for section, score in asked:
        parts |= {f"{section.name}/{key}": value for key, value in score.parts.items()}
        if not score.missing:
            parts[section.name] = score.value
    weighted = [(section, score) for section, score in asked if section.weight != 0]
    generation = [pair for pair in weighted if "generation" in pair[0].rewards]
    anywhere = [pair for pair in generation if looks_at(pair[0], first=True, final=False)]
    at_the_end = [pair for pair in generation if looks_at(pair[0], first=False, final=True)]
    comprehension = [pair for pair in weighted if "comprehension" in pair[0].rewards]
    total, weight = _sum(comprehension), sum(section.weight for section, _ in comprehension)
    return ImageScore(
        id=ids.pop(),
        value=_sum(anywhere),
        parts=parts,
        error="; ".join(f"{section.name}: {score.error}" for section, score in weighted if score.missing) or None,
        final=_sum(at_the_end) if final else None,
        match=total / weight if total is not None and weight else None,
    )


def usable(sections: Sequence[ScorerSection], scores: Sequence[ImageScore]) -> bool:
    """Whether a trajectory with these scores of its images can be compared with others: one has all that counts."""
    counting = {section.name for section in sections if section.weight != 0}
    return any(score.error is None and not counting.isdisjoint(score.parts) for score in scores)


def _sum(pairs: Sequence[tuple[ScorerSection, Score]]) -> float | None:
    """The weighted sum; None if a score of it is missing."""
    if any(score.missing for _, score in pairs):
        return None
    return float(sum(section.weight * score.value for section, score in pairs))
