"""The learned judge of edits: the tiny judge, continued on two images and the two questions about them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.editing import FOLLOWING, PRESERVING
from rlpipe.reward.internvl import answer_logits
from rlpipe.reward.question import IMAGE, PLACEHOLDER, around_images
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import edit
from rlpipe.types import Prompt, Sampling
from rlpipe.world.build.judge import JudgeTrainer, balanced_accuracy
from rlpipe.world.build.progress import require
from rlpipe.world.edit_examples import EditCase, EditPool, pool_of_edits
from rlpipe.world.edits import KINDS, all_edits, sample_task
from rlpipe.world.models import VQ_BLOCK
from rlpipe.world.render import render

QUESTIONS = {"following": FOLLOWING, "preserving": PRESERVING}
SHARES = {"following": 0.35, "preserving": 0.65}
"""Of a batch; whether the rest of an image stayed as it was is the slower to learn."""
NUM_COLORS = 12
"""Numbers that tell a block's colours: red, green and blue of its four quarters."""
DIFFERENT = 0.5
"""Difference of a quarter's colour, of the range -1 to 1, from which on a block has changed."""
BATCH = 256
"""Edits drawn at once."""


def extend_vocabulary(
    judge: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int = 0
) -> PreTrainedTokenizerFast:
    """Teach a word-level judge the words of `texts`, in place; returns its tokenizer, old ids and weights unchanged."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for text in texts:
        for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text):
            vocabulary.setdefault(word, len(vocabulary))
    old = judge.get_input_embeddings().num_embeddings
    judge.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for module, std in ((judge.get_input_embeddings(), 0.5), (judge.get_output_embeddings(), 0.02)):
            nn.init.normal_(module.weight[old:], std=std)
    roles = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token, "unk_token": tokenizer.unk_token}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **roles)


def question_texts() -> list[str]:
    """Everything that is said to a judge of edits."""
    asked = [question.replace(IMAGE, " ").replace(PLACEHOLDER, " ") for question in QUESTIONS.values()]
    return [*asked, *(e.text for kind in KINDS for e in all_edits(kind))]


def block_colors(images: np.ndarray) -> torch.Tensor:
    """float32 [N, 36, 12] in [-1, 1]: the mean colours of the quarters of every 8 x 8 block of uint8 [N, 48, 48, 3]."""
    side, half = images.shape[1] // VQ_BLOCK, VQ_BLOCK // 2
    parts = torch.from_numpy(images).float().reshape(-1, side, 2, half, side, 2, half, 3).mean((3, 6))
    return parts.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2) / 127.5 - 1


class EditJudgeTrainer(JudgeTrainer):
    """Trains an InternVL on both questions about source and edited image, classes balanced; the tower stays as it is.

    Both questions ask for a comparison, and answers with reasons are few bits to find one by. So every block of the
    edited image, half-way up the language model, also has to tell the colours of the same block of the source and
    whether it differs; the head that says so is dropped afterwards.

    pools:  (pool, share of a batch). shares: of a batch, by question.
    """

    def __init__(
        self,
        judge,
        tokenizer,
        pools: list[tuple[EditPool, float]],
        seed: int = 7,
        shares: Mapping[str, float] = SHARES,
    ) -> None:
        super().__init__(judge, tokenizer, [], seed)
        layers = judge.model.language_model.layers
        torch.manual_seed(seed)
        self.head = nn.Linear(judge.config.text_config.hidden_size, NUM_COLORS + 1)
        self.middle: torch.Tensor | None = None
        layers[len(layers) // 2 - 1].register_forward_hook(self._keep)
        self.asked = []
        for pool, share in pools:
            for name in QUESTIONS:
                cases = {t: [c for c in pool.cases if getattr(c.verdict, name) == t] for t in (True, False)}
                self.groups.append((pool, cases, share * shares[name]))
                self.asked.append(name)

    def _batch(self, size: int) -> tuple[list[tuple[str, ...]], list[list[int]], np.ndarray, torch.Tensor]:
        """Questions, answers in token ids, images uint8 [2 B, H, W, 3] (source, edited, ...), truth bool [B]."""
        questions, answers, images, truth = [], [], [], []
        for name, (pool, cases, share) in zip(self.asked, self.groups, strict=True):
            for correct in (True, False):
                for i in self.rng.integers(len(cases[correct]), size=self._count(size, share, correct)):
                    case = cases[correct][i]
                    questions.append(around_images(QUESTIONS[name], case.edit.text, 2))
                    answers.append(self._said(getattr(case.verdict, f"{name}_reason")))
                    images += [pool.sources[case.index], pool.images[case.index]]
                    truth.append(correct)
        return questions, answers, np.stack(images), torch.tensor(truth)

    def _keep(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.middle = output if torch.is_tensor(output) else output[0]

    def _parameters(self) -> list[nn.Parameter]:
        return [*super()._parameters(), *self.head.parameters()]

    def _loss(self, questions: list[tuple[str, ...]], answers: list[list[int]], images: np.ndarray) -> tuple:
        """The loss of the answers and that of the comparison, and the verdict's logits [B, V]."""
        loss, logits = super()._loss(questions, answers, images)
        ids, _ = self.format.encode(questions)
        rows, places = (ids == self.judge.config.image_token_id).nonzero(as_tuple=True)
        blocks = len(places) // len(images)
        edited = places.view(-1, 2, blocks)[:, 1], rows.view(-1, 2, blocks)[:, 1]
        told = self.head(self.middle[edited[1], edited[0]]).float()  # [B, 36, 13]
        colors = block_colors(images).view(-1, 2, blocks, NUM_COLORS)
        source, differs = colors[:, 0], ((colors[:, 0] - colors[:, 1]).abs().amax(-1) > DIFFERENT).float()
        comparison = F.binary_cross_entropy_with_logits(told[..., -1], differs)
        return loss + F.mse_loss(told[..., :-1], source) + comparison, logits

    def _said(self, reason: str) -> list[int]:
        verdict, _, words = reason.partition(",")
        return self.format.tokenizer.encode(f"{verdict.lower()},{words}", add_special_tokens=False)

    @torch.no_grad()
    def p_yes(self, name: str, pool: EditPool, cases: list[EditCase]) -> np.ndarray:
        """P(yes) of one question for every case, float [len(cases)]."""
        answers = []
        for start in range(0, len(cases), 128):
            part = cases[start : start + 128]
            ids, mask = self.format.encode([around_images(QUESTIONS[name], c.edit.text, 2) for c in part])
            images = np.stack([x for c in part for x in (pool.sources[c.index], pool.images[c.index])])
            logits = answer_logits(self.judge, ids, mask, self.format.pixels(images))
            answers.append(self.format.p_yes(logits).numpy())
        return np.concatenate(answers)

    def test_edits(self, stage: str, pool: EditPool, bar: float) -> None:
        """Print the agreement with the checker on each question; refuse to go on if balanced it is below `bar`."""
        for name in QUESTIONS:
            truth = np.array([getattr(case.verdict, name) for case in pool.cases])
            says = self.p_yes(name, pool, pool.cases) > 0.5
            print(f"[{stage}] {name}: yes of right {says[truth].mean():.4f}, no of wrong {(~says[~truth]).mean():.4f}")
            require(stage, f"{name}, balanced agreement", balanced_accuracy(says, truth), bar)


def drawn_edits(policy: JanusPolicy, count: int, seed: int, split: str = "train", group: int = 2) -> EditPool:
    """Edits that the policy drew, `group` of each task, under their own instruction and one that is near it."""
    rng, decoder = random.Random(seed), Decoder(policy)
    tasks = [task for _ in range(count // group) for task in [sample_task(rng, split)] * group]
    images = []
    for start in range(0, len(tasks), BATCH):
        part = tasks[start : start + BATCH]
        prompts = [Prompt(str(start + i), task.edit.text, task.edit.metadata) for i, task in enumerate(part)]
        samplings = [Sampling(seed=rng.getrandbits(31)) for _ in part]
        sources = [render(task.source) for task in part]
        rollouts = edit(decoder, prompts, sources, samplings, [prompt.id for prompt in prompts])
        images += [rollout.images[0] for rollout in rollouts]
        print(f"[drawn] {len(images)}/{len(tasks)} edits", flush=True)
    return pool_of_edits(tasks, np.stack(images), seed + 1)
