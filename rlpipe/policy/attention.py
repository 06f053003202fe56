"""Causal attention inside each of several sequences that stand behind one another in one row, without padding.

It is one of transformers' attention implementations, under the name `packed`: a language model that has it and is
called with `sequences=...` keeps its attention inside each; called without, it does what `sdpa` does.

    language_model.set_attn_implementation(PACKED)
    language_model(inputs_embeds=row, attention_mask=no_mask(row), position_ids=where, sequences=Sequences((7, 7, 3)))
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

PACKED = "packed"


class Sequences:
    """Where the sequences of a row lie: their lengths, in order. Sequences of one length that are neighbours are fast.

    Sequences((7, 7, 3)).runs    # [(7, 2), (3, 1)]: length, how many
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        self._on: dict[torch.device, torch.Tensor] = {}

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    def borders(self, device: torch.device) -> torch.Tensor:
        """int32 [N + 1], where each sequence begins and the last one ends."""
        if device not in self._on:
            self._on[device] = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        return self._on[device]


def no_mask(embeddings: torch.Tensor) -> torch.Tensor:
    """A mask [1, 1, 0, 0] that stands for none.

    transformers hands on a mask of four dimensions as it is, and builds one of T x T where it gets none. Every
    implementation but `packed` fails on this one.
    """
    return embeddings.new_zeros(1, 1, 0, 0)


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequences: Sequences | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention [1, T, H, D] of a row's queries [1, H, T, D] to the keys [1, K, T, D] before them in their sequence.

    On a GPU in half precision FlashAttention takes the sequences as they lie; elsewhere runs of one length are a batch.
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # Under autocast rotary embeddings leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if torch.is_autocast_enabled(value.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(value.device.type)) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    if value.is_cuda and value.dtype != torch.float32 and value.shape[-1] <= 256:
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, H, D]
        borders, longest = sequences.borders(value.device), sequences.longest
        window = {"window_size": (-1, 0), "scale": scaling, "enable_gqa": grouped}
        return varlen_attn(*rows, borders, borders, longest, longest, **window)[None], None
    sizes = [length * count for length, count in sequences.runs]
    results = []
    # One split per tensor: its backward is one concatenation, that of a slice a zero of the whole row.
    split = [x[0].split(sizes, dim=1) for x in (query, key, value)]
    for (length, count), *parts in zip(sequences.runs, *split, strict=True):
        batch = [x.unflatten(1, (count, length)).transpose(0, 1) for x in parts]  # [count, H, length, D]
        mixed = F.scaled_dot_product_attention(*batch, is_causal=True, scale=scaling, enable_gqa=grouped)
        results.append(mixed.transpose(1, 2).flatten(0, 1))
    return torch.cat(results)[None], None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
