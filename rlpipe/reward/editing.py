"""The reward of an edit: does the image follow the instruction, and is everything else as it was?

A judge is shown source and edited image and asked two questions; each P(yes) is a part of the score. The
questions are the official code's (section "editing" of its GRPO script).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlpipe.reward.backend import Answer, Query
from rlpipe.reward.judge import Judge, missing
from rlpipe.reward.question import around_images, check_question
from rlpipe.types import Score, ScoreRequest

HEAD = (
    "Please evaluate the following image edit based on the provided instructions:\n\n"
    "Image-1: <image>\nImage-2: <image>\n"
    "The first image is the original image and the second image is the edited image\n"
    "Editing Instructions: {prompt}\n"
)
REASON = "Please directly respond with yes or no, then give the reason"
FOLLOWING = f"{HEAD}Does the edited image follow the editing instructions? {REASON}"
PRESERVING = (
    f"{HEAD}Does the area of the edited image that is unrelated to the editing instructions remain consistent with "
    f"the original image? {REASON}"
)


class EditingJudge(Judge):
    """Scorer: following * P(yes, the instruction is followed) + preserving * P(yes, the rest is preserved).

    following, preserving: weights. 1.0 and 0.25 are the official recipe's, 0.5 and 1.0 the paper's; both 0 leave
                           nothing to learn from.
    following_question, preserving_question: templates with `{prompt}` and two times `<image>`: source, then edited.
    The other keywords are those of `Judge`.

        judge = EditingJudge("runs/edit_build/judge")
        score = judge.score([ScoreRequest("0", prompt, edited, source)])[0]
        score.parts                                     # {"following": 0.97, "preserving": 0.88, "mass": 0.999}

    `mass` is the smaller one of both answers: what yes and no have of the whole vocabulary.
    """

    needs = ("source_image",)

    def __init__(
        self,
        path: str | Path | None = None,
        following: float = 1.0,
        preserving: float = 0.25,
        following_question: str = FOLLOWING,
        preserving_question: str = PRESERVING,
        batch_size: int = 128,
        backend: str = "transformers",
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        _check(following, preserving, following_question, preserving_question)
        self.weights = (following, preserving)
        self.questions = (following_question, preserving_question)
        super().__init__(path, batch_size, backend, device, dtype, system, max_tiles, engine)

    @staticmethod
    def check_keywords(
        following: float = 1.0,
        preserving: float = 0.25,
        following_question: str = FOLLOWING,
        preserving_question: str = PRESERVING,
        **keywords: Any,
    ) -> None:
        """ValueError if a weight is none, a template lacks an image or the backend cannot be built."""
        _check(following, preserving, following_question, preserving_question)
        Judge.check_keywords(**keywords)

    def queries(self, request: ScoreRequest) -> list[Query]:
        if request.source is None:
            return []
        images = (request.source, request.image)
        return [Query(around_images(question, request.prompt.text, 2), images) for question in self.questions]

    def judged(self, request: ScoreRequest, answers: list[Answer]) -> Score:
        if request.source is None:
            reason = f"prompt {request.prompt.id!r} has no source image; give its row a source_image"
            return Score(id=request.id, value=None, error=reason)
        if failed := missing(request, answers):
            return failed
        parts = {name: answer.p_yes for name, answer in zip(("following", "preserving"), answers, strict=True)}
        value = sum(weight * part for weight, part in zip(self.weights, parts.values(), strict=True))
        return Score(id=request.id, value=value, parts={**parts, "mass": min(answer.mass for answer in answers)})


def _check(following: float, preserving: float, following_question: str, preserving_question: str) -> None:
    for name, weight in (("following", following), ("preserving", preserving)):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise ValueError(f"{name}: {weight!r} is no weight; give 0 or more")
    if following + preserving == 0:
        raise ValueError("following: 0, as preserving is; give one of them a weight")
    templates = {"following_question": following_question, "preserving_question": preserving_question}
    for name, question in templates.items():
        around_images(check_question(question, name), "", 2, name)
