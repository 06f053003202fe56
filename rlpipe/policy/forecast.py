"""Before a machine is rented: memory of every role at work, seconds of a step, what does not fit and what helps."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import JanusForConditionalGeneration

from rlpipe.paths import resolve_path
from rlpipe.policy.activations import activations
from rlpipe.policy.devices import GIB, Device, Figure
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import base_is_reference
from rlpipe.policy.plan import Plan, plan_of
from rlpipe.policy.seconds import Sizes, phase_seconds, step_seconds
from rlpipe.policy.workload import Workload
from rlpipe.rollout.cache import packed_size
from rlpipe.rollout.memory import GPU_SHARE, HOST_SHARE, RowMemory
from rlpipe.schema import Config, ScorerSection
from rlpipe.types import Sampling


@dataclass(frozen=True)
class Role:
    """`count` actors, each on `num_gpus` GPUs (0: on the host) with so many bytes by kind."""

    name: str
    count: int
    num_gpus: float
    bytes: dict[str, int]
    note: str = ""
    """What the numbers rest on, where that is not the configuration alone."""

    @property
    def total(self) -> int:
        return max(sum(value for key, value in self.bytes.items() if key != "loading"), self.bytes.get("loading", 0))


@dataclass(frozen=True)
class Forecast:
    """roles: by name. host: bytes besides the roles on hosts, of the whole cluster. problems: what does not fit."""

    device: Device
    roles: dict[str, Role]
    host: dict[str, int]
    rows: tuple[int, int]
    """Rows of a rollout worker at once, and as many as would fit."""
    tokens: int
    """Inputs of the largest micro-batch."""
    gpus: list[tuple[str, float]]
    """What lies on each GPU, and its bytes."""
    seconds: dict[str, float]
    figures: dict[str, Figure]
    problems: list[str]


def make_forecast(
    config: Config, janus: JanusForConditionalGeneration, device: Device, figures: dict[str, Figure]
) -> Forecast:
    """What a run of this configuration takes on such devices; `janus` may be on the meta device."""
    roles, rows, tokens = _roles(config, janus, device)
    gpus = _on_gpus(list(roles.values()))
    image = janus.config.vq_config.num_patches**2
    work, sizes = Workload.expected(config, image), Sizes.of(janus, _itemsize(config))
    plan = plan_of(config, janus)
    # What is trained travels in the samplers' type; adapters are merged into the layers that have them.
    synced = sum(row.sampler for row in plan.rows if row.trained) or sum(
        row.sampler for row in plan.rows if ".layers." in row.name and "language_model" in row.name
    )
    judge = _judge_bytes(config.reward[0])[0] if config.reward else None
    parameters = None if judge is None else judge / _judge_itemsize(config.reward[0])
    seconds = phase_seconds(work, sizes, device, figures, rows[0], synced, parameters, base_is_reference(config))
    seconds["step"] = step_seconds(seconds, config.max_staleness)
    host = _host(config, janus, work, synced) | _offloaded(config, plan)
    places = _on_cpu(roles, host) if device.name.startswith("cpu") else gpus
    full = dict.fromkeys(place for place in places if place[1] > device.usable)
    remedy = " or ".join(_ways(config, janus, device)) if full else ""
    problems = [
        f"{names}: {held / GIB:.0f} GiB of {device.usable / GIB:.0f} usable on {device.name}: "
        f"{remedy or 'a larger device'}"
        for names, held in full
    ]
    if rows[0] > rows[1]:
        problems.append(
            f"rollout worker: {rows[0]} rows at once, its part of {device.name} has room for {rows[1]}: "
            "rollout.num_gpus higher or rollout.max_reflection_tokens lower"
            + f" or rollout.rows {rows[1]}"
            * (rows[1] > 0)
        )
    return Forecast(device, roles, host, rows, tokens, gpus, seconds, figures, problems)


def _itemsize(config: Config) -> int:
    return getattr(torch, config.policy.dtype).itemsize


def _roles(
    config: Config, janus: JanusForConditionalGeneration, device: Device
) -> tuple[dict[str, Role], tuple[int, int], int]:
    plan, size = plan_of(config, janus), _itemsize(config)
    image, text = janus.config.vq_config.num_patches**2, janus.config.text_config
    work, sizes = Workload.longest(config, image), Sizes.of(janus, size)
    weights = plan.roles["rollout worker"]["weights"]
    row, rollout = _row_memory(config, janus, work), config.rollout
    # The decoder has fused copies of the layers and heads.
    held = {"weights": weights, "decoder": (sizes.layers + sizes.image_head + sizes.text_head) * size}
    held["pixels"] = row.shared
    room = _room(config, device, held["weights"] + held["decoder"], row)
    wanted = min(rollout.groups_per_call, config.train.prompts_per_step) * config.train.group_size
    at_once = min(wanted, max(room, 1)) if rollout.rows == "auto" else int(rollout.rows)
    held["rows"] = at_once * row.row
    roles = {"rollout worker": Role("rollout worker", rollout.workers, rollout.num_gpus, held)}
    tokens = _micro_batch(config, work)
    codebook = janus.config.vq_config.num_embeddings
    kept = activations(text, codebook, tokens, config.learner, size, work.paired)
    rank = {key: value for key, value in plan.roles["learner rank"].items() if key != "total"}
    rank |= {"activations": kept.layers + kept.layer, "logits": kept.heads, "loading": plan.loading}
    roles["learner rank"] = Role("learner rank", config.learner.ranks, config.learner.num_gpus, rank)
    if config.loss.kl_beta > 0 and not base_is_reference(config):
        chunk = min(config.learner.head_chunk, tokens) * max(text.vocab_size, 3 * codebook) * 4
        scratch = tokens * (6 * text.hidden_size + 3 * text.intermediate_size) * size + 2 * chunk
        section = config.reference
        roles["reference"] = Role(
            "reference", section.replicas, section.num_gpus, {"weights": weights, "activations": scratch}
        )
    for scorer in config.reward:
        judge, note = _judge_bytes(scorer)
        held = {} if judge is None else {"weights": judge}
        roles[scorer.name] = Role(scorer.name, scorer.replicas, scorer.num_gpus, held, note)
    return roles, (at_once, room), tokens


def _micro_batch(config: Config, work: Workload) -> int:
    """Inputs of the language model in the largest micro-batch of a rank."""
    section, longest = config.learner, work.longest_trajectory
    mine = ceil(work.trajectories / section.ranks) * longest
    if section.token_budget:
        return min(max(section.token_budget, longest), mine)
    return min(section.micro_batch * longest, mine)


def _room(config: Config, device: Device, own: int, row: RowMemory) -> int:
    """Rows that a rollout worker takes for possible when it starts: `rollout/memory.py`, on an empty device."""
    rollout = config.rollout
    if rollout.num_gpus:
        free = (device.memory * min(rollout.num_gpus, 1.0) - own) * GPU_SHARE
    else:
        free = device.memory * HOST_SHARE / rollout.workers
    return max(int((free - row.shared) // row.row), 0)


def _row_memory(config: Config, janus: JanusForConditionalGeneration, work: Workload) -> RowMemory:
    """What a rollout worker reckons with; of a decoder it looks at shapes alone."""
    text, section = janus.config.text_config, config.rollout
    frame, packed = [0] * work.frame, section.cache_dtype == "float8_e4m3"
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shapes = SimpleNamespace(
        policy=JanusPolicy(janus, SimpleNamespace(look=frame, redraw=frame)),
        model=SimpleNamespace(config=text),
        dtype=getattr(torch, config.policy.dtype),
        layers=range(text.num_hidden_layers),
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=head_dim,
        slot_bytes=packed_size(head_dim) if packed else head_dim * _itemsize(config),
    )
    sampling = Sampling(
        guidance=section.guidance,
        max_reflection_tokens=section.max_reflection_tokens,
        max_images=work.rounds,
        redraw_context=section.redraw_context,
        history=section.history,
    )
    reflects = section.program == "introspect"
    return RowMemory.of(shapes, sampling, work.before, section.groups_per_call, reflects, section.branches)


def _judge_bytes(section: ScorerSection) -> tuple[int | None, str]:
    """Weights of a scorer's model: of its files, or of the size in its folder's name."""
    if section.path is None:
        return None, "runs elsewhere, or its size is not known"
    folder = resolve_path(section.path)
    files = [file for kind in ("*.safetensors", "*.bin") for file in Path(folder).glob(kind)] if folder.is_dir() else []
    if files:
        return sum(file.stat().st_size for file in files), ""
    named = re.search(r"(\d+(?:\.\d+)?)[bB]\b", folder.name)
    if named is None:
        return None, f"no files in {section.path}, and its name tells no size"
    return int(float(named[1]) * 1e9 * _judge_itemsize(section)), "by its name"


def _judge_itemsize(section: ScorerSection) -> int:
    return 2 if section.options.get("dtype") == "bfloat16" else 4


def _host(config: Config, janus: JanusForConditionalGeneration, work: Workload, synced: int) -> dict[str, int]:
    """The object store: steps that are drawn or wait, and two versions of the weights."""
    steps = 1 + config.max_staleness + (config.max_staleness > 0)
    side = janus.config.vision_config.image_size
    pixels = work.trajectories * work.rounds * side**2 * 3
    # Codes and words in int64, log-probs of sampler and reference in float32.
    tokens = work.trajectories * (work.rounds * work.image + work.looks(work.rounds) * work.words) * (8 + 4 + 4)
    return {"images": steps * pixels, "trajectories": steps * tokens, "weights": 2 * synced}


def _offloaded(config: Config, plan: Plan) -> dict[str, int]:
    host = plan.roles.get("learner rank, host")
    return {"offloaded by the learner": config.learner.ranks * host["total"]} if host else {}


def _on_gpus(roles: list[Role]) -> list[tuple[str, float]]:
    """Actors on GPUs as Ray lays them: each on the first GPU with room for its share."""
    gpus: list[list[Any]] = []  # free share, names, bytes
    for role in roles:
        for _ in range(role.count if role.num_gpus else 0):
            if role.num_gpus >= 1:
                whole = int(role.num_gpus)
                gpus += [[0.0, [role.name], role.total / whole] for _ in range(whole)]
                continue
            place = next((gpu for gpu in gpus if gpu[0] >= role.num_gpus - 1e-6), None)
            if place is None:
                place = [1.0, [], 0.0]
                gpus.append(place)
            place[0] -= role.num_gpus
            place[1].append(role.name)
            place[2] += role.total
    return [(" + ".join(names), held) for _, names, held in gpus]


def _on_cpu(roles: dict[str, Role], host: dict[str, int]) -> list[tuple[str, float]]:
    """All of this machine's actors, and what the host holds beside them."""
    here = [role for role in roles.values() if role.num_gpus == 0]
    held = sum(role.count * role.total for role in here) + sum(host.values())
    return [(" + ".join([*(role.name for role in here), "object store"]), float(held))]


