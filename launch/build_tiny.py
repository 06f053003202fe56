"""Rebuild the tiny world's checkpoints and prompt files from nothing: `python launch/build_tiny.py --work DIR`.

Stages, each resumable (a finished stage's files in the work folder are not made again), each with the accuracy that
it must reach: vq, pools, tower, judge, base, drawn, judge_drawn, sft, verdict, own, verdict_own, judge_own. The result
lands in rlpipe/world/assets.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from rlpipe.config import SftSection
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.agreement import balanced_accuracy
from rlpipe.evaluate.near_miss import near_miss_cases, near_miss_verdicts
from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.internvl import load as load_judge
from rlpipe.rollout.decoder import Decoder
from rlpipe.types import Sampling
from rlpipe.world.build.judge import JudgeTrainer
from rlpipe.world.build.policy import drawn_pool, measure, train
from rlpipe.world.build.progress import require, run_stages
from rlpipe.world.build.tower import train_tower
from rlpipe.world.build.vq import train_vq
from rlpipe.world.examples import WorldExamples
from rlpipe.world.models import build_judge, build_policy
from rlpipe.world.pool import Pair, Pool, corrections, near_miss_pairs, own_pairs, rendered_pool, spliced_pool
from rlpipe.world.prompts import write_prompts

ASSETS = Path(__file__).resolve().parent.parent / "rlpipe/world/assets"
SAMPLING = Sampling(max_reflection_tokens=20)
TRAINING_PROMPTS = {
    "single_object": 80,
    "two_object": 300,
    "counting": 400,
    "colors": 120,
    "position": 500,
    "color_attr": 500,
}
"""Rows by kind. Reinforcement learns nothing from a prompt whose every image is right, so the easy kinds are few."""
LANGUAGE = ["language_model", "aligner", "generation_embeddings", "generation_aligner", "generation_head", "lm_head"]


class Build:
    """The stages; each reads and writes files of `work` alone."""

    def __init__(self, work: Path, assets: Path) -> None:
        self.work, self.assets = work, assets

    def vq(self) -> None:
        """The VQ tokenizer, in a policy that is otherwise random."""
        policy = build_policy()
        train_vq(policy)
        policy.save(self.work / "vq")

    def pools(self) -> None:
        """Round trips of renders and of spliced codes, with what the checker sees in them."""
        policy = JanusPolicy.load(self.work / "vq")
        rendered = rendered_pool(policy, 20_000, wrong_share=0.3, seed=11)
        rendered.save(self.work / "rendered.npz")
        wrong = rendered_pool(policy, 12_000, wrong_share=1.0, seed=12)
        wrong.save(self.work / "wrong.npz")
        np.save(self.work / "wrong_corrections.npy", corrections(policy, wrong, range(len(wrong)), 13))
        spliced_pool(policy, rendered, seed=14).save(self.work / "spliced.npz")

    def tower(self) -> None:
        """Both vision towers, the policy's and the judge's."""
        pool = Pool.join([Pool.load(self.work / f"{name}.npz") for name in ("rendered", "wrong", "spliced")])
        policy = JanusPolicy.load(self.work / "vq")
        vision = policy.janus.model.vision_model

        def policy_features(images: torch.Tensor) -> torch.Tensor:
            return vision(policy.normalise(images)).last_hidden_state

        train_tower("policy tower", policy_features, vision, pool)
        policy.save(self.work / "tower")
        judge, tokenizer = build_judge()
        trainer = JudgeTrainer(judge, tokenizer, [])

        def judge_features(images: torch.Tensor) -> torch.Tensor:
            return judge.model.vision_tower(pixel_values=trainer.format.pixels(images)).last_hidden_state[:, 1:]

        train_tower("judge tower", judge_features, judge.model.vision_tower, pool)
        trainer.save(self.work / "judge_tower")

    def base(self) -> None:
        """Drawing from a prompt, and redrawing with the smallest change, from renders alone."""
        rendered, wrong = Pool.load(self.work / "rendered.npz"), Pool.load(self.work / "wrong.npz")
        correction = np.load(self.work / "wrong_corrections.npy")
        templates = JanusPolicy.load(self.work / "tower").templates
        examples = WorldExamples(rendered, wrong, correction, templates, SAMPLING, seed=15, correction_share=1.0)
        mix = SftSection(draw=0.65, judge=0.0, redraw=0.35)
        policy = train("base", self.work / "tower", examples, mix, steps=1700, lr=2e-3, trainable=LANGUAGE)
        policy.save(self.work / "base")
        self._accuracy("base", "base", "without", 0.35)

    def drawn(self) -> None:
        """Images that the base policy draws, and their smallest corrections."""
        policy = JanusPolicy.load(self.work / "base")
        pool = drawn_pool(policy, 12_000, seed=16)
        print(f"[drawn] right: {pool.correct.mean():.3f}", flush=True)
        pool.save(self.work / "drawn.npz")
        np.save(self.work / "corrections.npy", corrections(policy, pool, range(len(pool)), 17))

    def judge(self) -> None:
        """The learned judge, on renders and splices."""
        rendered, spliced = Pool.load(self.work / "rendered.npz"), Pool.load(self.work / "spliced.npz")
        both = Pool.join([rendered, spliced])
        groups = [
            (spliced, own_pairs(spliced), 0.35),
            (rendered, own_pairs(rendered), 0.15),
            (both, near_miss_pairs(both, seed=18), 0.5),
        ]
        trainer = JudgeTrainer(*load_judge(self.work / "judge_tower"), groups)
        trainer.train("judge", steps=1600, lr=1e-3)
        trainer.save(self.work / "judge")

    def judge_drawn(self) -> None:
        """The learned judge, on what the base policy draws."""
        groups = self._judge_groups(Pool.load(self.work / "drawn.npz"), own=0.4, near=0.35)
        trainer = JudgeTrainer(*load_judge(self.work / "judge"), groups)
        for steps in (1600, 1200):
            trainer.train("judge drawn", steps=steps, lr=1e-3)
        trainer.save(self.work / "judge_drawn")

    def _judge_groups(self, drawn: Pool, own: float, near: float) -> list[tuple[Pool, list[Pair], float]]:
        """Drawn images under their own prompt and under near misses, and a quarter of spliced ones, likewise."""
        spliced = Pool.load(self.work / "spliced.npz")
        shares = ((drawn, own, near), (spliced, 0.1, 0.15))
        groups = []
        for pool, share, near_share in shares:
            groups += [(pool, own_pairs(pool), share), (pool, near_miss_pairs(pool, seed=22), near_share)]
        return groups

    def sft(self) -> None:
        """The three skills together, on renders and on the policy's own images."""
        mix = SftSection(draw=0.22, judge=0.5, redraw=0.28)
        policy = train("sft", self.work / "base", self._examples(), mix, steps=1700, lr=1e-3, trainable=LANGUAGE)
        policy.save(self.work / "sft", dtype=torch.bfloat16)
        self._accuracy("sft", "sft", "with", 0.55)

    def verdict(self) -> None:
        """More of the same with judging foremost: it is the skill that takes longest. Two passes, each cooled down."""
        self._judging("sft", "verdict_0", steps=900, drawn="drawn")
        self._judging("verdict_0", "verdict_1", steps=700, drawn="drawn")
        self._accuracy("verdict", "verdict_1", "with", 0.55)

    def own(self) -> None:
        """Images that the policy itself draws, and their smallest corrections.

        Half of them with guidance: sharper ones, nearer to those that reinforcement leads to.
        """
        policy = JanusPolicy.load(self.work / "verdict_1")
        pool = drawn_pool(policy, 16_000, seed=31, guidance=(1.0, 2.0))
        pool.save(self.work / "own.npz")
        np.save(self.work / "own_corrections.npy", corrections(policy, pool, range(len(pool)), 17))

    def verdict_own(self) -> None:
        """Judging once more, on its own images: the mistakes that it will meet."""
        policy = self._judging("verdict_1", "verdict_2", steps=900, drawn="own")
        self._accuracy("verdict own", "verdict_2", "with", 0.55)
        decoder = Decoder(JanusPolicy.load(self.work / "verdict_2"))
        prompts = load_prompts(self.assets / "prompts_test.jsonl")
        cases = near_miss_verdicts(decoder, near_miss_cases(decoder, prompts, seed=21))
        value = balanced_accuracy([c.said_yes for c in cases], [c.truth for c in cases])
        require("verdict own", "verdict on near misses, balanced", value or 0.0, 0.85)
        policy.save(self.assets / "policy", dtype=torch.bfloat16)

    def judge_own(self) -> None:
        """The learned judge, on what the policy draws; agreement is measured on held-out prompts. Strict in the end."""
        groups = self._judge_groups(Pool.load(self.work / "own.npz"), own=0.45, near=0.3)
        judge, tokenizer = load_judge(self.work / "judge_drawn")
        JudgeTrainer(judge, tokenizer, groups).train("judge own", steps=1400, lr=1e-3)
        trainer = JudgeTrainer(judge, tokenizer, groups, seed=8, wrong_share=0.65)
        trainer.train("judge own, strict", steps=1200, lr=1e-3)
        held_out = drawn_pool(JanusPolicy.load(self.assets / "policy"), 1_600, seed=19, split="test")
        trainer.test("judge own", held_out, own_pairs(held_out), 0.92, 0.90)
        trainer.save(self.assets / "judge")

    def _judging(self, source: str, target: str, steps: int, drawn: str) -> JanusPolicy:
        mix = SftSection(draw=0.07, judge=0.75, redraw=0.18)
        examples = self._examples(drawn)
        policy = train("verdict", self.work / source, examples, mix, steps=steps, lr=8e-4, trainable=LANGUAGE)
        policy.save(self.work / target, dtype=torch.bfloat16)
        return policy

    def _examples(self, name: str = "drawn") -> WorldExamples:
        rendered, drawn = Pool.load(self.work / "rendered.npz"), Pool.load(self.work / f"{name}.npz")
        correction = np.load(self.work / ("corrections.npy" if name == "drawn" else f"{name}_corrections.npy"))
        templates = JanusPolicy.load(self.work / "base").templates
        return WorldExamples(rendered, drawn, correction, templates, SAMPLING, seed=20, correction_share=1.0)

    def _accuracy(self, stage: str, path: str | Path, column: str, bar: float) -> None:
        policy = JanusPolicy.load(self.work / path)
        _, row = measure(policy, load_prompts(self.assets / "prompts_test.jsonl"), SAMPLING)
        for name in ("without", "with", "fresh"):
            print(f"[{stage}] held-out accuracy {name}: {row[name]['accuracy']:.3f}", flush=True)
        print(f"[{stage}] verdict: {row['verdict']}  repaired {row['repaired']}  damaged {row['damaged']}", flush=True)
        require(stage, f"held-out accuracy {column} introspection", row[column]["accuracy"], bar)


def main() -> None:
    first = ("vq", "pools", "tower", "judge", "base", "drawn", "judge_drawn", "sft")
    stages = (*first, "verdict", "own", "verdict_own", "judge_own")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what lies between the stages")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder of the result")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.assets.mkdir(parents=True, exist_ok=True)
    write_prompts(arguments.assets / "prompts_train.jsonl", "train", TRAINING_PROMPTS, seed=1)
    write_prompts(arguments.assets / "prompts_test.jsonl", "test", 100, seed=2)
    build = Build(arguments.work.resolve(), arguments.assets.resolve())
    run_stages(build, arguments.work, arguments.stages)


if __name__ == "__main__":
    main()
