"""Checks of the learner's settings: one line for each thing that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from rlpipe.schema import PARTS, Config


def learner_problems(config: Config) -> Iterator[str]:
    """Of the learner's section, and of what the learner needs from others."""
    learner, train, sft = config.learner, config.train, config.sft
    trajectories = train.prompts_per_step * train.group_size
    if learner.ranks > trajectories:
        yield (
            f"learner.ranks: {learner.ranks} ranks share {trajectories} trajectories a step; "
            "give fewer ranks or more train.prompts_per_step"
        )
    if train.keep_every % train.checkpoint_every:
        yield (
            f"train.keep_every: {train.keep_every} is no multiple of train.checkpoint_every {train.checkpoint_every}, "
            "so that such steps have no checkpoint; give a multiple, or 0"
        )
    if train.export_every % train.checkpoint_every:
        yield (
            f"train.export_every: {train.export_every} is no multiple of train.checkpoint_every "
            f"{train.checkpoint_every}, and policies are exported beside checkpoints; give a multiple, or 0"
        )
    if config.sync.transport == "nccl" and not (learner.num_gpus >= 1 and config.rollout.num_gpus >= 1):
        yield (
            f"sync.transport: 'nccl' with learner.num_gpus {learner.num_gpus:g} and rollout.num_gpus "
            f"{config.rollout.num_gpus:g}; give both a whole GPU, or set sync.transport=gloo or object_store"
        )
    if learner.min_lr > learner.lr:
        yield f"learner.min_lr: {learner.min_lr:g} is above learner.lr {learner.lr:g}; give a smaller one"
    if learner.schedule.startswith("linear_then_"):
        if not learner.warmup_steps <= learner.convert_steps < train.steps:
            yield (
                f"learner.convert_steps: {learner.convert_steps} is not between learner.warmup_steps "
                f"{learner.warmup_steps} and train.steps {train.steps}, for {learner.schedule}"
            )
        if learner.convert_lr <= 0:
            yield f"learner.convert_lr: {learner.convert_lr:g}; {learner.schedule} needs a rate above 0"
    if len(learner.betas) != 2 or not all(0 <= beta < 1 for beta in learner.betas):
        yield f"learner.betas: {learner.betas}; give two numbers in [0, 1) such as [0.9, 0.95]"
    if sft.draw + sft.judge + sft.redraw + sft.edit <= 0:
        yield f"sft.draw: {sft.draw:g}, with sft.judge, sft.redraw and sft.edit, sums to 0; give one a share above 0"
    unknown = [part for part in config.policy.trainable if part not in PARTS]
    if unknown or not config.policy.trainable:
        yield f"policy.trainable: {unknown or 'nothing'} cannot be trained; choose from {', '.join(PARTS)}"
    yield from _strategy_problems(config)


def _strategy_problems(config: Config) -> Iterator[str]:
    """Of what shards the weights, and of the options that it knows."""
    learner = config.learner
    if learner.strategy == "fsdp2":
        if learner.ranks % learner.replicas:
            yield (
                f"learner.replicas: {learner.replicas} does not divide learner.ranks {learner.ranks}; give a divisor, "
                "such as the number of nodes"
            )
        if learner.deepspeed:
            yield f"learner.deepspeed: {learner.deepspeed} with learner.strategy fsdp2; remove it or use deepspeed"
        return
    if find_spec("deepspeed") is None:
        yield "learner.strategy: deepspeed is not installed; run pip install 'rlpipe[deepspeed]' or use fsdp2"
    if learner.zero_stage not in (1, 2, 3):
        yield f"learner.zero_stage: {learner.zero_stage}; give 1, 2 or 3"
    if learner.replicas != 1:
        yield f"learner.replicas: {learner.replicas} is an option of learner.strategy fsdp2; use that, or 1"
    if learner.offload == "parameters" and learner.zero_stage < 3:
        yield (
            f"learner.offload: 'parameters' with learner.zero_stage {learner.zero_stage}, which keeps whole weights on "
            "the device; use 3, or learner.offload=optimizer"
        )
    if learner.compile and learner.zero_stage == 3:
        yield "learner.compile: true with learner.zero_stage 3, which gathers weights inside of layers; use 2 or fsdp2"
