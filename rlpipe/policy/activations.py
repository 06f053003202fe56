"""What a learner rank holds of one forward pass until its backward pass: bytes per token of a packed row.

Counted for the layers of transformers' Llama as autograd saves them, D the width, F that of the MLP, Q and K the widths
of all query and of all key/value heads; in float32 whatever the compute type are the inputs of the norms:

    two norms        2 D inputs, 2 D normalised (float32); 2 D outputs, which the projections keep
    attention        Q queries, 2 K keys and values, 2 Q outputs, and one number per head
    MLP              gate, its activation, up, their product: 4 F

Where the compute type is another, the residual stream is float32 all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from rlpipe.schema import LearnerSection

FLOAT32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes. layers: of all layers. layer: of the one that the backward pass is at. heads: of a chunk of logits."""

    layers: int
    layer: int
    heads: int

    @property
    def total(self) -> int:
        return self.layers + self.layer + self.heads


def layer_bytes(text: LlamaConfig, itemsize: int) -> int:
    """Per token and layer, all that autograd saves."""
    queries, keys = _widths(text)
    compute = 2 * text.hidden_size + 3 * queries + 2 * keys + 4 * text.intermediate_size
    return FLOAT32 * (4 * text.hidden_size + text.num_attention_heads) + itemsize * compute


def kept_bytes(text: LlamaConfig, itemsize: int, mode: str) -> int:
    """Per token and layer, what stays until the backward pass under learner.activation_checkpointing."""
    if mode == "none":
        return layer_bytes(text, itemsize)
    kept = FLOAT32 * text.hidden_size
    if mode == "selective":
        # Outputs of the seven products and of attention.
        queries, keys = _widths(text)
        kept += itemsize * (2 * text.hidden_size + 2 * queries + 2 * keys + 2 * text.intermediate_size)
        kept += FLOAT32 * text.num_attention_heads
    return kept


def activations(
    text: LlamaConfig,
    codebook: int,
    tokens: int,
    section: LearnerSection,
    itemsize: int = FLOAT32,
    paired: bool = False,
) -> Activations:
    """Of a micro-batch of `tokens` inputs.

    codebook: size of the image vocabulary. itemsize: of the compute type. paired: images are scored in guided pairs.
    """
    mode = section.activation_checkpointing
    layers = text.num_hidden_layers * tokens * kept_bytes(text, itemsize, mode)
    # Embeddings, and the last norm's input, its normalised form and output.
    layers += tokens * text.hidden_size * (2 * itemsize + 2 * FLOAT32)
    again = 0 if mode == "none" else tokens * layer_bytes(text, itemsize)
    chunk = min(section.head_chunk, tokens)
    # Logits, log-probs, the gradients of both; of a pair both rows' and what guidance makes of them.
    logits = FLOAT32 * chunk * max(4 * text.vocab_size, (7 if paired else 4) * codebook)
    if itemsize != FLOAT32:
        # Heads compute in float32: a copy of their weights, and its gradient.
        logits += 2 * FLOAT32 * text.hidden_size * max(text.vocab_size, codebook)
    return Activations(layers, again, logits)


def _widths(text: LlamaConfig) -> tuple[int, int]:
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return head * text.num_attention_heads, head * text.num_key_value_heads
