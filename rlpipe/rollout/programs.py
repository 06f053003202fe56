"""What a trajectory is: draw an image, look at it, draw again.

    drawing    prompt | codes of image 1 | look | reflection | redraw | codes of image 2     (guided)
    looking    prompt | pixels of image 1 | look | reflection                                (never guided)

The prompt is decoded once for both, and once for all rows that share it. Positions count no padding; `redraw`
starts where the longest allowed reflection would end, so the two images stand at a constant distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import torch

from rlpipe.policy.guidance import guide
from rlpipe.rollout.decoder import Cache, Decoder
from rlpipe.rollout.sampling import choose, noise
from rlpipe.types import Prompt, Rollout, Sampling, Segment, Trajectory

FIRST_IMAGE, REFLECTION, SECOND_IMAGE = 0, 1, 2
"""Stages of a row's noise."""
PIXEL_BATCH = 16
"""Images that go through the VQ tokenizer or the vision tower at once."""
GREEDY_WORDS = Sampling(text_temperature=0.0)


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


class Look(NamedTuple):
    """What the policy says of an image: P(yes) over {Yes, No}, and its words."""

    p_yes: float
    reflection: str


@torch.inference_mode()
def introspect(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
) -> list[Rollout]:
    """Draw, look, and draw again after a "No" (or always, if so asked): one rollout per row, in order.

    One prompt, sampling and id per row; the samplings may differ in their seed alone. With `max_images` 1 a
    row ends with its reflection.
    """
    if not prompts:
        return []
    batch = _Batch(decoder, prompts, samplings, ids)
    first, drawing = batch.draw()
    images = _in_chunks(decoder.policy.decode_codes, first.tokens)
    reflections = batch.look(images)
    verdicts = [bool(tokens[0] == batch.templates.yes) for tokens in reflections.tokens]
    again = [row for row, yes in enumerate(verdicts) if not yes or batch.sampling.redraw == "always"]
    if batch.sampling.max_images == 1:
        again = []
    second, contexts = batch.redraw(again, images, drawing, first, reflections)
    new_images = _in_chunks(decoder.policy.decode_codes, second.tokens).cpu().numpy() if again else []

    first_segments = _image_segments(first)
    segments = [[image] for image in first_segments]
    pixels = [[image] for image in images.cpu().numpy()]
    for row, tokens in enumerate(reflections.tokens):
        segments[row].append(Segment("text", tokens, reflections.logprobs[row]))
    for index, (row, image) in enumerate(zip(again, _image_segments(second), strict=True)):
        if contexts is not None:
            segments[row][0] = replace(first_segments[row], context_ids=contexts[index].cpu().numpy())
        segments[row].append(image)
        pixels[row].append(new_images[index])
    trajectories = [
        Trajectory(
            id=ids[row],
            prompt=prompts[row],
            segments=tuple(segments[row]),
            sampling=samplings[row],
            policy_version=policy_version,
            verdicts=(verdicts[row],),
            truncated=(reflections.truncated[row],),
        )
        for row in range(len(prompts))
    ]
    return [Rollout(trajectory, tuple(pixels[row])) for row, trajectory in enumerate(trajectories)]


@torch.inference_mode()
def draw_only(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    ids: Sequence[str],
    policy_version: int = 0,
) -> list[Rollout]:
    """Without introspection: one image per row. Its tokens are those of `introspect`'s first image."""
    if not prompts:
        return []
    batch = _Batch(decoder, prompts, samplings, ids)
    drawn, _ = batch.draw()
    images = _in_chunks(decoder.policy.decode_codes, drawn.tokens).cpu().numpy()
    return [
        Rollout(
            Trajectory(ids[row], prompts[row], (segment,), samplings[row], policy_version),
            (images[row],),
        )
        for row, segment in enumerate(_image_segments(drawn))
    ]


@torch.inference_mode()
def look(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    images: Sequence[np.ndarray],
    sampling: Sampling = GREEDY_WORDS,
) -> list[Look]:
    """What the policy says of given images (uint8 [H, W, 3], one per prompt); greedy words by default."""
    if not prompts:
        return []
    if len(images) != len(prompts):
        raise ValueError(f"look: {len(prompts)} prompts but {len(images)} images; give one image per prompt")
    batch = _Batch(decoder, prompts, [sampling] * len(prompts), [""] * len(prompts), drawing=False)
    reflections = batch.look(torch.from_numpy(np.stack(images)))
    words = map(batch.templates.text, reflections.tokens)
    return [Look(float(p), text) for p, text in zip(reflections.p_yes, words, strict=True)]


