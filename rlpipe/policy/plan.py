"""What a run holds of its policy, from a config.json alone: every parameter, its type and its bytes in every role.

The model is built on the meta device, so a plan of the 7B takes seconds and no memory. Activations, key-value
caches and seconds are in `forecast.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import JanusConfig, JanusForConditionalGeneration

from rlpipe.paths import resolve_path
from rlpipe.policy import original
from rlpipe.policy.checkpoint import build_on_meta
from rlpipe.policy.lora import adapted_layers
from rlpipe.schema import Config, LearnerSection, PolicySection

GIB = 2**30
MASTER = torch.float32
OFFLOADED = {
    "none": (),
    "optimizer": ("masters", "moments"),
    "parameters": ("weights", "masters", "gradients", "moments"),
}
"""What is on the host between steps, by learner.offload."""
KINDS = ("sampler", "weights", "masters", "gradients", "moments")
"""The byte counts of a `Row`."""


@dataclass(frozen=True)
class Row:
    """One parameter. Bytes: `sampler` of a rollout worker or reference; the others of the fullest learner rank."""

    name: str
    shape: tuple[int, ...]
    trained: bool
    sampler_dtype: str
    learner_dtype: str
    sampler: int
    weights: int
    masters: int
    """Float32 copies beside the weights, where those are not masters themselves (deepspeed)."""
    gradients: int
    moments: int

    @property
    def part(self) -> str:
        return self.name.removeprefix("model.").partition(".")[0]


@dataclass(frozen=True)
class Plan:
    """Rows of all parameters, and bytes that are held besides them."""

    model: str
    dtype: str
    ranks: int
    rows: list[Row]
    gathered: int
    """Whole weights in the compute type that a learner rank holds at once during a pass."""
    loading: int
    """The most that a learner rank holds while it loads the checkpoint, before weights are sharded."""
    offload: str = "none"
    roles: dict[str, dict[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        def total(key: str) -> int:
            return sum(getattr(row, key) for row in self.rows)

        kinds = ("weights", "masters", "gradients", "moments")
        learner = {key: total(key) for key in kinds if key != "masters" or total(key)} | {"gathered": self.gathered}
        host = {key: learner.pop(key) for key in OFFLOADED[self.offload] if key in learner}
        learner["total"] = max(sum(learner.values()), self.loading)
        sampler = {"weights": total("sampler"), "total": total("sampler")}
        roles = {"rollout worker": sampler, "reference": dict(sampler), "learner rank": learner}
        if host:
            roles["learner rank, host"] = host | {"total": sum(host.values())}
        object.__setattr__(self, "roles", roles)


def meta_model(path: str | Path) -> JanusForConditionalGeneration:
    """The model of a config.json, or of a folder with one, in either layout, without storage.

    Raises FileNotFoundError, original.ConfigError.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"--model: no file {file.resolve()}; give a config.json or a checkpoint folder")
    config = json.loads(file.read_text("utf-8"))
    if config.get("model_type") == original.MODEL_TYPE:
        # The ids of special tokens are the tokenizer's; shapes do not depend on them.
        return build_on_meta(original.transformers_config(config, dict.fromkeys(("bos", "eos", "pad", "image"), 0)))
    if config.get("model_type") != "janus":
        raise original.ConfigError(f"--model: {file} has model_type {config.get('model_type')!r}; give a Janus one")
    return build_on_meta(JanusConfig(**{**config, "tie_word_embeddings": False}))


def make_plan(config: Config, model: str | Path | None = None) -> Plan:
    """The memory of a run's policy in its roles; `model` is a config.json in place of policy.path."""
    path = resolve_path(model or config.policy.path)
    return plan_of(config, meta_model(path), str(path))


def plan_of(config: Config, janus: JanusForConditionalGeneration, path: str = "") -> Plan:
    """The same for a model that was built already; nothing of it but names and shapes is used."""
    section, learner = config.policy, config.learner
    dtype = getattr(torch, section.dtype)
    adapters = _adapters(janus, section)
    base = dtype if adapters else MASTER
    zero = learner.zero_stage if learner.strategy == "deepspeed" else 0
    rows = []
    for name, parameter in janus.named_parameters():
        trained = not adapters and name.startswith(_starts(section.trainable))
        rows.append(_row(name, tuple(parameter.shape), trained, dtype, dtype if zero else base, learner))
    for name, shape in adapters.items():
        # A sampler has adapters merged into its weights.
        rows.append(_row(name, shape, True, None, dtype if zero else MASTER, learner))
    gathered = _gathered(rows, dtype, learner)
    whole = sum(prod(row.shape) * (MASTER if "lora_" in row.name else base).itemsize for row in rows)
    return Plan(path, section.dtype, learner.ranks, rows, gathered, whole, learner.offload)


