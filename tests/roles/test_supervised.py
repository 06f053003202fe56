"""Supervised training through the same learner."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from rlpipe.config import Config, SftSection
from rlpipe.data.sft import SftMixture, draw_item, judge_item
from rlpipe.observe.tracker import read_metrics
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Prompt, Sampling
from roles.examples import ExampleActor
from roles.group import ActorPool
from roles.jobs import train_supervised
from roles.placement import learner_demands
from roles.trainer import Trainer

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


class FixedExamples:
    """One drawing and one judgement, over and over."""

    def __init__(self, policy: JanusPolicy) -> None:
        prompt, sampling = Prompt("p", "a photo of two red circles"), Sampling()
        codes = np.arange(policy.num_image_tokens)
        image = np.full((policy.image_size, policy.image_size, 3), 90, np.uint8)
        answer = np.array(policy.templates.reflection("Yes."))
        self.items = {
            "draw": draw_item(prompt, codes, sampling),
            "judge": judge_item(prompt, codes, image, answer, True, sampling),
        }

    def draw(self, rng: np.random.Generator, count: int) -> list:
        return [self.items["draw"]] * count

    def judge(self, rng: np.random.Generator, count: int) -> list:
        return [self.items["judge"]] * count


def examples_pool(config: Config) -> ActorPool:
    class Actor(ExampleActor):
        def __init__(self, path: str, section: SftSection, examples_class) -> None:
            self.mixture = SftMixture(section, examples_class(JanusPolicy.load(path)), seed=0)

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor = ray.remote(Actor).options(num_cpus=0.1)
    return ActorPool("examples", lambda index: actor.remote(config.policy.path, config.sft, FixedExamples))


async def train(config: Config, examples: ActorPool, ranks: ActorPool | None) -> ActorPool:
    trainer = Trainer(config, learner_demands(config)["learner"])
    trainer.ranks = ranks or trainer.ranks
    with trainer.signals():
        await asyncio.gather(trainer.start(), examples.start())
        await train_supervised(config, trainer, examples)
    return trainer.ranks


def losses(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k.startswith("loss/")} for row in read_metrics(run_dir).rows]


def test_supervised_training_learns_its_examples_and_resumes_bit_for_bit(
    config_for, prompts_file, tmp_path: Path
) -> None:
    async def scenario() -> None:
        config = config_for(tmp_path / "one", prompts_file)
        config.sft = SftSection(draw=0.5, judge=0.5, redraw=0.0, batch_size=4, prompt_dropout=0.0)
        config.train.steps, config.learner.lr, config.learner.schedule = 30, 5e-3, "constant"
        examples = examples_pool(config)
        ranks = await train(config, examples, None)
        whole = losses(tmp_path / "one")
        config.run.dir, config.train.steps = str(tmp_path / "two"), 15
        await train(config, examples, ranks)
        config.train.steps = 30
        await train(config, examples, ranks)
        assert losses(tmp_path / "two") == whole
        for task in ("draw", "judge"):
            of_task = [row[f"loss/{task}"] for row in whole if f"loss/{task}" in row]
            assert len(of_task) >= 3 and of_task[-1] < 0.7 * of_task[0]
        examples.close()
        ranks.close()

    asyncio.run(asyncio.wait_for(scenario(), 250))