class _Batch:
    """The rows of one call: their prompts decoded once, and the three things that can be done with them.

    `columns` says where each sequence's prompt stands in `prompts_cache`: first those of the rows themselves,
    then (only where guidance needs them) those of their unconditional partners.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Prompt],
        samplings: Sequence[Sampling],
        ids: Sequence[str],
        drawing: bool = True,
    ) -> None:
        self.sampling = _common_sampling(prompts, samplings, ids)
        self.decoder, self.policy = decoder, decoder.policy
        self.templates, self.device = decoder.policy.templates, decoder.device
        self.rows = len(prompts)
        self.guided = drawing and self.sampling.guidance != 1.0
        self.seeds = [sampling.seed for sampling in samplings]
        self.num_image_tokens = decoder.policy.num_image_tokens
        texts = {prompt.text: None for prompt in prompts}
        encoded = {text: self.templates.prompt(text) for text in texts}
        sequences = [encoded[prompt.text] for prompt in prompts]
        self.lengths = torch.tensor([len(sequence) for sequence in sequences], device=self.device)
        if self.guided:
            sequences = sequences + [self.templates.blank(sequence) for sequence in sequences]
        self._check_length(max(map(len, sequences)))
        distinct = {tuple(sequence): None for sequence in sequences}
        column = {sequence: index for index, sequence in enumerate(distinct)}
        self.columns = torch.tensor([column[tuple(sequence)] for sequence in sequences], device=self.device)
        self.prompts_cache, self.prompts_hidden = decoder.prefill(list(distinct), max(map(len, distinct)))

    def _check_length(self, prompt: int) -> None:
        templates, sampling = self.templates, self.sampling
        images = 2 * self.num_image_tokens
        total = prompt + images + len(templates.look) + len(templates.redraw) + sampling.max_reflection_tokens
        if total > self.decoder.max_positions:
            raise ValueError(
                f"rollout: a trajectory can take {total} positions, the policy has "
                f"{self.decoder.max_positions}; lower rollout.max_reflection_tokens "
                f"({sampling.max_reflection_tokens}) or shorten the prompt ({prompt} tokens)"
            )

    def _pair(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same for both halves of guided pairs."""
        return torch.cat([tensor, tensor]) if self.guided else tensor

    def draw(self) -> tuple[Drawn, Cache]:
        """Image 1 of every row, and the drawing cache (without the last code)."""
        slots = self.prompts_cache.length + self.num_image_tokens - 1
        cache = self.prompts_cache.select(self.columns, slots)
        drawn = self._image(cache, self.prompts_hidden[self.columns], self.lengths, self.seeds, FIRST_IMAGE)
        return drawn, cache

    def look(self, images: torch.Tensor) -> Reflections:
        """Every row's reflection on its image, uint8 [B, H, W, 3]."""
        ids = torch.tensor(self.templates.look, device=self.device)
        words = self.policy.embed_text(ids).expand(self.rows, -1, -1)
        block = torch.cat([_in_chunks(self.policy.embed_pixels, images), words], dim=1)
        width = block.shape[1]
        slots = self.prompts_cache.length + width + self.sampling.max_reflection_tokens - 1
        cache = self.prompts_cache.select(self.columns[: self.rows], slots)
        positions = self.lengths[:, None] + torch.arange(width, device=self.device)
        hidden = self.decoder.extend(cache, block, positions)
        return self._reflect(cache, hidden, self.lengths + width)

    def redraw(
        self,
        rows: list[int],
        images: torch.Tensor,
        drawing: Cache,
        first: Drawn,
        reflections: Reflections,
    ) -> tuple[Drawn, torch.Tensor | None]:
        """Image 2 of the given rows, and the re-encoded codes of image 1 where those were the context."""
        if not rows:
            return Drawn(first.tokens[:0], first.logprobs[:0]), None
        index = torch.tensor(rows, device=self.device)
        both = torch.cat([index, index + self.rows]) if self.guided else index
        context = None
        if self.sampling.redraw_context == "reencoded":
            context = _in_chunks(self.policy.encode_pixels, images[index])
            codes, cache, both = context, self.prompts_cache, self.columns[both]
        else:
            codes, cache = first.tokens[index, -1:], drawing
        block, positions, valid = self._between(index, codes, reflections)
        cache = cache.select(both, cache.length + block.shape[1] + self.num_image_tokens - 1)
        valid = None if bool(valid.all()) else self._pair(valid.to(self.device))
        hidden = self.decoder.extend(cache, self._pair(block), self._pair(positions), valid)
        seeds = [self.seeds[row] for row in rows]
        return self._image(cache, hidden, positions[:, -1] + 1, seeds, SECOND_IMAGE), context

    def _between(
        self, index: torch.Tensor, codes: torch.Tensor, reflections: Reflections
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What stands between two images: the last codes of the first, look, reflection (padded), redraw.

        Embeddings [B, T, D], positions int64 [B, T], valid bool [B, T] (on the CPU).
        """
        words = [_without_end(reflections.tokens[row], self.templates.eos) for row in index.tolist()]
        look, redraw, widest = self.templates.look, self.templates.redraw, max(map(len, words))
        text = torch.zeros(len(words), len(look) + widest + len(redraw), dtype=torch.long)
        text[:, : len(look)] = torch.tensor(look)
        text[:, len(look) + widest :] = torch.tensor(redraw)
        valid = torch.ones(len(words), codes.shape[1] + text.shape[1], dtype=torch.bool)
        for row, word in enumerate(words):
            text[row, len(look) : len(look) + len(word)] = torch.from_numpy(word)
            valid[row, codes.shape[1] + len(look) + len(word) : valid.shape[1] - len(redraw)] = False
        embedded = self.policy.embed_text(text.to(self.device))
        block = torch.cat([self.decoder.code_table[codes], embedded], dim=1)
        offsets = torch.arange(-codes.shape[1], text.shape[1], device=self.device)
        offsets[offsets >= len(look) + widest] += self.sampling.max_reflection_tokens - widest
        return block, self.lengths[index, None] + self.num_image_tokens + offsets, valid

    def _image(
        self, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor, seeds: list[int], stage: int
    ) -> Drawn:
        """One image per row: `hidden` [B or 2 B, D] stands before its first token, `positions` [B] at it."""
        sampling, count = self.sampling, self.num_image_tokens
        chance = noise(seeds, stage, count, self.device).t().contiguous()
        positions = self._pair(positions)[:, None]
        tokens, logprobs = [], []
        for step in range(count):
            logits = self.policy.image_logits(hidden)
            conditional, unconditional = logits.chunk(2) if self.guided else (logits, None)
            token, logprob = choose(
                guide(conditional, unconditional, sampling.guidance),
                chance[step],
                sampling.image_temperature,
                sampling.image_top_k,
                sampling.image_top_p,
            )
            tokens.append(token)
            logprobs.append(logprob)
            if step + 1 < count:
                embedding = self._pair(self.decoder.code_table[token])[:, None]
                hidden = self.decoder.extend(cache, embedding, positions + step)
        return Drawn(torch.stack(tokens, 1), torch.stack(logprobs, 1))

    def _reflect(self, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor) -> Reflections:
        """One reflection per row: Yes or No, then words until end-of-sentence or the limit."""
        sampling, eos = self.sampling, self.templates.eos
        limit = sampling.max_reflection_tokens
        how = (sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
        chance = noise(self.seeds, REFLECTION, limit, self.device).t().contiguous()
        answers = torch.tensor([self.templates.yes, self.templates.no], device=self.device)
        logits = self.policy.text_logits(hidden)[:, answers].float()
        p_yes = logits.softmax(-1)[:, 0]
        answer, logprob = choose(logits, chance[0], *how)
        tokens = torch.full((limit, self.rows), eos, device=self.device)
        logprobs = torch.zeros(limit, self.rows, device=self.device)
        tokens[0], logprobs[0] = answers[answer], logprob
        active = torch.arange(self.rows, device=self.device)  # rows of the cache that still speak
        for step in range(1, limit):
            embedding = self.policy.embed_text(tokens[step - 1, active])[:, None]
            hidden = self.decoder.extend(cache, embedding, positions[active, None] + step - 1)
            logits = self.policy.text_logits(hidden).float()
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


def _without_end(tokens: np.ndarray, eos: int) -> np.ndarray:
    return tokens[:-1] if tokens[-1] == eos else tokens


def _image_segments(drawn: Drawn) -> list[Segment]:
    tokens, logprobs = drawn.tokens.cpu().numpy(), drawn.logprobs.cpu().numpy()
    return [Segment("image", codes.copy(), row.copy()) for codes, row in zip(tokens, logprobs, strict=True)]


def _in_chunks(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`function` of all rows, PIXEL_BATCH at a time.

    Every chunk has the same size: a convolution's last bit depends on its batch size, and where pixels are
    rounded or codes compared such a bit can become another pixel or code.
    """
    padding = -len(rows) % PIXEL_BATCH
    padded = torch.cat([rows, rows[:1].expand(padding, *rows.shape[1:])])
    return torch.cat([function(chunk) for chunk in padded.split(PIXEL_BATCH)])[: len(rows)]


def _common_sampling(prompts: Sequence[Prompt], samplings: Sequence[Sampling], ids: Sequence[str]) -> Sampling:
    """What all rows share; errors name the field that differs or is out of range."""
    if not len(prompts) == len(samplings) == len(ids):
        raise ValueError(
            f"rollout: {len(prompts)} prompts, {len(samplings)} samplings, {len(ids)} ids; give one of each per row"
        )
    common = replace(samplings[0], seed=0)
    for sampling in set(samplings):
        other = replace(sampling, seed=0)
        if other != common:
            one, two = asdict(common), asdict(other)
            name = next(key for key in one if one[key] != two[key])
            raise ValueError(
                f"rollout: sampling.{name} is {one[name]!r} in one row and {two[name]!r} in another; "
                "rows of one call may differ in their seed alone, so make one call per setting"
            )
    if common.max_images not in (1, 2):
        raise ValueError(f"rollout.max_images: {common.max_images} is neither 1 nor 2")
    if common.max_reflection_tokens < 1:
        raise ValueError(f"rollout.max_reflection_tokens: {common.max_reflection_tokens}; the verdict needs 1")
    return common
