"""Everything that editing in the tiny world needs, from the shipped checkpoints: `python launch/build_edits.py`.

Stages, each resumable (a finished stage's files in the work folder are not made again): prompts, pairs, judge, sft,
drawn, judge_drawn. Afterwards `python launch/grpo.py --config configs/tiny_edit_grpo.yaml` has all that it reads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from rlpipe.config import load_config
from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.internvl import load as load_judge
from rlpipe.world.build.edit import EditJudgeTrainer, drawn_edits, extend_vocabulary, question_texts
from rlpipe.world.build.progress import run_stages
from rlpipe.world.edit_examples import EditPool, edited_pool
from rlpipe.world.edits import write_edits

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "rlpipe/world/assets"
BAR = 0.90
"""Balanced agreement with the checker that the judge must reach on each question, held-out instructions."""


class Build:
    """The stages; each reads and writes files of `work` alone."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def prompts(self) -> None:
        """Prompt files, source images and supervised pairs."""
        write_edits(self.work / "data")

    def pairs(self) -> None:
        """Edits of renders: right, left undone, wrong, with damage; and what the checker says of them."""
        policy = JanusPolicy.load(ASSETS / "policy")
        edited_pool(policy, 16_000, seed=41).save(self.work / "edited.npz")
        edited_pool(policy, 1_200, seed=42, split="test").save(self.work / "edited_test.npz")

    def judge(self) -> None:
        """The judge of edits, from the shipped judge, on those."""
        judge, tokenizer = load_judge(ASSETS / "judge")
        tokenizer = extend_vocabulary(judge, tokenizer, question_texts())
        trainer = EditJudgeTrainer(judge, tokenizer, [(EditPool.load(self.work / "edited.npz"), 1.0)])
        trainer.train("judge", steps=2400, lr=1e-3, batch=40)
        trainer.save(self.work / "judge_rendered")

    def sft(self) -> None:
        """The policy learns to edit, from the shipped policy."""
        paths = (f"run.dir={self.work / 'sft'}", f"sft.edits={self.work / 'data/sft.jsonl'}")
        command = [sys.executable, "launch/sft.py", "--config", "configs/tiny_edit_sft.yaml", *paths]
        subprocess.run(command, cwd=ROOT, check=True)

    def drawn(self) -> None:
        """Edits that this policy draws, of training instructions and of held-out ones."""
        # Its templates are the configuration's.
        config = load_config("configs/tiny_edit_grpo.yaml", [f"policy.path={self.work / 'sft/policy'}"])
        policy = JanusPolicy.from_config(config)
        drawn_edits(policy, 10_000, seed=43).save(self.work / "drawn.npz")
        drawn_edits(policy, 1_600, seed=44, split="test").save(self.work / "drawn_test.npz")

    def judge_drawn(self) -> None:
        """The judge of edits, on what the policy draws."""
        pools = [(EditPool.load(self.work / "drawn.npz"), 0.65), (EditPool.load(self.work / "edited.npz"), 0.35)]
        # Whether an instruction is followed is now the harder question: the policy's mistakes are smaller than ours.
        shares = {"following": 0.5, "preserving": 0.5}
        trainer = EditJudgeTrainer(*load_judge(self.work / "judge_rendered"), pools, seed=8, shares=shares)
        trainer.train("judge drawn", steps=1000, lr=8e-4, batch=40)
        trainer.save(self.work / "judge")
        for name in ("edited_test", "drawn_test"):
            trainer.test_edits(name, EditPool.load(self.work / f"{name}.npz"), BAR)


def main() -> None:
    stages = ("prompts", "pairs", "judge", "sft", "drawn", "judge_drawn")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/tiny_edit", help="folder of all results")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build = Build(arguments.work.resolve())
    build.work.mkdir(parents=True, exist_ok=True)
    run_stages(build, build.work, arguments.stages)


if __name__ == "__main__":
    main()
