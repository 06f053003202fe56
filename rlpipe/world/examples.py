"""Supervised examples of the tiny world, drawn from pools of images whose truth is known."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlpipe.data.sft import draw_item, judge_item, redraw_item
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.templates import Templates
from rlpipe.types import Prompt, Sampling, TrainItem
from rlpipe.world.pool import Pair, Pool, corrections, near_miss_pairs, own_pairs, rendered_pool, spliced_pool
from rlpipe.world.prompts import PromptSpec


@dataclass(frozen=True)
class JudgeMix:
    """Shares of the pairs in a judging batch; what is left are drawn (or spliced) images under their own prompt."""

    rendered: float = 0.25
    near_miss: float = 0.30


class WorldExamples:
    """Draws, judgements (classes balanced) and redraws.

    rendered:   round trips of renders; the right ones are what is to be drawn.
    drawn:      images that a policy drew, or spliced ones where there are none yet.
    correction: int64 [N, 36] per drawn image, the smallest change that makes it right.
    correction_share: how many redraws aim at the smallest change; the others at any right image of the prompt.
    """

    def __init__(
        self,
        rendered: Pool,
        drawn: Pool,
        correction: np.ndarray | None,
        templates: Templates,
        sampling: Sampling,
        seed: int,
        correction_share: float = 0.5,
        mix: JudgeMix = JudgeMix(),
    ) -> None:
        self.pool = Pool.join([rendered, drawn])
        self.templates, self.sampling, self.mix = templates, sampling, mix
        self.correction_share = correction_share if correction is not None else 0.0
        self.correction = correction
        self.first_drawn = len(rendered)
        pairs = own_pairs(self.pool)
        self.rendered_pairs = _by_truth(pairs[: self.first_drawn])
        self.drawn_pairs = _by_truth(pairs[self.first_drawn :])
        self.near_misses = _by_truth(near_miss_pairs(self.pool, seed))
        self.right = np.flatnonzero(self.pool.correct[: self.first_drawn])
        self.right_of: dict[PromptSpec, list[int]] = defaultdict(list)
        for index in np.flatnonzero(self.pool.correct):
            self.right_of[self.pool.specs[index]].append(int(index))
        wrong = self.first_drawn + np.flatnonzero(~drawn.correct)
        self.wrong = np.array([i for i in wrong if self.pool.specs[i] in self.right_of])
        self._answers: dict[str, np.ndarray] = {}

    @classmethod
    def prepare(cls, folder: str, policy_path: str, count: int, sampling: Sampling, seed: int) -> WorldExamples:
        """Read rendered.npz, drawn.npz and corrections.npy of `folder`; without one, make them without a policy."""
        policy = JanusPolicy.load(policy_path)
        if folder:
            path = Path(folder)
            missing = [n for n in ("rendered.npz", "drawn.npz", "corrections.npy") if not (path / n).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"sft.data: {path.resolve()} has no labels/ and lacks {', '.join(missing)}; leave it empty to "
                    "generate examples"
                )
            rendered, drawn = Pool.load(path / "rendered.npz"), Pool.load(path / "drawn.npz")
            correction = np.load(path / "corrections.npy", allow_pickle=False)
        else:
            rendered = rendered_pool(policy, count, wrong_share=0.4, seed=seed)
            drawn = spliced_pool(policy, rendered, seed + 1)
            correction = corrections(policy, drawn, range(len(drawn)), seed + 2)
        return cls(rendered, drawn, correction, policy.templates, sampling, seed)

    def _prompt(self, spec: PromptSpec, index: int) -> Prompt:
        return Prompt(f"sft-{index}", spec.text, spec.metadata)

    def _answer(self, reason: str) -> np.ndarray:
        if reason not in self._answers:
            ids = self.templates.reflection(reason)
            if len(ids) > self.sampling.max_reflection_tokens:
                raise ValueError(
                    f"rollout.max_reflection_tokens: {self.sampling.max_reflection_tokens} is below the "
                    f"{len(ids)} tokens of {reason!r}; raise it"
                )
            self._answers[reason] = np.array(ids)
        return self._answers[reason]

    def draw(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        indices = rng.choice(self.right, count)
        return [draw_item(self._prompt(self.pool.specs[i], i), self.pool.codes[i], self.sampling) for i in indices]

    def judge(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        rendered, missed = int(count * self.mix.rendered), int(count * self.mix.near_miss)
        pairs = _balanced(self.drawn_pairs, rng, count - rendered - missed)
        pairs += _balanced(self.rendered_pairs, rng, rendered) + _balanced(self.near_misses, rng, missed)
        return [self._judgement(pair) for pair in pairs]

    def _judgement(self, pair: Pair) -> TrainItem:
        codes, image = self.pool.codes[pair.image], self.pool.images[pair.image]
        prompt, answer = self._prompt(pair.spec, pair.image), self._answer(pair.reason)
        return judge_item(prompt, codes, image, answer, pair.correct, self.sampling)

    def redraw(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        items = []
        for index in rng.choice(self.wrong, count):
            spec = self.pool.specs[index]
            if rng.random() < self.correction_share:
                target = self.correction[index - self.first_drawn]
            else:
                target = self.pool.codes[rng.choice(self.right_of[spec])]
            answer = self._answer(self.pool.reasons[index])
            items.append(redraw_item(self._prompt(spec, index), self.pool.codes[index], answer, target, self.sampling))
        return items


def _by_truth(pairs: list[Pair]) -> dict[bool, list[Pair]]:
    return {truth: [p for p in pairs if p.correct == truth] for truth in (True, False)}


def _balanced(pairs: dict[bool, list[Pair]], rng: np.random.Generator, count: int) -> list[Pair]:
    right = rng.integers(len(pairs[True]), size=count // 2)
    wrong = rng.integers(len(pairs[False]), size=count - count // 2)
    return [pairs[True][i] for i in right] + [pairs[False][i] for i in wrong]
