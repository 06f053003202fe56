"""The policy's language stages: drawing and correcting from renders, then the three skills on its own images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlpipe.config import Config, SftSection
from rlpipe.data.sft import SftMixture
from rlpipe.evaluate.outcomes import evaluate_policy
from rlpipe.evaluate.table import Measured, Outcome, policy_row
from rlpipe.learn.learner import Learner
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only
from rlpipe.types import Prompt, Sampling
from rlpipe.world.build.progress import Meter
from rlpipe.world.checker import check
from rlpipe.world.examples import WorldExamples
from rlpipe.world.pool import Pool, pool_of
from rlpipe.world.prompts import sample_spec


def train(
    name: str, source: Path, examples: WorldExamples, mix: SftSection, steps: int, lr: float, trainable: list[str]
) -> JanusPolicy:
    """Supervised training through the project's own learner, in this process; returns the trained policy."""
    config = Config(sft=mix)
    config.policy.path, config.policy.dtype, config.policy.trainable = str(source), "bfloat16", trainable
    section = config.learner
    section.lr, section.min_lr, section.warmup_steps, section.schedule = lr, lr * 0.02, 80, "cosine"
    section.weight_decay, section.micro_batch = 0.05, mix.batch_size
    learner = Learner(config)
    mixture = SftMixture(mix, examples, seed=1)
    meter = Meter(name, steps)
    for step in range(steps):
        items = mixture.batch(step)
        metrics = learner.step(items, denominator=len(items), step=step, total_steps=steps)
        meter.update(step + 1, **{mixture.task(step): metrics["loss/total"]})
    return learner.policy


def drawn_pool(
    policy: JanusPolicy,
    count: int,
    seed: int,
    split: str = "train",
    group: int = 4,
    guidance: Sequence[float] = (1.0,),
) -> Pool:
    """Images that the policy drew for prompts of a split, `group` of each prompt; the guidance scales take turns."""
    rng = random.Random(seed)
    specs = [spec for _ in range(count // group) for spec in [sample_spec(rng, split)] * group]
    decoder = Decoder(policy)
    codes = []
    for number, start in enumerate(range(0, len(specs), 256)):
        part = specs[start : start + 256]
        scale = guidance[number % len(guidance)]
        samplings = [Sampling(seed=rng.getrandbits(31), guidance=scale) for _ in part]
        prompts = [Prompt(f"{start + i}", spec.text, spec.metadata) for i, spec in enumerate(part)]
        rollouts = draw_only(decoder, prompts, samplings, [p.id for p in prompts], 0)
        codes += [r.trajectory.segments[0].token_ids for r in rollouts]
        print(f"[drawn] {min(start + 256, len(specs))}/{len(specs)} images", flush=True)
    return pool_of(specs, np.stack(codes), policy)


def measure(policy: JanusPolicy, prompts: list[Prompt], sampling: Sampling) -> tuple[list[Outcome], dict]:
    """Outcomes on prompts by the checker, and the table row made of them."""
    outcomes = evaluate_policy(Decoder(policy), prompts, check, sampling, seed=3)
    return outcomes, policy_row(Measured(outcomes))
