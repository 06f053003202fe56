"""What a layer keeps for its backward pass and what it computes again there; and layers compiled."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from rlpipe.policy.janus import JanusPolicy

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}
"""Operations whose outputs selective recomputation keeps: they cost most of a layer's time."""


def recompute_layers(policy: JanusPolicy, mode: str) -> None:
    """Let the language model's layers compute again in the backward pass: everything (full), or all but matrix
    products and attention (selective)."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    language_model = policy.part("language_model")
    # The newer of the two names of the same method, where this transformers has it.
    older = language_model.gradient_checkpointing_enable
    getattr(language_model, "activation_checkpointing_enable", older)(options)
    # transformers recomputes in training mode only; a Llama's layers have no dropout that this could wake.
    language_model.train()


def compile_layers(policy: JanusPolicy) -> None:
    """Compile the norms and the MLP of the language model's layers; attention has kernels of its own.

    Not a layer as a whole: where it computes again, nothing of one that attention cuts in two would be compiled.
    """
    for layer in policy.part("language_model").layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