# what to change

CHANGES = (
    {"learner.activation_checkpointing": "selective"},
    {"learner.activation_checkpointing": "full"},
    {"learner.offload": "optimizer"},
    {"policy.lora.rank": 64},
    {"policy.dtype": "bfloat16"},
)


def _candidates(config: Config) -> Iterator[dict[str, Any]]:
    """Changes that take memory off a GPU, the gentlest first."""
    learner, rollout = config.learner, config.rollout
    rows = rollout.groups_per_call * config.train.group_size if rollout.rows == "auto" else int(rollout.rows)
    while rows > 1:
        rows //= 2
        yield {"rollout.rows": str(rows)}
    if rollout.num_gpus:
        yield {"rollout.cache_dtype": "float8_e4m3"}
    size = learner.micro_batch
    while size > 1 and not learner.token_budget:
        size //= 2
        yield {"learner.micro_batch": size}
    budget = learner.token_budget or 0
    while budget > 1024:
        budget //= 2
        yield {"learner.token_budget": budget}
    yield from CHANGES
    for ranks in (2, 4, 8, 16, 32):
        if ranks > learner.ranks and ranks % learner.replicas == 0:
            yield {"learner.ranks": ranks}
    for role in ("rollout", "learner", "reference"):
        if 0 < getattr(config, role).num_gpus < 1:
            yield {f"{role}.num_gpus": 1}


