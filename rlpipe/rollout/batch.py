"""The rows of one call on their way through a trajectory: draw, look, draw again.

    drawing    prompt | codes of image 1 | look | reflection | redraw | codes of image 2     (guided)
    looking    prompt | pixels of image 1 | look | reflection                                (never guided)

The prompt is decoded once for both, and once for all rows that share it. With `history: all` both sequences go on
behind the second image in the same way; with `history: last` the third starts again behind the prompt, as if the
second were the first. Positions count no padding. `redraw` starts where the reflection's room ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlpipe.policy.guidance import guide
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.cache import Cache
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.graphs import StaticSteps
from rlpipe.rollout.sampling import choose, uniforms
from rlpipe.rollout.wave import Drawn, Held, Reflections, Wave
from rlpipe.types import Sampling


class Batch:
    """Rows that differ in their prompts and seeds alone, and go on in waves of any of them.

    prompts:     per row its ids up to begin-of-image and those of its unconditional twin; VQ codes are in them as
                 `decoder.CODES` + code.
    first_seeds: per row that of its first image; rows that share it and the prompt share the image. None: `seeds`.

        wave = batch.draw([0, 1, 2])
        wave.said, wave.rooms = batch.look(wave), [24, 24, 24]
        wave, contexts = batch.redraw([wave.pick([0, 2])])
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[tuple[list[int], list[int]]],
        sampling: Sampling,
        seeds: Sequence[int],
        drawing: bool = True,
        first_seeds: Sequence[int] | None = None,
    ) -> None:
        self.decoder, self.policy, self.sampling = decoder, decoder.policy, sampling
        self.templates, self.device = decoder.policy.templates, decoder.device
        self.num_image_tokens = decoder.policy.num_image_tokens
        self.guided = drawing and sampling.guidance != 1.0
        self.seeds, self.first_seeds = list(seeds), list(first_seeds or seeds)
        sequences = [conditional for conditional, _ in prompts]
        self.lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        if self.guided:
            sequences = sequences + [unconditional for _, unconditional in prompts]
        self._check_length(max(map(len, sequences)))
        distinct = {tuple(sequence): None for sequence in sequences}
        column = {sequence: index for index, sequence in enumerate(distinct)}
        # where each sequence's prompt stands in the cache: first those of the rows, then those of their twins
        self.columns = torch.tensor([column[tuple(sequence)] for sequence in sequences], device=self.device)
        # per row what its first image is drawn from
        self.first_images = [(column[tuple(s)], seed) for s, seed in zip(sequences, self.first_seeds, strict=False)]
        self.prompts_cache, self.prompts_hidden = decoder.prefill(list(distinct), max(map(len, distinct)))

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

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self.device)

    def _columns(self, rows: Sequence[int]) -> torch.Tensor:
        """Where the prompts of rows, and if guided then those of their twins, stand in the cache of prompts."""
        index = self._index(rows)
        return self.columns[torch.cat([index, index + len(self.seeds)])] if self.guided else self.columns[index]

    def draw(self, rows: Sequence[int] | None = None) -> Wave:
        """The first images of some rows (None: of all), each drawn once for the rows that share it."""
        rows = list(range(len(self.seeds)) if rows is None else rows)
        names, drawers = [self.first_images[row] for row in rows], {}
        for name, row in zip(names, rows, strict=True):
            drawers.setdefault(name, row)
        wave = self._draw(list(drawers.values()))
        if len(wave) < len(rows):
            place = {name: number for number, name in enumerate(drawers)}
            wave = wave.pick([place[name] for name in names])
            wave.rows = rows
        return wave

    def _draw(self, rows: list[int]) -> Wave:
        rounds, columns, lengths = [0] * len(rows), self._columns(rows), self.lengths[self._index(rows)]
        cache = self.prompts_cache.select(columns, self.prompts_cache.length + self.num_image_tokens - 1)
        drawn = self._image(cache, self.prompts_hidden[columns], lengths, rows, rounds)
        images = in_chunks(self.policy, "decode_codes", drawn.tokens)
        wave = Wave(rows, rounds, rows, lengths, drawn, images)
        if self.sampling.history == "all" or self.sampling.redraw_context == "sampled":
            wave.drawing = Held.of(cache, torch.arange(len(rows), device=self.device))
        return wave

    def given(self, images: torch.Tensor) -> Wave:
        """All rows, with images that somebody else made, uint8 [B, H, W, 3]."""
        rows = list(range(len(self.seeds)))
        return Wave(rows, [0] * len(rows), rows, self.lengths, None, images)

    def look(self, wave: Wave) -> Reflections:
        """Every row's reflection on its newest image; what branches share is decoded once."""
        once, place = wave.distinct()
        shared = len(once) < len(wave)
        seen = wave.pick(once) if shared else wave
        words = self.policy.embed_text(self._index(self.templates.look)).expand(len(seen), -1, -1)
        block = torch.cat([in_chunks(self.policy, "embed_pixels", seen.images), words], dim=1)
        positions = seen.starts[:, None] + torch.arange(block.shape[1], device=self.device)
        before, valid = seen.looking or Held.of(self.prompts_cache, self._columns(seen.rows)[: len(seen)]), None
        if seen.earlier is not None:
            skipped = len(self.templates.look)  # it is in `looking`
            text, text_positions, text_valid = (part[:, skipped:] for part in self._text(*seen.earlier))
            valid = self._unless_all(torch.cat([text_valid, text_valid.new_ones(positions.shape)], dim=1))
            block = torch.cat([text, block], dim=1)
            positions = torch.cat([text_positions, positions], dim=1)
        cache = before.gather(block.shape[1] + self.sampling.max_reflection_tokens - 1, guided=False)
        hidden, positions = self.decoder.extend(cache, block, positions, valid), positions[:, -1] + 1
        place = self._index(place)
        if self.sampling.history == "all":
            wave.looking = Held.of(cache.rewound(cache.length), place)
        if shared:
            cache, hidden, positions = cache.select(place, cache.slots), hidden[place], positions[place]
        return self._reflect(wave, cache, hidden, positions)

    def redraw(self, waves: Sequence[Wave]) -> tuple[Wave, torch.Tensor | None]:
        """The next images of rows that have been looked at: one wave, in the order of its own `rows`.

        Also the re-encoded codes of the images before, where those are context.
        """
        groups = [[wave for wave in waves if (wave.drawing is None) == behind] for behind in (False, True)]
        groups = [Wave.join(group) for group in groups if group]
        room = self.num_image_tokens - 1
        parts = [self._lead_up(group, room if len(groups) == 1 else 0) for group in groups]
        caches, hiddens, positions, codes = zip(*parts, strict=True)
        for wave in (*waves, *groups):
            wave.drawing = None  # its memory is free again while the images are drawn
        rows = [row for group in groups for row in group.rows]
        rounds = [number + 1 for group in groups for number in group.rounds]
        cache, hidden, positions, whole = caches[0], hiddens[0], torch.cat(positions), self._index(range(len(rows)))
        if len(parts) > 1:
            held = [Held.of(c, whole[: len(group)]) for c, group in zip(caches, groups, strict=True)]
            cache = Held.join(held).gather(room, self.guided)
            halves = zip(*(h.chunk(2) for h in hiddens), strict=True) if self.guided else [hiddens]
            hidden = torch.cat([part for half in halves for part in half])
        drawn = self._image(cache, hidden, positions, rows, rounds)
        images = in_chunks(self.policy, "decode_codes", drawn.tokens)
        wave = Wave(rows, rounds, rows, self.lengths[self._index(rows)], drawn, images)
        if self.sampling.history == "all":  # then there is one group, for every row's cache goes on
            (group,) = groups
            wave.starts, wave.drawing, wave.looking = positions, Held.of(cache, whole), group.looking
            wave.earlier = (group.said, group.rooms, group.starts)
        reencoded = self.sampling.redraw_context == "reencoded"
        return wave, torch.cat(codes) if reencoded else None

    def _lead_up(self, wave: Wave, room: int) -> tuple[Cache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode all that stands before rows' next images.

        The cache with `room` slots left, the last hidden states, the next positions int64 [B], and the codes of the
        newest images, as the next ones see them, that have been decoded for it.
        """
        held = wave.drawing
        if self.sampling.redraw_context == "reencoded":
            once, place = wave.distinct()
            codes = in_chunks(self.policy, "encode_pixels", wave.images[self._index(once)])[self._index(place)]
            held = held and held.rewound(self.num_image_tokens - 1)
        elif held is not None:
            codes = wave.drawn.tokens[:, -1:]  # the other codes are in the cache
        else:
            codes = wave.drawn.tokens
        text, positions, valid = self._text(wave.said, wave.rooms, wave.starts)
        block = torch.cat([self.decoder.code_table[codes], text], dim=1)
        before = torch.arange(-codes.shape[1], 0, device=self.device) + self.num_image_tokens
        positions = torch.cat([wave.starts[:, None] + before, positions], dim=1)
        valid = self._unless_all(torch.cat([valid.new_ones(codes.shape), valid], dim=1))
        if held is not None:
            cache = held.gather(block.shape[1] + room, self.guided)
        else:
            cache = self.prompts_cache.select(
                self._columns(wave.rows), self.prompts_cache.length + block.shape[1] + room
            )
        hidden = self.decoder.extend(
            cache, self._pair(block), self._pair(positions), None if valid is None else self._pair(valid)
        )
        return cache, hidden, positions[:, -1] + 1, codes

    def _text(
        self, said: Reflections, rooms: list[int], starts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What stands behind the images from `starts` on and before the next: look, reflection (padded), redraw.

        Embeddings [B, T, D], positions int64 [B, T], valid bool [B, T] (on the CPU).
        """
        words = [without_end(tokens, self.templates.eos) for tokens in said.tokens]
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
        positions = starts[:, None] + self.num_image_tokens + offsets.to(self.device)
        return self.policy.embed_text(text.to(self.device)), positions, valid

    def _unless_all(self, valid: torch.Tensor) -> torch.Tensor | None:
        return None if bool(valid.all()) else valid.to(self.device)

    def _noise(self, seeds: Sequence[int], stages: Sequence[int], count: int) -> torch.Tensor:
        """float32 [count, B]: what a segment of each row is drawn with; a stage is a segment's number."""
        rows = [uniforms(seed, stage, count) for seed, stage in zip(seeds, stages, strict=True)]
        return torch.from_numpy(np.stack(rows, 1)).to(self.device)

    def _image(
        self, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor, rows: list[int], rounds: list[int]
    ) -> Drawn:
        """One image per row: `hidden` [B or 2 B, D] stands before its first token, `positions` [B] at it."""
        count = self.num_image_tokens
        seeds = [(self.seeds if number else self.first_seeds)[row] for row, number in zip(rows, rounds, strict=True)]
        chance = self._noise(seeds, [2 * number for number in rounds], count)
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
        sampling, kernels = self.sampling, self.decoder.kernels
        how = (sampling.image_temperature, sampling.image_top_k, sampling.image_top_p)
        if kernels is not None and kernels.can_choose(logits.shape[1], *how):
            return kernels.choose(logits, chance, sampling.guidance, sampling.image_temperature)
        conditional, unconditional = logits.chunk(2) if self.guided else (logits, None)
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

    def _reflect(self, wave: Wave, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor) -> Reflections:
        """One reflection per row: Yes or No, then words until end-of-sentence or the limit."""
        sampling, eos = self.sampling, self.templates.eos
        limit, rows = sampling.max_reflection_tokens, len(wave)
        how = (sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
        chance = self._noise([self.seeds[row] for row in wave.rows], [2 * n + 1 for n in wave.rounds], limit)
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
    size = chunk_size(policy)
    padded = torch.cat([rows, rows[:1].expand(-len(rows) % size, *rows.shape[1:])])
    return torch.cat([getattr(policy, method)(chunk) for chunk in padded.split(size)])[: len(rows)]


def chunk_size(policy: JanusPolicy) -> int:
    """Images at once: 16, fewer large ones on a CPU, where one of 384 pixels is enough to keep it busy."""
    at_once = _CPU_PIXELS // policy.image_size**2 if policy.device.type == "cpu" else 16
    return min(max(at_once, 1), 16)


_CPU_PIXELS = 16 * 64 * 64
