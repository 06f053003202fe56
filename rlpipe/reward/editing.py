"""The reward of an edit: does the image follow the instruction, and is everything else as it was?

An InternVL is shown source and edited image and asked two questions; each P(yes) is a part of the score. The
questions are the official code's (section "editing" of its GRPO script).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlpipe.reward.internvl import InternVLScorer
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


class EditingJudge(InternVLScorer):
    """Scorer: following * P(yes, the instruction is followed) + preserving * P(yes, the rest is preserved).

    following, preserving: weights. 1.0 and 0.25 are the official recipe's, 0.5 and 1.0 the paper's; both 0 leave
                           nothing to learn from.
    following_question, preserving_question: templates with `{prompt}` and two times `<image>`: source, then edited.

        judge = EditingJudge("runs/edit_build/judge")
        score = judge.score([ScoreRequest("0", prompt, edited, source)])[0]
        score.parts                                     # {"following": 0.97, "preserving": 0.88}
    """

    def __init__(
        self,
        path: str | Path,
        following: float = 1.0,
        preserving: float = 0.25,
        following_question: str = FOLLOWING,
        preserving_question: str = PRESERVING,
        batch_size: int = 128,
        dtype: str = "float32",
        device: str = "auto",
        system: str = "",
    ) -> None:
        for name, weight in (("following", following), ("preserving", preserving)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name}: {weight} is no weight; give 0 or more")
        if following + preserving == 0:
            raise ValueError("following: 0, as preserving is; give one of them a weight")
        self.weights = (following, preserving)
        self.questions = (following_question, preserving_question)
        for name, question in zip(("following_question", "preserving_question"), self.questions, strict=True):
            around_images(check_question(question, name), "", 2, name)
        super().__init__(path, batch_size, dtype, device, system)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order; missing where a request has no source image."""
        asked = [r for r in requests if r.source is not None]
        rows = [
            (around_images(question, r.prompt.text, 2), (r.source, r.image))
            for question in self.questions
            for r in asked
        ]
        answers = self.answers(rows) if rows else []
        pairs = iter(zip(answers[: len(asked)], answers[len(asked) :], strict=True))
        scores = []
        for request in requests:
            if request.source is None:
                reason = f"prompt {request.prompt.id!r} has no source image; give its row a source_image"
                scores.append(Score(id=request.id, value=None, error=reason))
                continue
            parts = dict(zip(("following", "preserving"), next(pairs), strict=True))
            value = sum(weight * part for weight, part in zip(self.weights, parts.values(), strict=True))
            scores.append(Score(id=request.id, value=value, parts=parts))
        return scores
