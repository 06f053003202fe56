"""The token loop of an image in static shapes, so that a GPU replays it from CUDA graphs.

A step reads and writes buffers that stay where they are, and finds its slot in one of them. Attention goes over the
cache up to a limit that holds for many steps; slots that are not written yet are hidden by its mask. One graph is
captured for each limit. Nothing in the loop waits for the GPU. On a CPU the same steps run one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlpipe.rollout.cache import Cache
from rlpipe.rollout.decoder import Decoder

LIMIT_STEP = 128
"""Slots by which the limit grows: a graph more for every so many tokens, half of them read in vain."""

Sample = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class StaticSteps:
    """Draws the tokens of one image per row.

    sample: tokens int64 [B] and log-probs float32 [B] of logits float32 [R, K] and noise [B]; R is B, or 2 B with
            the twins of guided pairs behind them.

        tokens, logprobs = StaticSteps(decoder, cache, hidden, positions, sample).run(noise)     # [N, B] each
    """

    def __init__(
        self, decoder: Decoder, cache: Cache, hidden: torch.Tensor, positions: torch.Tensor, sample: Sample
    ) -> None:
        """hidden [R, D] before the first token, positions int64 [R, 1] at it."""
        self.decoder, self.cache, self.sample = decoder, cache, sample
        self.hidden, self.positions = hidden.clone(), positions.clone()
        self.slot = torch.tensor([cache.length], device=hidden.device)
        for part in (cache.keys, cache.values):  # what is masked has a weight of 0, and 0 times nan is nan
            part[:, :, :, cache.length :] = 0
        self.drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def run(self, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """noise float32 [N, B], one row per token. The last token does not enter the cache."""
        self.noise = noise[0].clone()
        tokens = torch.empty(noise.shape, dtype=torch.long, device=noise.device)
        logprobs = torch.empty_like(noise)
        reached = 0
        for step in range(len(noise)):
            self.noise.copy_(noise[step])
            if step + 1 == len(noise):
                self._draw()
            else:
                limit = min(-(-(self.cache.length + 1) // LIMIT_STEP) * LIMIT_STEP, self.cache.slots)
                if limit != reached:
                    advance, reached = self._advance(limit), limit
                advance()
                self.cache.length += 1
            tokens[step].copy_(self.drawn[0])
            logprobs[step].copy_(self.drawn[1])
        return tokens, logprobs

    def _draw(self) -> torch.Tensor:
        token, logprob = self.sample(self.decoder.image_logits(self.hidden), self.noise)
        if self.drawn is None:
            self.drawn = torch.empty_like(token), torch.empty_like(logprob)
        self.drawn[0].copy_(token)
        self.drawn[1].copy_(logprob)
        return token.repeat(len(self.hidden) // len(token))

    def _step(self, limit: int) -> None:
        embeddings = self.decoder.code_table[self._draw()][:, None]
        self.hidden.copy_(self.decoder.extend_at(self.cache, embeddings, self.positions, self.slot, limit))
        self.positions += 1
        self.slot += 1

    def _advance(self, limit: int) -> Callable[[], None]:
        """A step under this limit; on a GPU its graph."""
        if self.hidden.device.type != "cuda":
            return lambda: self._step(limit)
        state = (self.hidden, self.positions, self.slot)
        kept = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()  # a warm-up outside the graph, for what libraries set up at first use
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(limit)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)  # the slot that the warm-up wrote is written again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(limit)
        return graph.replay
