"""What stale samples cost, and what correcting for them gives back: `python benchmarks/staleness.py --json FILE`.

The default run, in one process: every batch is drawn by the policy of exactly so many versions ago (fewer in the first
steps), so that nothing but staleness and correction differs. At staleness 0 every correction has ratio 1; it is run
once a seed. The exact checker measures the accuracy of final images on held-out prompts at the end. A file that exists
is gone on with; runs that are in it are not made again.

--time N adds the seconds of a step of `launch/grpo.py` itself for each staleness, N steps each: a machine that has
nothing else to do is needed for these.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from rich.console import Console
from rich.table import Table

from rlpipe.config import Config, load_config
from rlpipe.data.prompts import PromptCursor, load_prompts
from rlpipe.evaluate.outcomes import evaluate_policy
from rlpipe.evaluate.table import Measured, policy_row
from rlpipe.learn.advantage import assign_credit, extend, final_image_of, reference_items
from rlpipe.learn.learner import Learner
from rlpipe.learn.replay import ReplayOptions, segment_logprobs
from rlpipe.paths import ROOT
from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.combine import combine
from rlpipe.reward.scorer import build_scorer
from rlpipe.reward.service import ScoreService
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Rollout, Sampling, ScoreRequest, TrainItem
from rlpipe.world.checker import check


class Run:
    """One training run whose samples are `staleness` versions old."""

    def __init__(self, config: Config, staleness: int) -> None:
        self.config = config
        self.learner = Learner(config)
        self.reference = JanusPolicy.from_config(config).requires_grad_(False)
        self.sampler = JanusPolicy.from_config(config).requires_grad_(False)
        self.decoder = Decoder(self.sampler)
        self.scorer = ScoreService(build_scorer(config.reward[0], device="cpu"), config.reward[0])
        self.cursor = PromptCursor(load_prompts(config.data.prompts), config.seed, config.data.shuffle)
        self.versions = deque([(0, self.learner.weights())], maxlen=staleness + 1)
        rollout = config.rollout
        self.sampling = Sampling(guidance=rollout.guidance, max_reflection_tokens=rollout.max_reflection_tokens)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.sampler.janus.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                parameters[name].copy_(tensor)
        self.decoder.refresh()

    def draw(self, version: int) -> tuple[list[Rollout], list[int]]:
        """A batch of rollouts and the group of each."""
        size, rows, groups = self.config.train.group_size, [], []
        for ordinal, prompt in self.cursor.next(self.config.train.prompts_per_step):
            seeds = np.random.SeedSequence([self.config.seed, ordinal]).generate_state(size)
            rows += [(f"{ordinal}-{m}", prompt, replace(self.sampling, seed=int(s))) for m, s in enumerate(seeds)]
            groups += [ordinal] * size
        ids, prompts, samplings = zip(*rows, strict=True)
        drawn = introspect(self.decoder, list(prompts), list(samplings), list(ids), version)
        return extend(drawn, self.config.credit.rule), groups

    def score(self, rollouts: list[Rollout]) -> list[list]:
        """Per rollout what the judge says of each of its images."""
        requests = [
            ScoreRequest(f"{rollout.trajectory.id}/{number}", rollout.trajectory.prompt, image)
            for rollout in rollouts
            for number, image in enumerate(rollout.images)
        ]
        found = iter(self.scorer.score(requests)[0])
        scores = []
        for rollout in rollouts:
            final = final_image_of(rollout.trajectory, self.config.credit.rule)
            images = range(len(rollout.images))
            scores.append([combine(self.config.reward, (next(found),), number == final) for number in images])
        return scores

    def step(self, number: int) -> dict[str, float]:
        version, weights = self.versions[0]
        self.load(weights)
        rollouts, groups = self.draw(version)
        options = ReplayOptions.from_config(self.config.loss)
        references = segment_logprobs(self.reference, reference_items(rollouts), options)
        loss = self.config.loss
        credited = assign_credit(rollouts, self.score(rollouts), groups, self.config.credit, references, loss.train_eos)
        items: list[TrainItem] = list(credited.batch.items)
        metrics = self.learner.step(
            items, credited.batch.denominator, number, self.config.train.steps, version == self.learner.policy_version
        )
        self.versions.append((self.learner.policy_version, self.learner.weights()))
        return metrics | credited.metrics

    def accuracy(self) -> dict:
        """Accuracy of final images on held-out prompts, and what belongs to it."""
        self.load(self.versions[-1][1])
        section, prompts = self.config.evaluate, load_prompts(self.config.evaluate.prompts)
        outcomes = evaluate_policy(self.decoder, prompts, check, self.sampling, section.seed, section.batch_size)
        return policy_row(Measured(outcomes))["with"]


def one(staleness: int, correction: str, seed: int, overrides: list[str]) -> dict:
    """A whole run; its accuracy, and means over its last ten steps."""
    fixed = [f"seed={seed}", f"max_staleness={staleness}", f"loss.correction={correction}", "learner.threads=1"]
    run, started, rows = Run(load_config("configs/tiny_grpo.yaml", [*overrides, *fixed]), staleness), time.time(), []
    for number in range(run.config.train.steps):
        rows.append(run.step(number))
        if number % 10 == 9:
            reward = np.mean([row["reward/trajectory/mean"] for row in rows[-10:]])
            print(f"staleness {staleness} {correction} seed {seed} step {number + 1}: reward {reward:.3f}", flush=True)
    wanted = ("reward/trajectory/mean", "loss/clip_fraction", "train/grad_norm", "kl/image", "kl/text")
    last = {name: float(np.mean([r[name] for r in rows[-10:] if name in r] or [np.nan])) for name in wanted}
    largest = max(row.get("loss/ratio_max", 1.0) for row in rows)
    cell = {"staleness": staleness, "correction": correction, "seed": seed}
    return cell | {"accuracy": run.accuracy(), "last": last, "ratio_max": largest, "seconds": time.time() - started}


def seconds_per_step(staleness: int, steps: int, overrides: list[str]) -> float:
    """Median of a step of the real pipeline, without its first three."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"run.dir={folder}/run", f"train.steps={steps}", f"max_staleness={staleness}", "evaluate.prompts=null"]
        command = [sys.executable, "launch/grpo.py", "observe.terminal=off", *overrides, *keys]
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["time/step"] for line in lines[3:])


