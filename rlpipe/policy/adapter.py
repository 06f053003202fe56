"""Adapters on disk, in peft's format: adapter_config.json and adapter_model.safetensors, in a folder of their own.

`PeftModel.from_pretrained(base, folder)` makes of a folder what it was saved from; `policy.lora.path` starts there.
torch and peft are loaded where tensors are: a configuration is checked without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlpipe.paths import resolve_path
from rlpipe.schema import LoraSection, PolicySection

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before a layer's name in the base model."""
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""Settings of an adapter_config.json that have one value here; a file may leave them out."""


class AdapterError(ValueError):
    """A folder that is no adapter of this policy; one line with the field, the value and the way out."""


def save_adapter(folder: str | Path, tensors: Mapping[str, torch.Tensor], section: PolicySection) -> None:
    """Write adapters in peft's format; tensors by the learner's names (`<layer>.lora_A.default.weight`), whole."""
    from safetensors.torch import save_file

    from rlpipe.policy.lora import ADAPTER, lora_settings

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    settings = lora_settings(section.lora, layers)
    settings.base_model_name_or_path, settings.inference_mode = section.path, True
    settings.save_pretrained(folder)
    named = {PREFIX + name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, folder / WEIGHTS)


def read_adapter(section: LoraSection, wanted: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The tensors of `policy.lora.path` by the learner's names; `wanted` are the names and shapes that it must have.

    Raises AdapterError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from rlpipe.policy.lora import ADAPTER

    folder = resolve_path(section.path)
    if problem := next(adapter_problems(section), None):
        raise AdapterError(problem)
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"policy.lora.path: {folder / WEIGHTS} cannot be read: {error}") from None
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            # Of an adapted text head peft also saves the base's own weights.
            continue
        layer, _, matrix = name.removeprefix(PREFIX).rpartition(".lora_")
        tensors[f"{layer}.lora_{matrix.replace('.weight', f'.{ADAPTER}.weight')}"] = tensor
    for name in sorted(tensors.keys() ^ wanted.keys()):
        side = "has no adapter" if name in wanted else "has an adapter, and policy.lora.targets none,"
        layer = name.partition(".lora_")[0]
        raise AdapterError(f"policy.lora.path: {folder} {side} for {layer}; name its layers in policy.lora.targets")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise AdapterError(
                f"policy.lora.path: {folder}: {name} is {list(tensors[name].shape)}, of policy.path {list(shape)}; "
                "give the base that it was trained on"
            )
    return tensors


def adapter_problems(section: LoraSection) -> Iterator[str]:
    """What can be told of `policy.lora.path` without reading a tensor."""
    if section.path is None:
        return
    folder = resolve_path(section.path)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        yield f"policy.lora.path: no {' and no '.join(missing)} in {folder}; give a folder in peft's format or null"
        return
    try:
        stored: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
        rank, alpha = int(stored["r"]), float(stored["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        yield f"policy.lora.path: {folder / CONFIG} is no adapter's configuration ({error})"
        return
    for name, value in PLAIN.items():
        if stored.get(name, value) != value:
            yield f"policy.lora.path: {folder} has {name} {stored[name]!r}; only plain LoRA ({name} {value!r}) is known"
    for key, mine, its in (("rank", section.rank, rank), ("alpha", section.alpha, alpha)):
        if mine != its:
            yield f"policy.lora.{key}: {mine:g}, and the adapter of policy.lora.path has {its:g}; set it to that"