def _changed(config: Config, change: dict[str, Any]) -> Config:
    config = copy.deepcopy(config)
    for key, value in change.items():
        *path, last = key.split(".")
        section: Any = config
        for name in path:
            section = getattr(section, name)
        setattr(section, last, value)
    return config


def _excess(config: Config, janus: JanusForConditionalGeneration, device: Device) -> float:
    """Bytes by which all GPUs, or this machine, are too small."""
    roles, _, _ = _roles(config, janus, device)
    places = _on_cpu(roles, {}) if device.name.startswith("cpu") else _on_gpus(list(roles.values()))
    return sum(max(held - device.usable, 0.0) for _, held in places)


def _ways(config: Config, janus: JanusForConditionalGeneration, device: Device) -> list[str]:
    """Single changes after which everything fits, else those that help most, together."""
    before, alone, helps = _excess(config, janus, device), {}, {}
    for change in _candidates(config):
        (key,) = change
        if _changed(config, change) == config or key in alone:
            continue
        after = _excess(_changed(config, change), janus, device)
        if after == 0:
            alone[key] = f"{key} {change[key]}"
        elif after < 0.95 * before:
            helps[key] = (after, f"{key} {change[key]}")
    if alone:
        return list(alone.values())
    return [" and ".join(text for _, text in sorted(helps.values()))] if helps else []


