"""From logits to a token and its log-prob, with noise that belongs to the row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def uniforms(seed: int, stage: int, count: int) -> np.ndarray:
    """float32 [count] in [0, 1): the noise of one row's segment number `stage`.

    Counter-based (Philox keyed by seed and stage), so a row's draws depend on nothing but its own seed.
    """
    key = np.array([seed % 2**64, stage], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32)


def noise(seeds: Sequence[int], stage: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 [len(seeds), count]: one row of `uniforms` per seed."""
    rows = [uniforms(seed, stage, count) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).to(device)


def truncate(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Logits [B, V] with all but the allowed tokens at -inf.

    top_k keeps exactly the k largest (0: all). top_p then keeps the fewest tokens whose probabilities reach
    it, always at least one (1.0: all).
    """
    if 0 < top_k < logits.shape[-1]:
        values, indices = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, indices, values)
    if top_p < 1.0:
        values, indices = logits.sort(dim=-1, descending=True)
        probs = values.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p
        outside[..., 0] = False
        values = values.masked_fill(outside, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, indices, values)
    return logits


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverse CDF: int64 [B] and its log-prob float32 [B].

    logits float32 [B, V] (-inf: never drawn); uniform [B] in [0, 1).
    """
    logprobs = logits.log_softmax(-1)
    # float64 keeps the sum's end above every target, so a token of probability 0 is out of reach
    cumulative = logprobs.double().exp_().cumsum(-1)
    target = uniform.double().unsqueeze(-1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)


def choose(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperature, truncation, draw: tokens int64 [B], log-probs float32 [B] of the distribution drawn from.

    logits float32 [B, V] after guidance. Temperature 0 and top_k 1 are greedy: a point mass, log-prob 0.
    """
    if temperature == 0.0 or top_k == 1:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    if temperature != 1.0:
        logits = logits / temperature
    return draw(truncate(logits, top_k, top_p), uniform)
