"""From the logits of an answer's first token to the probability of yes, for any judge that speaks."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of `text` if the tokenizer knows it as one token, else None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the spellings of yes and of no that are single tokens; ValueError if either has none."""
    ids = tuple([i for t in words if (i := single_token(tokenizer, t)) is not None] for words in (YES, NO))
    for words, found in zip((YES, NO), ids, strict=True):
        if not found:
            raise ValueError(f"tokenizer: none of {', '.join(words)} is one token; the judge cannot answer with it")
    return ids


def p_yes(logits: torch.Tensor, yes: list[int], no: list[int]) -> torch.Tensor:
    """Probability [B] of yes against no from the logits [B, V] of the first answer token.

    p(yes, Yes, YES) / (p(yes, Yes, YES) + p(no, No, NO)), as the official scorer has it, but of the whole
    distribution: there a top-k of 50 comes first and can leave 0 / 0.
    """
    logits = logits.float()
    return torch.sigmoid(logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1))
