"""The official rollout algorithm, written plainly: what an engine is measured against, and what it has to agree with.

As in the official code (its `llama.py`): transformers' model with a cache that grows by concatenation; guided pairs in
neighbouring rows; every stage starts again from embeddings; the whole vocabulary's softmax at every step; every row
draws a second image, also after "Yes"; images are decoded, looked at and encoded again one by one.

Two things differ, so that tokens can be compared: a token is found by inverse CDF from its row's own noise in place of
`torch.multinomial`, and padded rows get their own positions and mask, which the official code leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.sampling import uniforms
from rlpipe.types import Prompt, Rollout, Sampling, Segment, Trajectory


class Context(NamedTuple):
    """What stands before the next token: embeddings [R, T, D], mask int64 [R, T] (0: padding), positions [R, T]."""

    embeddings: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def then(self, embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> Context:
        return Context(
            torch.cat([self.embeddings, embeddings], dim=1),
            torch.cat([self.mask, mask], dim=1),
            torch.cat([self.positions, positions], dim=1),
        )

    def then_all(self, embeddings: torch.Tensor) -> Context:
        """Behind it embeddings [R, T, D] without padding, at the positions that follow."""
        steps = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device)
        positions = self.positions[:, -1:] + steps
        return self.then(embeddings, torch.ones_like(positions), positions)


class Sampled(NamedTuple):
    """Tokens int64 [B, T] and their log-probs float32 [B, T]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class ReferenceLoop:
    """Rows of one call, drawn as the official code draws them.

        rollouts = ReferenceLoop(policy, prompts, samplings).run(ids)

    Raises ValueError for a sampling that the official rollouts do not know.
    """

    def __init__(self, policy: JanusPolicy, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> None:
        self.policy, self.prompts, self.samplings = policy, prompts, samplings
        self.templates, self.device, self.sampling = policy.templates, policy.device, samplings[0]
        self.guided = self.sampling.guidance != 1.0
        _check(self.sampling)

    @torch.inference_mode()
    def run(self, ids: Sequence[str]) -> list[Rollout]:
        """Draw, look, draw again: one rollout per row. Who said Yes keeps one image of the two."""
        first = self.draw()
        images = self.pixels(first.tokens)
        reflections = self.look(images)
        words = [self._spoken(row) for row in reflections.tokens]
        second, contexts = self.redraw(first.tokens, images, words)
        later = self.pixels(second.tokens)
        rollouts = []
        for row, prompt in enumerate(self.prompts):
            said_yes = bool(words[row][0] == self.templates.yes)
            context = contexts[row].cpu().numpy() if contexts is not None and not said_yes else None
            segments = [_segment("image", first, row, context_ids=context)]
            room = self._rooms(words)[row] if self.sampling.reflection_room == "group" else None
            segments.append(_segment("text", reflections, row, len(words[row]), room=room))
            if not said_yes:
                segments.append(_segment("image", second, row))
            pixels = [image.cpu().numpy() for image in (images[row], later[row])]
            rollouts.append(
                Rollout(
                    Trajectory(
                        id=ids[row],
                        prompt=prompt,
                        segments=tuple(segments),
                        sampling=self.samplings[row],
                        verdicts=(said_yes,),
                        truncated=(bool(words[row][-1] != self.templates.eos or len(words[row]) == 1),),
                    ),
                    tuple(pixels[:1] if said_yes else pixels),
                )
            )
        return rollouts

    # the three stages

    def draw(self) -> Sampled:
        """The first image of every row."""
        return self._image(self._prompt(twins=self.guided), stage=0)

    def look(self, images: torch.Tensor) -> Sampled:
        """What every row says of its image, uint8 [B, H, W, 3]: tokens end with end-of-sentence, then pads."""
        seen = torch.cat([self.policy.embed_pixels(image[None]) for image in images])
        context = self._prompt(twins=False).then_all(torch.cat([seen, self._words(self.templates.look, len(seen))], 1))
        limit, eos, pad = self.sampling.max_reflection_tokens, self.templates.eos, self.templates.pad
        noise, cache = self._noise(1, limit), DynamicCache()
        answers = torch.tensor([self.templates.yes, self.templates.no], device=self.device)
        ended = torch.zeros(len(images), dtype=torch.bool, device=self.device)
        tokens, logprobs = [], []
        hidden = self._forward(context.embeddings, context, cache)
        for step in range(limit):
            logits = self.policy.text_logits(hidden).float()
            if step == 0:  # Yes or No alone, in this order: inverse CDF depends on it
                answer, logprob = self._sample(logits[:, answers], noise[:, 0], self.sampling.text_temperature)
                token = answers[answer]
            else:
                token, logprob = self._sample(logits, noise[:, step], self.sampling.text_temperature)
            token = torch.where(ended, pad, token)
            tokens.append(token)
            logprobs.append(logprob)
            ended |= (token == eos) & (step > 0)
            if bool(ended.all()):
                break
            if step + 1 < limit:
                embedding = self.policy.embed_text(token)[:, None]
                context = context.then_all(embedding)
                hidden = self._forward(embedding, context, cache)
        return Sampled(torch.stack(tokens, 1), torch.stack(logprobs, 1))

    def redraw(
        self, codes: torch.Tensor, images: torch.Tensor, words: list[torch.Tensor]
    ) -> tuple[Sampled, torch.Tensor | None]:
        """The second image of every row, and the re-encoded codes [B, N] of the first where those are context."""
        contexts = None
        if self.sampling.redraw_context == "reencoded":
            codes = contexts = torch.cat([self.policy.encode_pixels(image[None]) for image in images])
        spoken = [row[row != self.templates.eos] for row in words]
        text = pad_sequence(spoken, batch_first=True, padding_value=self.templates.pad)
        mask = pad_sequence([torch.ones_like(row) for row in spoken], batch_first=True)
        before = torch.cat([self.policy.embed_codes(codes), self._words(self.templates.look, len(codes))], 1)
        context = self._prompt(twins=self.guided).then_all(self._pairs(before))
        start, redraw = context.positions[:, -1:] + 1, self._words(self.templates.redraw, len(codes))
        rooms = self._pairs(torch.tensor(self._rooms(words), device=self.device))[:, None]
        positions = start + torch.arange(text.shape[1], device=self.device)
        context = context.then(self._pairs(self.policy.embed_text(text)), self._pairs(mask), positions)
        positions = start + rooms + torch.arange(redraw.shape[1], device=self.device)
        context = context.then(self._pairs(redraw), torch.ones_like(positions), positions)
        return self._image(context, stage=2), contexts

    def pixels(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] of codes [B, N]."""
        return torch.cat([self.policy.decode_codes(row[None]) for row in codes])

    # what they are made of

    def _image(self, context: Context, stage: int) -> Sampled:
        """One image per row (or per pair of rows) behind `context`."""
        noise, cache = self._noise(stage, self.policy.num_image_tokens), DynamicCache()
        tokens, logprobs = [], []
        hidden = self._forward(context.embeddings, context, cache)
        for step in range(self.policy.num_image_tokens):
            logits = self.policy.image_logits(hidden).float()
            if self.guided:
                conditional, unconditional = logits[0::2], logits[1::2]
                logits = unconditional + self.sampling.guidance * (conditional - unconditional)
            token, logprob = self._sample(logits, noise[:, step], self.sampling.image_temperature)
            tokens.append(token)
            logprobs.append(logprob)
            if step + 1 < self.policy.num_image_tokens:
                embedding = self._pairs(self.policy.embed_codes(token)[:, None])
                context = context.then_all(embedding)
                hidden = self._forward(embedding, context, cache)
        return Sampled(torch.stack(tokens, 1), torch.stack(logprobs, 1))

    def _forward(self, new: torch.Tensor, context: Context, cache: DynamicCache) -> torch.Tensor:
        """Run the last inputs `new` [R, T, D] of a context over the cache: last hidden states [R, D]."""
        return self.policy.janus.model.language_model(
            inputs_embeds=new,
            attention_mask=context.mask,
            position_ids=context.positions[:, -new.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _sample(self, logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
        """Token int64 [B] and log-prob float32 [B] of logits float32 [B, V]; temperature 0 is greedy."""
        if temperature == 0.0:
            tokens = logits.argmax(-1)
            return tokens, torch.zeros_like(tokens, dtype=torch.float32)
        probabilities = torch.softmax(logits / temperature, dim=-1)
        cumulative = probabilities.double().cumsum(-1)
        target = uniform.double()[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)
        return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()

    def _prompt(self, twins: bool) -> Context:
        """Every row's prompt, left-padded; with twins each followed by its unconditional row."""
        rows = [self.templates.prompt(prompt.text) for prompt in self.prompts]
        if twins:
            rows = [sequence for row in rows for sequence in (row, self.templates.blank(row))]
        width = max(map(len, rows))
        ids = torch.tensor([[self.templates.pad] * (width - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return Context(self.policy.embed_text(ids), mask, (mask.cumsum(1) - 1).clamp(min=0))

    def _pairs(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.repeat_interleave(2, dim=0) if self.guided else rows

    def _words(self, ids: list[int], rows: int) -> torch.Tensor:
        return self.policy.embed_text(torch.tensor([ids] * rows, device=self.device))

    def _noise(self, stage: int, count: int) -> torch.Tensor:
        rows = [uniforms(sampling.seed, stage, count) for sampling in self.samplings]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _spoken(self, tokens: torch.Tensor) -> torch.Tensor:
        """A reflection up to its end-of-sentence token; the verdict itself is never one."""
        ends = (tokens[1:] == self.templates.eos).nonzero()[:, 0]
        return tokens[: int(ends[0]) + 2] if len(ends) else tokens

    def _rooms(self, words: list[torch.Tensor]) -> list[int]:
        """Positions that each reflection takes; "group": as many as the longest of its prompt."""
        if self.sampling.reflection_room == "fixed":
            return [self.sampling.max_reflection_tokens] * len(words)
        if self.sampling.reflection_room == "exact":
            return [int((row != self.templates.eos).sum()) for row in words]
        ids = [prompt.id for prompt in self.prompts]
        return [max(len(row) for other, row in zip(ids, words, strict=True) if other == one) for one in ids]


def _segment(kind: str, sampled: Sampled, row: int, length: int | None = None, **more) -> Segment:
    tokens, logprobs = sampled.tokens[row, :length], sampled.logprobs[row, :length]
    return Segment(kind, tokens.cpu().numpy(), logprobs.cpu().numpy(), **more)


def _check(sampling: Sampling) -> None:
    official = {"image_top_k": 0, "image_top_p": 1.0, "text_top_k": 0, "text_top_p": 1.0, "max_images": 2}
    official |= {"history": "last", "verdict_threshold": None, "redraw": "on_no"}
    for name, value in official.items():
        if getattr(sampling, name) != value:
            raise ValueError(f"sampling.{name}: {getattr(sampling, name)!r}; the reference loop knows {value!r} alone")
