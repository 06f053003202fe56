"""Low-rank adapters (LoRA) of the policy's linear layers, through `peft`.

The base stays as it is and only the adapters train; everyone else sees weights under the names that the model has
without adapters: base + alpha / rank * B A.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import JanusForConditionalGeneration

from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import PolicySection

ADAPTER = "default"
"""peft's name for the only adapter of a model."""


def adapted_layers(janus: JanusForConditionalGeneration, section: PolicySection) -> list[str]:
    """Checkpoint names of the linear layers that get an adapter: those of the trained parts that a target names.

    Raises ValueError for a target that names none.
    """
    starts = tuple(f"{part}." if part == "lm_head" else f"model.{part}." for part in section.trainable)
    found: dict[str, list[str]] = {target: [] for target in section.lora.targets}
    for name, module in janus.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in found and isinstance(module, nn.Linear) and f"{name}.".startswith(starts):
            found[leaf].append(name)
    empty = [target for target, names in found.items() if not names]
    if empty:
        raise ValueError(
            f"policy.lora.targets: no linear layer {', '.join(empty)} in {', '.join(section.trainable)}; give the last "
            "pieces of names that `python launch/plan.py --parameters` lists"
        )
    return [name for names in found.values() for name in names]


def add_adapters(policy: JanusPolicy, section: PolicySection, seed: int = 0) -> None:
    """Put float32 adapters beside the layers and let gradients into them alone; the outputs do not change yet.

    seed: of the adapters' first values, the same on every rank.
    """
    # Here and nowhere else: peft takes seconds to import.
    from peft import LoraConfig, inject_adapter_in_model

    lora = section.lora
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapted_layers(policy.janus, section),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, policy.janus, adapter_name=ADAPTER)
    policy.requires_grad_(False)
    for _, layer in _layers(policy):
        for matrix in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            matrix.float().requires_grad_(True)
        # The rest of the policy stays in evaluation mode.
        layer.lora_dropout.train()


def merged_weights(policy: JanusPolicy) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 weight of every adapted layer, whole; under sharding all ranks iterate together."""
    with torch.no_grad():
        for name, layer in _layers(policy):
            base, a, b = (_whole(m.weight) for m in (layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]))
            yield f"{name}.weight", base.float() + layer.scaling[ADAPTER] * (b.float() @ a.float())


def adapted_names(policy: JanusPolicy) -> list[str]:
    """The names that `merged_weights` gives."""
    return [f"{name}.weight" for name, _ in _layers(policy)]


def _layers(policy: JanusPolicy) -> Iterator[tuple[str, nn.Module]]:
    """peft's wrappers of linear layers, by the names of the layers."""
    for name, module in policy.janus.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
