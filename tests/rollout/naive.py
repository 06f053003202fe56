"""Rows for the programs, and what plain full forwards say of a rollout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from rlpipe.policy.guidance import guide
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Prompt, Rollout, Sampling

TEXTS = (
    "a photo of two red circles",
    "a photo of a blue square",
    "a photo of a green star above a red circle",
)


def rows(count: int, sampling: Sampling, first_seed: int = 0) -> tuple[list[Prompt], list[Sampling], list[str]]:
    """`count` rows over three prompts of different lengths, each with its own seed."""
    prompts = [Prompt(id=f"p{i % 3}", text=TEXTS[i % 3]) for i in range(count)]
    samplings = [replace(sampling, seed=first_seed + i) for i in range(count)]
    return prompts, samplings, [f"row{i}" for i in range(count)]


class Row:
    """One sequence of embeddings with the position of each."""

    def __init__(self) -> None:
        self.parts: list[torch.Tensor] = []
        self.positions: list[int] = []
        self.next = 0

    def add(self, embedded: torch.Tensor) -> None:
        self.parts.append(embedded)
        self.positions += range(self.next, self.next + len(embedded))
        self.next += len(embedded)

    def hidden(self, policy: JanusPolicy) -> torch.Tensor:
        return policy.hidden(torch.cat(self.parts)[None], torch.tensor(self.positions)[None])[0]


class Naive:
    """Logits of every token of one rollout by full forwards over whole sequences, one row at a time."""

    def __init__(self, policy: JanusPolicy, rollout: Rollout) -> None:
        self.policy, self.rollout, self.trajectory = policy, rollout, rollout.trajectory
        self.templates, self.sampling = policy.templates, rollout.trajectory.sampling

    def _text(self, ids) -> torch.Tensor:
        return self.policy.embed_text(torch.as_tensor(ids, dtype=torch.long))

    def _codes(self, codes: np.ndarray) -> torch.Tensor:
        return self.policy.embed_codes(torch.from_numpy(codes))

    def _prompt(self, blank: bool = False) -> Row:
        row, t, text = Row(), self.templates, self.trajectory.prompt.text
        if self.trajectory.source_codes is None:
            ids = t.prompt(text)
            row.add(self._text(t.blank(ids) if blank else ids))
            return row
        before, after = t.edit(text)
        before, after = t.blank_edit(before, after) if blank else (before, after)
        row.add(torch.cat([self._text(before), self._codes(self.trajectory.source_codes), self._text(after)]))
        return row

    def _reflect(self, row: Row, number: int) -> None:
        """Reflection number `number` in its room, and what precedes the next image."""
        segment = self.trajectory.segments[2 * number + 1]
        words = [token for token in segment.token_ids if token != self.templates.eos]
        rooms = {"fixed": self.sampling.max_reflection_tokens, "exact": len(words), "group": segment.room}
        end = row.next + rooms[self.sampling.reflection_room]
        row.add(self._text(words))
        row.next = end
        row.add(self._text(self.templates.redraw))

    def _image(self, number: int, blank: bool) -> torch.Tensor:
        """Conditional or unconditional logits [N, K] of an image."""
        row = self._prompt(blank)
        for earlier in range(0 if self.sampling.history == "all" else max(number - 1, 0), number):
            segment = self.trajectory.segments[2 * earlier]
            row.add(self._codes(segment.token_ids if segment.context_ids is None else segment.context_ids))
            row.add(self._text(self.templates.look))
            self._reflect(row, earlier)
        count, start = self.policy.num_image_tokens, len(row.positions)
        row.add(self._codes(self.trajectory.segments[2 * number].token_ids))
        return self.policy.image_logits(row.hidden(self.policy)[start - 1 : start - 1 + count])

    def _reflection(self, number: int) -> torch.Tensor:
        templates, row = self.templates, self._prompt()
        for seen in range(0 if self.sampling.history == "all" else number, number + 1):
            row.add(self.policy.embed_pixels(torch.from_numpy(self.rollout.images[seen])[None])[0])
            row.add(self._text(templates.look))
            if seen < number:
                self._reflect(row, seen)
        tokens = self.trajectory.segments[2 * number + 1].token_ids
        row.add(self._text(tokens))
        logits = self.policy.text_logits(row.hidden(self.policy)[-len(tokens) - 1 : -1]).clone()
        allowed = torch.full_like(logits[0], -torch.inf)
        allowed[[templates.yes, templates.no]] = 0.0
        logits[0] += allowed
        return logits

    @torch.no_grad()
    def logits(self, index: int) -> torch.Tensor:
        """Policy logits [T, V] in float32 of segment `index`, before temperature."""
        if self.trajectory.segments[index].kind == "text":
            return self._reflection(index // 2)
        scale = self.sampling.guidance
        unconditional = self._image(index // 2, True) if scale != 1.0 else None
        return guide(self._image(index // 2, False), unconditional, scale)

    def gap(self) -> float:
        """Largest difference between the sampler's log-probs and these."""
        gaps = []
        for index, segment in enumerate(self.trajectory.segments):
            image = segment.kind == "image"
            temperature = self.sampling.image_temperature if image else self.sampling.text_temperature
            logprobs = (self.logits(index) / temperature).log_softmax(-1).numpy()
            gaps.append(np.abs(segment.logprobs - logprobs[np.arange(len(segment)), segment.token_ids]).max())
        return float(max(gaps))


def same_tokens(one: Rollout, other: Rollout) -> bool:
    pairs = zip(one.trajectory.segments, other.trajectory.segments, strict=True)
    return all(np.array_equal(a.token_ids, b.token_ids) for a, b in pairs)
