"""The rows of one call on their way through a trajectory: draw, look, draw again.

    drawing    prompt | codes of image 1 | look | reflection | redraw | codes of image 2     (guided)
    looking    prompt | pixels of image 1 | look | reflection                                (never guided)

The prompt is decoded once for both, and once for all rows that share it. With `history: all` both sequences go on
behind the second image in the same way; with `history: last` the third starts again behind the prompt, as if the
second were the first. Positions count no padding. `redraw` starts where the reflection's room ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rlpipe.policy.guidance import guide
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Cache, Decoder
from rlpipe.rollout.graphs import StaticSteps
from rlpipe.rollout.sampling import choose, noise
from rlpipe.types import Sampling


class Drawn(NamedTuple):
    """Sampled tokens int64 [B, T] and their log-probs float32 [B, T]."""

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Reflections(NamedTuple):
    """One entry per row: P(yes) before sampling, token ids [T], log-probs [T], whether the limit cut it."""

    p_yes: np.ndarray
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]
    truncated: list[bool]


class Batch:
    """Rows that differ in their prompts and seeds alone. Those that stop leave it, and cost nothing more.

    prompts: per row its ids up to begin-of-image and those of its unconditional twin; VQ codes are in them as
             `decoder.CODES` + code.
    Arguments and results of the methods have one entry per row that goes on, in the order of `rows`.

        drawn = batch.draw()
        reflections = batch.look(images)
        drawn, contexts = batch.redraw([0, 2], [24, 24], images, drawn, reflections)    # now two rows
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[tuple[list[int], list[int]]],
        sampling: Sampling,
        seeds: Sequence[int],
        drawing: bool = True,
    ) -> None:
        self.decoder, self.policy, self.sampling = decoder, decoder.policy, sampling
        self.templates, self.device = decoder.policy.templates, decoder.device
        self.num_image_tokens = decoder.policy.num_image_tokens
        self.guided = drawing and sampling.guidance != 1.0
        self.seeds, self.round = list(seeds), 0
        self.rows = torch.arange(len(prompts), device=self.device)
        sequences = [conditional for conditional, _ in prompts]
        self.lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        if self.guided:
            sequences = sequences + [unconditional for _, unconditional in prompts]
        self._check_length(max(map(len, sequences)))
        distinct = {tuple(sequence): None for sequence in sequences}
        column = {sequence: index for index, sequence in enumerate(distinct)}
        # where each sequence's prompt stands in the cache: first those of the rows, then those of their twins
        self.columns = torch.tensor([column[tuple(sequence)] for sequence in sequences], device=self.device)
        self.prompts_cache, self.prompts_hidden = decoder.prefill(list(distinct), max(map(len, distinct)))
        self.starts = self.lengths  # per row that goes on: where the image begins that is looked back at
        self.drawing: Cache | None = None  # up to the newest image, which begins at slot `image_slot`
        self.image_slot = 0
        self.looking: Cache | None = None  # up to the newest reflection, which is not in it
        self.between: tuple[torch.Tensor, ...] = ()  # what follows there, for the rows `kept` of it
        self.kept = self.rows

    def _check_length(self, prompt: int) -> None:
        templates, sampling = self.templates, self.sampling
        earlier = max(1, sampling.max_images - 1) if sampling.history == "all" else 1
        framed = self.num_image_tokens + len(templates.look) + len(templates.redraw) + sampling.max_reflection_tokens
        total = prompt + earlier * framed + self.num_image_tokens
        if total > self.decoder.max_positions:
            raise ValueError(
                f"rollout: a trajectory can take {total} positions, the policy has "
                f"{self.decoder.max_positions}; lower rollout.max_reflection_tokens "
                f"({sampling.max_reflection_tokens}) or shorten the prompt ({prompt} tokens)"
            )

    def _pair(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for both halves of guided pairs."""
        return torch.cat([tensor, tensor]) if self.guided else tensor

    def _with_twins(self, index: torch.Tensor, offset: int) -> torch.Tensor:
        """Rows of a cache, then their twins, which stand `offset` behind them."""
        return torch.cat([index, index + offset]) if self.guided else index

    def draw(self) -> Drawn:
        """The first image of every row."""
        cache = self.prompts_cache.select(self.columns, self.prompts_cache.length + self.num_image_tokens - 1)
        self.drawing, self.image_slot = cache, cache.length
        return self._image(cache, self.prompts_hidden[self.columns], self.lengths)

    def look(self, images: torch.Tensor) -> Reflections:
        """Every row's reflection on its newest image, uint8 [B, H, W, 3]."""
        ids = torch.tensor(self.templates.look, device=self.device)
        words = self.policy.embed_text(ids).expand(len(self.rows), -1, -1)
        block = torch.cat([in_chunks(self.policy, "embed_pixels", images), words], dim=1)
        positions = self.starts[:, None] + torch.arange(block.shape[1], device=self.device)
        valid = None
        if self.looking is None:
            before, rows = self.prompts_cache, self.columns[self.rows]
        else:
            before, rows = self.looking, self.kept
            between, between_positions, valid = self.between
            valid = self._unless_all(torch.cat([valid, valid.new_ones(positions.shape)], dim=1))
            block = torch.cat([between, block], dim=1)
            positions = torch.cat([between_positions, positions], dim=1)
        cache = before.select(rows, before.length + block.shape[1] + self.sampling.max_reflection_tokens - 1)
        hidden = self.decoder.extend(cache, block, positions, valid)
        if self.sampling.history == "all":
            self.looking = cache.rewound(cache.length)
        return self._reflect(cache, hidden, positions[:, -1] + 1)

    def redraw(
        self, kept: list[int], rooms: list[int], images: torch.Tensor, drawn: Drawn, reflections: Reflections
    ) -> tuple[Drawn, torch.Tensor | None]:
        """The next image of the rows `kept`, and the re-encoded codes of their newest image where those are context.

        kept:  which of the present rows go on; the others leave.
        rooms: per row of `kept`, the positions that its reflection takes.
        """
        index, present = torch.tensor(kept, device=self.device), len(self.rows)
        everything, reencoded = self.sampling.history == "all", self.sampling.redraw_context == "reencoded"
        self.rows, self.kept, self.starts = self.rows[index], index, self.starts[index]
        codes, cache, rows = self._looked_back_at(index, present, images, drawn)
        text, positions, valid = self._text([reflections.tokens[row] for row in kept], rooms)
        look = len(self.templates.look)
        self.between = (text[:, look:], positions[:, look:], valid[:, look:])
        block = torch.cat([self.decoder.code_table[codes], text], dim=1)
        before = torch.arange(-codes.shape[1], 0, device=self.device) + self.num_image_tokens
        positions = torch.cat([self.starts[:, None] + before, positions], dim=1)
        valid = self._unless_all(torch.cat([valid.new_ones(codes.shape), valid], dim=1))
        cache = cache.select(rows, cache.length + block.shape[1] + self.num_image_tokens - 1)
        hidden = self.decoder.extend(
            cache, self._pair(block), self._pair(positions), None if valid is None else self._pair(valid)
        )
        self.drawing, self.image_slot = (cache, cache.length) if everything else (None, 0)
        self.starts = positions[:, -1] + 1 if everything else self.lengths[self.rows]
        self.round += 1
        return self._image(cache, hidden, positions[:, -1] + 1), codes if reencoded else None

    def _looked_back_at(
        self, index: torch.Tensor, present: int, images: torch.Tensor, drawn: Drawn
    ) -> tuple[torch.Tensor, Cache, torch.Tensor]:
        """Codes of the newest images as the next ones see them, and the cache and the rows of it that they follow.

        index: of the rows that go on, among the `present` ones.
        """
        everything = self.sampling.history == "all"
        beside, prompts = self._with_twins(index, present), self._with_twins(self.rows, len(self.lengths))
        if self.sampling.redraw_context == "reencoded":
            codes = in_chunks(self.policy, "encode_pixels", images[index])
            if everything:
                return codes, self.drawing.rewound(self.image_slot), beside
        elif everything or self.round == 0:
            return drawn.tokens[index, -1:], self.drawing, beside  # the other codes are in the cache
        else:
            codes = drawn.tokens[index]
        return codes, self.prompts_cache, self.columns[prompts]

    def _text(self, reflections: list[np.ndarray], rooms: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What stands between two images: look, reflection (padded), redraw; one row per entry of `starts`.

        Embeddings [B, T, D], positions int64 [B, T], valid bool [B, T] (on the CPU).
        """
        words = [without_end(tokens, self.templates.eos) for tokens in reflections]
        look, redraw, widest = self.templates.look, self.templates.redraw, max(map(len, words))
        text = torch.zeros(len(words), len(look) + widest + len(redraw), dtype=torch.long)
        text[:, : len(look)] = torch.tensor(look)
        text[:, len(look) + widest :] = torch.tensor(redraw)
        valid = torch.ones(text.shape, dtype=torch.bool)
        offsets = torch.arange(text.shape[1]).repeat(len(words), 1)
        for row, (word, room) in enumerate(zip(words, rooms, strict=True)):
            text[row, len(look) : len(look) + len(word)] = torch.from_numpy(word)
            valid[row, len(look) + len(word) : len(look) + widest] = False
            offsets[row, len(look) + widest :] += room - widest
        positions = self.starts[:, None] + self.num_image_tokens + offsets.to(self.device)
        return self.policy.embed_text(text.to(self.device)), positions, valid

    def _unless_all(self, valid: torch.Tensor) -> torch.Tensor | None:
        return None if bool(valid.all()) else valid.to(self.device)

    def _seeds(self) -> list[int]:
        return [self.seeds[row] for row in self.rows.tolist()]

    def _image(self, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor) -> Drawn:
        """One image per row: `hidden` [B or 2 B, D] stands before its first token, `positions` [B] at it."""
        count = self.num_image_tokens
        chance = noise(self._seeds(), 2 * self.round, count, self.device).t().contiguous()
        positions = self._pair(positions)[:, None]
        if self.decoder.graphs:
            drawn = StaticSteps(self.decoder, cache, hidden, positions, self._code).run(chance)
            return Drawn(*(part.t().contiguous() for part in drawn))
        tokens, logprobs = [], []
        for step in range(count):
            token, logprob = self._code(self.decoder.image_logits(hidden), chance[step])
            tokens.append(token)
            logprobs.append(logprob)
            if step + 1 < count:
                embedding = self._pair(self.decoder.code_table[token])[:, None]
                hidden = self.decoder.extend(cache, embedding, positions + step)
        return Drawn(torch.stack(tokens, 1), torch.stack(logprobs, 1))

    def _code(self, logits: torch.Tensor, chance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One VQ code per row and its log-prob, of the logits [B or 2 B, K] of both halves of guided pairs."""
        sampling = self.sampling
        conditional, unconditional = logits.chunk(2) if self.guided else (logits, None)
        how = (sampling.image_temperature, sampling.image_top_k, sampling.image_top_p)
        return choose(guide(conditional, unconditional, sampling.guidance), chance, *how)

    def _verdicts(self, hidden: torch.Tensor, chance: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """P(yes) among {Yes, No}, the first token of each reflection, and its log-prob (NaN by a threshold)."""
        sampling = self.sampling
        answers = torch.tensor([self.templates.yes, self.templates.no], device=self.device)
        logits = self.decoder.text_logits(hidden)[:, answers]
        p_yes = logits.softmax(-1)[:, 0]
        if sampling.verdict_threshold is not None:
            return p_yes, answers[(p_yes <= sampling.verdict_threshold).long()], torch.full_like(p_yes, torch.nan)
        how = (sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
        answer, logprob = choose(logits, chance, *how)
        return p_yes, answers[answer], logprob

    def _reflect(self, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor) -> Reflections:
        """One reflection per row: Yes or No, then words until end-of-sentence or the limit."""
        sampling, eos = self.sampling, self.templates.eos
        limit, rows = sampling.max_reflection_tokens, len(self.rows)
        how = (sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
        chance = noise(self._seeds(), 2 * self.round + 1, limit, self.device).t().contiguous()
        tokens = torch.full((limit, rows), eos, device=self.device)
        logprobs = torch.zeros(limit, rows, device=self.device)
        p_yes, tokens[0], logprobs[0] = self._verdicts(hidden, chance[0])
        active = torch.arange(rows, device=self.device)  # rows of the cache that still speak
        for step in range(1, limit):
            embedding = self.policy.embed_text(tokens[step - 1, active])[:, None]
            hidden = self.decoder.extend(cache, embedding, positions[active, None] + step - 1)
            logits = self.decoder.text_logits(hidden)
            token, logprob = choose(logits, chance[step, active], *how)
            tokens[step, active], logprobs[step, active] = token, logprob
            ended = (tokens[1 : step + 1, active] == eos).any(0)
            speaking = int((~ended).sum())
            if speaking == 0:
                break
            if 2 * speaking <= len(active):
                keep = (~ended).nonzero()[:, 0]
                active, cache = active[keep], cache.select(keep, cache.slots)
        return _cut(p_yes, tokens.t().cpu().numpy(), logprobs.t().cpu().numpy(), eos)


def _cut(p_yes: torch.Tensor, tokens: np.ndarray, logprobs: np.ndarray, eos: int) -> Reflections:
    """Cut each row behind its first end-of-sentence token; the verdict itself is never one."""
    reflections = Reflections(p_yes.cpu().numpy(), [], [], [])
    for row_tokens, row_logprobs in zip(tokens, logprobs, strict=True):
        ends = np.flatnonzero(row_tokens[1:] == eos)
        length = int(ends[0]) + 2 if len(ends) else len(row_tokens)
        reflections.tokens.append(row_tokens[:length].copy())
        reflections.logprobs.append(row_logprobs[:length].copy())
        reflections.truncated.append(not len(ends))
    return reflections


def without_end(tokens: np.ndarray, eos: int) -> np.ndarray:
    return tokens[:-1] if tokens[-1] == eos else tokens


def in_chunks(policy: JanusPolicy, method: str, rows: torch.Tensor) -> torch.Tensor:
    """What the policy's `decode_codes`, `encode_pixels` or `embed_pixels` makes of all rows, some at a time.

    Every chunk has the same size: a convolution's last bit depends on its batch size, and where pixels are
    rounded or codes compared such a bit can become another pixel or code.
    """
    size = _chunk(policy)
    padded = torch.cat([rows, rows[:1].expand(-len(rows) % size, *rows.shape[1:])])
    return torch.cat([getattr(policy, method)(chunk) for chunk in padded.split(size)])[: len(rows)]


def _chunk(policy: JanusPolicy) -> int:
    """Images at once: 16, fewer large ones on a CPU, where one of 384 pixels is enough to keep it busy."""
    at_once = _CPU_PIXELS // policy.image_size**2 if policy.device.type == "cpu" else 16
    return min(max(at_once, 1), 16)


_CPU_PIXELS = 16 * 64 * 64
