"""The learned judge: an InternVL trained on the checker's answers about renders, splices and drawn images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from rlpipe.reward.internvl import JudgeFormat, answer_logits
from rlpipe.world.build.progress import Meter, learning_rates, optimise, require
from rlpipe.world.models import JUDGE_QUESTION
from rlpipe.world.pool import Pair, Pool


def balanced_accuracy(says_yes: np.ndarray, truth: np.ndarray) -> float:
    return float(0.5 * (says_yes[truth].mean() + (~says_yes[~truth]).mean()))


REASON_WEIGHT = 0.5


class JudgeTrainer:
    """Trains an InternVL's language model and projector to say yes or no, and why; the tower stays as it is.

    The words after the answer are never asked for later. They are there because they teach where to look: from the
    bare answer, one bit an image, a model of this size learns several times more slowly.

    groups:      lists of (pool, pairs, share of a batch).
    wrong_share: share of "no" in every group. A defect is harder to see than its absence, so a judge of balanced
                 classes says "yes" too often, and a policy learns to draw what it lets pass.
    """

    def __init__(
        self,
        judge,
        tokenizer,
        groups: list[tuple[Pool, list[Pair], float]],
        seed: int = 7,
        wrong_share: float = 0.5,
    ) -> None:
        self.judge, self.format = judge, JudgeFormat(tokenizer, judge.config)
        self.groups = [
            (pool, {t: [p for p in pairs if p.correct == t] for t in (True, False)}, share)
            for pool, pairs, share in groups
        ]
        self.shares = {True: 1 - wrong_share, False: wrong_share}
        self.rng = np.random.default_rng(seed)

    def _batch(self, size: int) -> tuple[list[str], list[list[int]], np.ndarray, torch.Tensor]:
        """Questions, answers in token ids, images uint8 [B, H, W, 3], truth bool [B]."""
        questions, answers, images, truth = [], [], [], []
        for pool, pairs, share in self.groups:
            for correct in (True, False):
                count = self._count(size, share, correct)
                for i in self.rng.integers(len(pairs[correct]), size=count):
                    pair = pairs[correct][i]
                    questions.append(JUDGE_QUESTION.replace("{prompt}", pair.spec.text))
                    answers.append(self._answer(pair))
                    images.append(pool.images[pair.image])
                    truth.append(correct)
        return questions, answers, np.stack(images), torch.tensor(truth)

    def _count(self, size: int, share: float, correct: bool) -> int:
        return max(1, round(size * share * self.shares[correct]))

    def _answer(self, pair: Pair) -> list[int]:
        """yes or no, then the reason's words: "no, the circle is blue, not red."."""
        verdict, _, reason = pair.reason.partition(",")
        return self.format.tokenizer.encode(f"{verdict.lower()},{reason}", add_special_tokens=False)

    def _loss(self, questions: list[str], answers: list[list[int]], images: np.ndarray) -> tuple:
        """Cross-entropy of verdict and reason, and the verdict's logits [B, V]."""
        ids, mask = self.format.encode(questions)
        lengths, counts = mask.sum(1), torch.tensor([len(answer) for answer in answers])
        longest = int(counts.max())
        ids = torch.cat([ids, ids.new_zeros(len(ids), longest)], dim=1)
        offsets = torch.arange(longest)
        targets = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, answer in enumerate(answers):
            targets[row, : len(answer)] = torch.tensor(answer)
            ids[row, lengths[row] : lengths[row] + len(answer)] = torch.tensor(answer)
        hidden = self.judge.model(input_ids=ids, pixel_values=self.format.pixels(images), use_cache=False)
        read = (lengths[:, None] - 1 + offsets).unsqueeze(-1).expand(-1, -1, hidden.last_hidden_state.shape[-1])
        logits = self.judge.lm_head(hidden.last_hidden_state.gather(1, read)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        reason = (offsets > 0) & (offsets < counts[:, None])
        return loss[:, 0].mean() + REASON_WEIGHT * loss[reason].mean(), logits[:, 0]

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.judge.parameters() if p.requires_grad]

    def train(self, name: str, steps: int, lr: float = 1e-3, batch: int = 64) -> None:
        self.judge.requires_grad_(True).train()
        self.judge.model.vision_tower.requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(self._parameters(), betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        meter = Meter(name, steps, every=100)
        for step, rate in enumerate(learning_rates(steps, lr), start=1):
            questions, answers, images, truth = self._batch(batch)
            with torch.autocast("cpu", torch.bfloat16):
                loss, logits = self._loss(questions, answers, images)
            optimise(loss, optimizer, rate)
            right = (self.format.p_yes(logits.detach()) > 0.5) == truth
            values, start = {"loss": loss.item()}, 0
            for number, (_, _, share) in enumerate(self.groups):
                stop = start + sum(self._count(batch, share, correct) for correct in (True, False))
                values[f"group_{number}"] = right[start:stop].float().mean().item()
                start = stop
            meter.update(step, **values)
        self.judge.eval()

    @torch.no_grad()
    def says_yes(self, pool: Pool, pairs: list[Pair]) -> np.ndarray:
        """bool [len(pairs)]."""
        answers = []
        for start in range(0, len(pairs), 256):
            part = pairs[start : start + 256]
            ids, mask = self.format.encode([JUDGE_QUESTION.replace("{prompt}", p.spec.text) for p in part])
            pixels = self.format.pixels(np.stack([pool.images[p.image] for p in part]))
            answers.append((self.format.p_yes(answer_logits(self.judge, ids, mask, pixels)) > 0.5).numpy())
        return np.concatenate(answers)

    def test(self, name: str, pool: Pool, pairs: list[Pair], bar: float, balanced_bar: float) -> None:
        says, truth = self.says_yes(pool, pairs), np.array([p.correct for p in pairs])
        require(name, "agreement with the checker", float((says == truth).mean()), bar)
        require(name, "balanced agreement", balanced_accuracy(says, truth), balanced_bar)

    def save(self, path: str | Path) -> None:
        state = {k: v.to(torch.bfloat16).contiguous() for k, v in self.judge.state_dict().items()}
        self.judge.save_pretrained(path, state_dict=state)
        self.format.tokenizer.save_pretrained(path)
