"""From a policy and the exact checker to the records of the table; runs wherever a decoder is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from rlpipe.evaluate.table import Outcome
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only, introspect
from rlpipe.types import Prompt, Rollout, Sampling, Score, ScoreRequest


class Checked(Protocol):
    """What a checker says of one image (`rlpipe.world.checker.Verdict` is one)."""

    @property
    def correct(self) -> bool: ...

    @property
    def reason(self) -> str: ...


Check = Callable[[Mapping[str, Any], np.ndarray], Checked]
"""`check(metadata, image)` with a uint8 [H, W, 3] image."""
Judge = Callable[[Sequence[ScoreRequest]], Sequence[Score]]
Progress = Callable[[int, int], None]


def row_seed(seed: int, prompt_id: str, use: str = "draw") -> int:
    """The seed of one prompt's draw: the same for every policy, batch and share of the prompts."""
    return zlib.crc32(f"{seed}:{use}:{prompt_id}".encode())


def evaluate_policy(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    check: Check,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 200,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """One outcome per prompt, in order, by `check`.

    Every prompt is drawn, looked at, and drawn again after "No"; the control draws those prompts once more
    from another seed. `sampling` gives guidance, temperatures and limits; two images and redraw on "No"
    are the table's definition and always hold. With `judge` every drawn image gets the learned score too.
    `progress(done, total)` is called after each batch.

    Raises ValueError naming a prompt without metadata to check it by.
    """
    for prompt in prompts:
        if "tag" not in prompt.metadata or "include" not in prompt.metadata:
            raise ValueError(f"evaluate.prompts: row {prompt.id!r} has no `tag` and `include`; the checker needs both")
    sampling = replace(sampling, max_images=2, redraw="on_no")
    outcomes: list[Outcome] = []
    for start in range(0, len(prompts), batch_size):
        outcomes += _evaluate_batch(decoder, prompts[start : start + batch_size], check, sampling, seed, judge)
        if progress is not None:
            progress(len(outcomes), len(prompts))
    return outcomes


def _evaluate_batch(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    check: Check,
    sampling: Sampling,
    seed: int,
    judge: Judge | None,
) -> list[Outcome]:
    def samplings(rows: Sequence[Prompt], use: str) -> list[Sampling]:
        return [replace(sampling, seed=row_seed(seed, prompt.id, use)) for prompt in rows]

    rollouts = introspect(decoder, prompts, samplings(prompts, "draw"), [prompt.id for prompt in prompts])
    refused = [rollout.trajectory.prompt for rollout in rollouts if not rollout.trajectory.verdicts[0]]
    fresh = draw_only(decoder, refused, samplings(refused, "fresh"), [prompt.id for prompt in refused])
    first = [rollout.images[0] for rollout in rollouts]
    redrawn = [rollout.images[1] for rollout in rollouts if not rollout.trajectory.verdicts[0]]
    controls = [rollout.images[0] for rollout in fresh]

    text = decoder.policy.templates.text
    judged = iter(_judged([*prompts, *refused, *refused], [*first, *redrawn, *controls], check, judge))
    firsts = [next(judged) for _ in prompts]
    seconds = iter([next(judged) for _ in refused])
    freshes = iter([next(judged) for _ in refused])
    outcomes = []
    for rollout, (verdict, score) in zip(rollouts, firsts, strict=True):
        yes = rollout.trajectory.verdicts[0]
        final, redraw_score = (verdict, None) if yes else next(seconds)
        control, fresh_score = (verdict, None) if yes else next(freshes)
        outcomes.append(
            Outcome(
                prompt_id=rollout.trajectory.prompt.id,
                tag=rollout.trajectory.prompt.metadata["tag"],
                first_correct=bool(verdict.correct),
                said_yes=yes,
                final_correct=bool(final.correct),
                fresh_correct=bool(control.correct),
                first_score=score,
                redraw_score=redraw_score,
                fresh_score=fresh_score,
                reason=_words(rollout, text),
                true_reason=verdict.reason,
            )
        )
    return outcomes


def _judged(
    prompts: Sequence[Prompt], images: Sequence[np.ndarray], check: Check, judge: Judge | None
) -> list[tuple[Checked, float | None]]:
    """The checker's verdict and the learned judge's score of each image."""
    verdicts = [check(prompt.metadata, image) for prompt, image in zip(prompts, images, strict=True)]
    if judge is None:
        return [(verdict, None) for verdict in verdicts]
    requests = [ScoreRequest(str(i), p, x) for i, (p, x) in enumerate(zip(prompts, images, strict=True))]
    values = {score.id: score.value for score in judge(requests)}
    return [(verdict, values.get(str(index))) for index, verdict in enumerate(verdicts)]


def _words(rollout: Rollout, text: Callable[[np.ndarray], str]) -> str:
    trajectory = rollout.trajectory
    return text(trajectory.segments[trajectory.texts[0]].token_ids)
