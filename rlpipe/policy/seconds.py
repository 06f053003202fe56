"""Seconds of a training step by phase, worked out from a device's limits and the share of them that is reached.

Decoding: a step takes max(operations / flops, bytes / bandwidth) for the layers (2 P R operations, P b bytes read once
for R rows), the keys and values that it reads, and the head, one after another. Training: 6 operations per parameter
and token (2 more where everything is computed again), scoring by the reference and the judge 2, plus attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

from transformers import JanusForConditionalGeneration

from rlpipe.policy.devices import Device, Figure
from rlpipe.policy.workload import Workload

COPIES = 3e9
"""Bytes per second of weights between hosts: into buckets, through the object store, out of them."""


@dataclass(frozen=True)
class Sizes:
    """Of a policy's language model: numbers of parameters, and bytes."""

    layers: int
    image_head: int
    text_head: int
    width: int
    """Numbers in all query heads of all layers: what attention multiplies per pair of tokens."""
    slot: int
    """Bytes of one token's keys and values."""
    itemsize: int

    @classmethod
    def of(cls, janus: JanusForConditionalGeneration, itemsize: int) -> Sizes:
        text = janus.config.text_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

        def count(module) -> int:
            return sum(prod(parameter.shape) for parameter in module.parameters())

        return cls(
            count(janus.model.language_model.layers),
            count(janus.model.generation_head),
            count(janus.lm_head),
            text.num_attention_heads * head * text.num_hidden_layers,
            2 * text.num_key_value_heads * head * text.num_hidden_layers * itemsize,
            itemsize,
        )


def phase_seconds(
    work: Workload,
    sizes: Sizes,
    device: Device,
    shares: Mapping[str, Figure],
    rows: int,
    synced_bytes: int,
    judge_parameters: float | None,
    own_reference: bool,
) -> dict[str, float]:
    """Seconds of draw, look, score (if the judge is known), reference, learn and sync in a step.

    rows: that a rollout worker draws at once.
    own_reference: the learner computes the reference's log-probs itself.
    """
    config, flops = work.config, device.flops(work.config.policy.dtype)
    share = shares["rollout"].value
    seconds = {
        "draw": _draw(work, sizes, device, flops, rows) / share,
        "look": _look(work, sizes, device, flops, rows) / share,
    }
    if judge_parameters is not None:
        images = work.trajectories * work.mean(float) / config.reward[0].replicas
        seconds["score"] = images * 2 * judge_parameters * JUDGE_TOKENS / flops / shares["forward"].value
    scored = work.mean(lambda images: sum(_operations(work, sizes, length) for length in work.replayed(images)))
    scored = (scored + 2 * work.mean(lambda images: _heads(work, sizes, images))) * work.trajectories
    forward = scored / flops / shares["forward"].value
    again = 1 / 3 if config.learner.activation_checkpointing == "full" else 0
    if config.loss.kl_beta > 0:
        seconds["reference"] = forward / (config.learner.ranks if own_reference else config.reference.replicas)
    # Backward passes are twice the forward pass.
    seconds["learn"] = 3 * (1 + again) * scored / flops / shares["learner"].value / config.learner.ranks
    seconds["sync"] = synced_bytes / min(COPIES, device.link)
    return seconds


JUDGE_TOKENS = 340
"""Of one image and its question (InternVL2.5: 256 and about 80)."""


def step_seconds(seconds: Mapping[str, float], staleness: int) -> float:
    """Of a whole step: phases behind one another, or with stale samples the longest chain and the sync."""
    drawing = seconds["draw"] + seconds["look"] + seconds.get("score", 0.0)
    training = seconds.get("reference", 0.0) + seconds["learn"]
    return (max(drawing, training) if staleness else drawing + training) + seconds["sync"]


def _turns(work: Workload, at_once: int) -> tuple[int, float]:
    """Turns of the busiest worker in a step, and rows of one."""
    config = work.config
    rows = ceil(config.train.prompts_per_step / config.rollout.workers) * config.train.group_size
    turns = ceil(rows / at_once)
    return turns, rows / turns


def _draw(work: Workload, sizes: Sizes, device: Device, flops: float, at_once: int) -> float:
    turns, rows = _turns(work, at_once)
    twins = 1 if work.config.rollout.guidance == 1.0 else 2
    seconds = 0.0
    for image in range(1, work.rounds + 1):
        left = rows * work.mean(lambda images, i=image: images >= i)
        slots = work.drawing(image) - work.image / 2
        seconds += work.image * _step(sizes, device, flops, twins * left, slots, sizes.image_head)
    return turns * seconds


def _look(work: Workload, sizes: Sizes, device: Device, flops: float, at_once: int) -> float:
    turns, rows = _turns(work, at_once)
    seconds = 0.0
    for look in range(1, work.looks(work.rounds) + 1):
        left = rows * work.mean(lambda images, i=look: work.looks(images) >= i)
        block = work.image + work.frame
        seconds += left * block * 2 * sizes.layers / flops
        seconds += work.words * _step(sizes, device, flops, left, work.looking(look), sizes.text_head)
    return turns * seconds


def _step(sizes: Sizes, device: Device, flops: float, rows: float, slots: float, head: int) -> float:
    """One token of so many rows, each of which sees so many slots."""
    weights = [
        max(2 * count * rows / flops, count * sizes.itemsize / device.bandwidth) for count in (sizes.layers, head)
    ]
    cache = max(4 * sizes.width * slots * rows / flops, sizes.slot * slots * rows / device.bandwidth)
    return sum(weights) + cache


def _operations(work: Workload, sizes: Sizes, length: int) -> float:
    """Of one sequence's forward pass; half of attention's square is masked."""
    return 2 * sizes.layers * length + 2 * sizes.width * length**2


def _heads(work: Workload, sizes: Sizes, images: int) -> float:
    """Parameters of the heads times the tokens that they score."""
    pairs = 1 + work.paired
    return sizes.image_head * images * work.image * pairs + sizes.text_head * work.looks(images) * work.words
