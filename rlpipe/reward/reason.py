"""Why a judge says yes or no: the words after its answer, for label files (paper, appendix: reasons are recorded)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlpipe.reward.backend import Query
from rlpipe.reward.judge import Judge
from rlpipe.reward.question import check_question, fill
from rlpipe.types import ScoreRequest

SENTENCE = re.compile(r"[.!?]+(?=\s|$)")


class Explainer:
    """Greedy words of a judge that is loaded already, on whichever backend.

    question:  template with `{prompt}` that asks for yes or no and a reason.
    tokens:    length limit. sentences: how many of them are kept; 0 keeps all.

        explainer = Explainer(judge, question, tokens=128)
        explainer.explain([ScoreRequest(id="0", prompt=prompt, image=image)])     # ["no, the circle is blue, not red."]
    """

    def __init__(self, judge: Judge, question: str, tokens: int = 128, sentences: int = 0) -> None:
        if not isinstance(judge, Judge):
            raise ValueError(f"reward.0.scorer: {type(judge).__name__} gives no reasons; take internvl")
        self.judge, self.question = judge, check_question(question)
        self.tokens, self.sentences = tokens, sentences

    def explain(self, requests: Sequence[ScoreRequest]) -> list[str | None]:
        """One answer with its reason per request, in order; None where the judge failed."""
        queries = [Query.about(fill(self.question, r.prompt.text), r.image) for r in requests]
        answers = self.judge.backend.write(queries, self.tokens)
        return [None if a.text is None else first_sentences(a.text.strip(), self.sentences) for a in answers]


def first_sentences(text: str, count: int) -> str:
    """The text up to the end of its sentence number `count`; all of it for 0.

    A judge whose answers ended with their first sentence in training does not know when to stop.
    """
    ends = [match.end() for match in SENTENCE.finditer(text)]
    return text[: ends[count - 1]] if 0 < count <= len(ends) else text