def table(result: dict) -> Table:
    numbers = ("accuracy %", "against 0", "held back %", "largest ratio", "s a step")
    shown = Table("staleness", "correction", "seeds", *numbers)
    runs = result["runs"]
    base = {run["seed"]: run["accuracy"]["accuracy"] for run in runs if run["staleness"] == 0}
    for staleness, correction in dict.fromkeys((run["staleness"], run["correction"]) for run in runs):
        cell = [r for r in runs if (r["staleness"], r["correction"]) == (staleness, correction)]
        values = [100 * run["accuracy"]["accuracy"] for run in cell]
        pairs = [100 * (r["accuracy"]["accuracy"] - base[r["seed"]]) for r in cell if r["seed"] in base]
        seconds = result.get("seconds_per_step", {}).get(str(staleness))
        held_back = [100 * r["last"]["loss/clip_fraction"] for r in cell]
        shown.add_row(
            str(staleness),
            correction if staleness else "any",
            str(len(cell)),
            f"{np.mean(values):.1f} ± {np.std(values):.1f}",
            f"{np.mean(pairs):+.1f}" if staleness and pairs else "",
            f"{np.mean(held_back):.2f}",
            f"{max(run['ratio_max'] for run in cell):.3g}",
            "" if seconds is None else f"{seconds:.2f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--corrections", nargs="+", default=["none", "clipped"], help="values of loss.correction")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--time", type=int, default=0, metavar="N", help="also time N steps of the pipeline")
    parser.add_argument("--json", type=Path, help="where the result goes, after every run")
    parser.add_argument("overrides", nargs="*", help="key=value for every run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {"runs": []}
    if arguments.json and arguments.json.is_file():
        result = json.loads(arguments.json.read_text())
    result |= provenance()
    overrides = [f"train.steps={arguments.steps}", *arguments.overrides]

    def save() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")

    done = {(run["staleness"], run["correction"], run["seed"]) for run in result["runs"]}
    for seed, staleness in product(arguments.seeds, arguments.staleness):
        for correction in arguments.corrections if staleness else arguments.corrections[-1:]:
            if (staleness, correction, seed) not in done:
                result["runs"].append(one(staleness, correction, seed, overrides))
                save()
    for staleness in arguments.staleness if arguments.time else ():
        seconds = seconds_per_step(staleness, arguments.time, arguments.overrides)
        result.setdefault("seconds_per_step", {})[str(staleness)] = seconds
        save()
    Console(width=140).print(table(result))


if __name__ == "__main__":
    main()
