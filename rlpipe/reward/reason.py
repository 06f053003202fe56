"""Why a judge says yes or no: the words after its answer, for label files (paper, appendix: reasons are recorded)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from rlpipe.reward.internvl import InternVLScorer
from rlpipe.reward.judge import single_token
from rlpipe.reward.question import check_question, fill
from rlpipe.types import ScoreRequest

SENTENCE = re.compile(r"[.!?]+(?=\s|$)")


class Explainer:
    """Greedy words of a judge that is loaded already.

    question:  template with `{prompt}` that asks for yes or no and a reason.
    tokens:    length limit. sentences: how many of them are kept; 0 keeps all.

        explainer = Explainer(judge, question, tokens=128)
        explainer.explain([ScoreRequest(id="0", prompt=prompt, image=image)])     # ["no, the circle is blue, not red."]
    """

    def __init__(self, judge: InternVLScorer, question: str, tokens: int = 128, sentences: int = 0) -> None:
        if not isinstance(judge, InternVLScorer):
            raise ValueError(f"reward.0.scorer: {type(judge).__name__} gives no reasons; take internvl")
        self.judge, self.question = judge, check_question(question)
        self.tokens, self.sentences = tokens, sentences
        self.end = single_token(judge.format.tokenizer, "<|im_end|>")

    def explain(self, requests: Sequence[ScoreRequest]) -> list[str]:
        """One answer with its reason per request, in order."""
        answers: list[str] = []
        for start in range(0, len(requests), self.judge.batch_size):
            part = requests[start : start + self.judge.batch_size]
            answers += self._generate([fill(self.question, r.prompt.text) for r in part], [r.image for r in part])
        return [first_sentences(answer.strip(), self.sentences) for answer in answers]

    @torch.inference_mode()
    def _generate(self, questions: list[str], images: list[np.ndarray]) -> list[str]:
        format_, model = self.judge.format, self.judge.model
        ids, mask = format_.encode(questions)
        # Generation goes on at the right end of a row, so the padding moves to the left.
        shift = (mask.shape[1] - mask.sum(1)).tolist()
        ids, mask = (torch.stack([row.roll(n) for row, n in zip(t, shift, strict=True)]) for t in (ids, mask))
        pixels = format_.pixels(np.stack([format_.fit(image) for image in images]))
        device = self.judge.device
        tokens = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=pixels.to(device, model.dtype),
            do_sample=False,
            max_new_tokens=self.tokens,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        return format_.tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)


def first_sentences(text: str, count: int) -> str:
    """The text up to the end of its sentence number `count`; all of it for 0.

    A judge whose answers ended with their first sentence in training does not know when to stop.
    """
    ends = [match.end() for match in SENTENCE.finditer(text)]
    return text[: ends[count - 1]] if 0 < count <= len(ends) else text
