"""Low-rank adapters (LoRA) of the policy's linear layers, through `peft`.

The base stays as it is and only the adapters train; everyone else sees weights under the names that the model has
without adapters: base + alpha / rank * B A. The base alone is what a KL term holds on to, so that the learner has the
reference's log-probs without a second model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import JanusForConditionalGeneration

from rlpipe.policy.adapter import read_adapter
from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import Config, LoraSection, PolicySection

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""peft's name for the only adapter of a model."""


def adapted_layers(janus: JanusForConditionalGeneration, section: PolicySection) -> list[str]:
    """Checkpoint names of the linear layers that get an adapter: those of the trained parts that a target names.

    Raises ValueError for a target that names none.
    """
    starts = tuple(f"{part}." if part == "lm_head" else f"model.{part}." for part in section.trainable)
    found: dict[str, list[str]] = {target: [] for target in section.lora.targets}
    for name, module in janus.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.".startswith(starts):
            for target in found:
                if f".{name}".endswith(f".{target}"):
                    found[target].append(name)
    empty = [target for target, names in found.items() if not names]
    if empty:
        raise ValueError(
            f"policy.lora.targets: no linear layer {', '.join(empty)} in {', '.join(section.trainable)}; give the last "
            "pieces of names that `python launch/plan.py --parameters` lists"
        )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def lora_settings(section: LoraSection, layers: list[str]) -> LoraConfig:
    """peft's own settings of the adapters of these layers."""
    # Here and nowhere else: peft takes seconds to import.
    from peft import LoraConfig

    return LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=list(layers)
    )


def add_adapters(policy: JanusPolicy, section: PolicySection, seed: int = 0) -> None:
    """Put float32 adapters beside the layers and let gradients into them alone.

    The outputs do not change yet, unless the adapters are those of policy.lora.path.
    seed: of the adapters' first values, the same on every rank.

    Raises ValueError for a target that names no layer, AdapterError for a path that does not fit.
    """
    from peft import inject_adapter_in_model

    settings = lora_settings(section.lora, adapted_layers(policy.janus, section))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, policy.janus, adapter_name=ADAPTER)
    policy.requires_grad_(False)
    for _, layer in _layers(policy):
        for matrix in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
            matrix.float().requires_grad_(True)
        # The rest of the policy stays in evaluation mode.
        layer.lora_dropout.train()
    if section.lora.path is not None:
        parameters = {name: p for name, p in policy.janus.named_parameters() if ".lora_" in name}
        tensors = read_adapter(section.lora, {name: p.shape for name, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])


def base_is_reference(config: Config) -> bool:
    """Whether the policy that the KL term holds on to is the base of the adapters: policy.path, the whole run long."""
    asked = config.policy.lora.rank > 0 and config.loss.kl_beta > 0
    return asked and config.reference.path is None and config.decline.action == "none"


@contextlib.contextmanager
def scaled_adapters(policy: JanusPolicy, scale: float) -> Iterator[None]:
    """Within, the adapters' products are multiplied by `scale`; at 0 the policy is its base.

    peft's own switch also changes which parameters want gradients, which sharding has looked at already.
    """
    layers = [layer for _, layer in _layers(policy)]
    before = [layer.scaling[ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.set_scale(ADAPTER, scale)
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[ADAPTER] = scaling


class AdaptedEmbedder:
    """The embeddings of a policy with its adapters, wherever it is used (`rlpipe.learn.replay.Embedder`)."""

    def __init__(self, policy: JanusPolicy) -> None:
        self.policy, self.device = policy, policy.device

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        with scaled_adapters(self.policy, 1.0):
            return self.policy.embed_text(ids)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        with scaled_adapters(self.policy, 1.0):
            return self.policy.embed_codes(codes)

    def embed_pixels(self, images: torch.Tensor) -> torch.Tensor:
        with scaled_adapters(self.policy, 1.0):
            return self.policy.embed_pixels(images)


def merged_weights(
    policy: JanusPolicy, whole: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 weight of every adapted layer, whole; under sharding all ranks iterate together.

    whole: makes a sharded weight whole.
    """
    with torch.no_grad():
        for name, layer in _layers(policy):
            base, a, b = (whole(m.weight) for m in (layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]))
            yield f"{name}.weight", base.float() + layer.scaling[ADAPTER] * (b.float() @ a.float())


def merge(policy: JanusPolicy, tensors: Mapping[str, torch.Tensor], section: LoraSection) -> None:
    """Add adapters, by the learner's names, to the weights of a policy that has none, in place."""
    parameters = dict(policy.janus.named_parameters())
    with torch.no_grad():
        for layer in dict.fromkeys(name.partition(".lora_")[0] for name in tensors):
            a, b = (tensors[f"{layer}.lora_{matrix}.{ADAPTER}.weight"].float() for matrix in "AB")
            weight = parameters[f"{layer}.weight"]
            weight.copy_(weight.float() + section.alpha / section.rank * (b @ a))


def adapted_names(policy: JanusPolicy) -> list[str]:
    """The names that `merged_weights` gives."""
    return [f"{name}.weight" for name, _ in _layers(policy)]


def _layers(policy: JanusPolicy) -> Iterator[tuple[str, nn.Module]]:
    """peft's wrappers of linear layers, by the names of the layers."""
    for name, module in policy.janus.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module