def _starts(trainable: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{part}." if part == "lm_head" else f"model.{part}." for part in trainable)


def _adapters(janus: JanusForConditionalGeneration, section: PolicySection) -> dict[str, tuple[int, int]]:
    """Name and shape of the adapters' two matrices."""
    rank, shapes = section.lora.rank, {}
    for name in adapted_layers(janus, section) if rank else ():
        layer = janus.get_submodule(name)
        shapes[f"{name}.lora_A"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B"] = (layer.out_features, rank)
    return shapes


def _row(
    name: str,
    shape: tuple[int, ...],
    trained: bool,
    sampler: torch.dtype | None,
    learner: torch.dtype,
    section: LearnerSection,
) -> Row:
    whole = prod(shape)
    if section.strategy == "deepspeed":
        # Stage 1 cuts masters and moments into flat pieces, 2 also the gradients, 3 also the weights.
        piece, stage = -(-whole // section.ranks), section.zero_stage
        weights, gradients, state = piece if stage > 2 else whole, piece if stage > 1 else whole, piece
        masters = piece * MASTER.itemsize if trained else 0
    else:
        # FSDP2 cuts the first axis into equal chunks, the last one padded. The VQ tokenizer is whole on every rank.
        shards = section.ranks // section.replicas
        shard = whole if "vqmodel" in name else -(-shape[0] // shards) * prod(shape[1:])
        weights = gradients = state = shard
        masters = 0
    return Row(
        name,
        shape,
        trained,
        _name(sampler) if sampler else "merged",
        _name(learner),
        whole * sampler.itemsize if sampler else 0,
        weights * learner.itemsize,
        masters,
        gradients * MASTER.itemsize if trained else 0,
        2 * state * MASTER.itemsize if trained else 0,
    )


def _gathered(rows: list[Row], dtype: torch.dtype, section: LearnerSection) -> int:
    deepspeed = section.strategy == "deepspeed"
    if deepspeed and section.zero_stage < 3:
        return 0
    if section.ranks == 1:
        # Autocast keeps a copy of every trained weight in the compute type until the pass is over.
        mixed = dtype != MASTER and not deepspeed
        return sum(prod(row.shape) * dtype.itemsize for row in rows if row.trained) if mixed else 0
    groups: dict[str, int] = {}
    for row in rows:
        if "vqmodel" not in row.name:
            layer = row.name.split(".")[3] if row.name.startswith("model.language_model.layers.") else "root"
            groups[layer] = groups.get(layer, 0) + prod(row.shape) * dtype.itemsize
    # What is in no layer stays whole during a pass; of the layers, one computes while the next is fetched.
    return groups.pop("root") + sum(sorted(groups.values())[-2:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plan_json(plan: Plan, parameters: bool = True) -> dict[str, Any]:
    """The plan as JSON values; bytes are whole numbers."""
    document = asdict(plan)
    if not parameters:
        del document["rows"]
    return {**document, "parts": parts_of(plan)}


def parts_of(plan: Plan) -> dict[str, dict[str, int]]:
    """Parameter count and bytes by part of the model."""
    parts: dict[str, dict[str, int]] = {}
    for row in plan.rows:
        part = parts.setdefault(row.part, dict.fromkeys(("count", *KINDS), 0))
        part["count"] += prod(row.shape)
        for key in KINDS:
            part[key] += getattr(row, key)
    return parts


def plan_table(plan: Plan, parameters: bool = False) -> str:
    """The plan as text: one line a part, or a parameter, then one line a role."""
    head = f"{plan.model}: {plan.dtype}, {plan.ranks} learner rank{'s' * (plan.ranks > 1)}"
    names = ("parameters", *(f"{kind} GiB" for kind in KINDS))
    lines = [head, "", f"{'':24}" + "".join(f"{name:>15}" for name in names)]
    parts = parts_of(plan)
    parts["total"] = {key: sum(part[key] for part in parts.values()) for key in next(iter(parts.values()))}
    for name, part in parts.items():
        numbers = "".join(f"{part[key] / GIB:15.3f}" for key in KINDS)
        lines.append(f"{name:24}{part['count']:15,}{numbers}")
    lines += ["", "sampler: each rollout worker and reference. The columns after it: each learner rank.", ""]
    for role, amounts in plan.roles.items():
        detail = ", ".join(f"{key} {value / GIB:.2f}" for key, value in amounts.items() if key != "total")
        lines.append(f"{role:24}{amounts['total'] / GIB:8.2f} GiB  ({detail})")
    lines.append(
        f"A learner rank holds {plan.loading / GIB:.2f} GiB while it loads. Activations and caches come on top."
    )
    if parameters:
        width = max(len(row.name) for row in plan.rows) + 2
        columns = f"shape, learner type, bytes of {', '.join(KINDS)}"
        lines += ["", f"{'parameter':{width}}{columns}"]
        for row in plan.rows:
            amounts = " ".join(f"{n:>13,}" for n in (getattr(row, kind) for kind in KINDS))
            lines.append(f"{row.name:{width}}{str(list(row.shape)):18} {row.learner_dtype:9}{amounts}")
    return "\n".join(lines)