# what is shown


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    document = asdict(forecast)
    for name, role in forecast.roles.items():
        document["roles"][name]["total"] = role.total
    return document


def forecast_table(forecast: Forecast) -> str:
    """Roles, GPUs, host, seconds, and what does not fit, as text."""
    device, lines = forecast.device, []
    lines.append(
        f"At work, on {device.name} ({device.memory / GIB:.0f} GiB, {device.reserve / GIB:.0f} of them kept free):"
    )
    for role in forecast.roles.values():
        parts = [f"{key} {value / GIB:.2f}" for key, value in role.bytes.items() if key != "loading"]
        parts += [role.note] * bool(role.note)
        place = f"{role.num_gpus:g} GPU" if role.num_gpus else "host"
        lines.append(f"{role.name:16}{role.count:3} x {place:8}{role.total / GIB:8.2f} GiB  ({', '.join(parts)})")
    at_once, room = forecast.rows
    lines.append(f"A rollout worker draws {at_once} rows at once; its part of the device has room for {room}.")
    lines.append(f"The largest micro-batch has {forecast.tokens:,} tokens.")
    counts = {entry: forecast.gpus.count(entry) for entry in forecast.gpus}
    lines += [f"GPU x {count}: {names}: {held / GIB:.1f} GiB" for (names, held), count in counts.items()]
    parts = [f"{key} {value / GIB:.2f}" for key, value in forecast.host.items()]
    lines.append(
        f"Hosts, all together: {sum(forecast.host.values()) / GIB:.2f} GiB beside the roles ({', '.join(parts)})"
    )
    lines += ["", "Seconds of a step, expected:"]
    lines.append("  ".join(f"{name} {value:.3g}" for name, value in forecast.seconds.items()))
    sources = [f"{kind} {figure.value:.0%} ({figure.source})" for kind, figure in forecast.figures.items()]
    lines.append(f"Of the device's limit is reached: {', '.join(sources)}.")
    lines += ["", *(f"Does not fit. {problem}" for problem in forecast.problems)]
    if not forecast.problems:
        lines.append("Everything fits.")
    return "\n".join(lines)
