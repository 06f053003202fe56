"""Training a judge of edits, on a small random InternVL of the real class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.editing import EditingJudge
from rlpipe.types import Prompt, ScoreRequest
from rlpipe.world.build.edit import EditJudgeTrainer, block_colors, extend_vocabulary, question_texts
from rlpipe.world.edit_examples import EditPool, edited_pool
from rlpipe.world.models import build_judge


@pytest.fixture(scope="module")
def pool() -> EditPool:
    return edited_pool(JanusPolicy.load("rlpipe/world/assets/policy"), 60, seed=5)


@pytest.fixture
def trainer(pool) -> EditJudgeTrainer:
    judge, tokenizer = build_judge(layers=2, vision_layers=1)
    return EditJudgeTrainer(judge, extend_vocabulary(judge, tokenizer, question_texts()), [(pool, 1.0)])


def test_a_batch_has_both_questions_in_their_shares_both_answers_equally_and_two_images_a_row(trainer):
    questions, answers, images, truth = trainer._batch(40)
    assert len(questions) == len(answers) == len(truth) == 40 and len(images) == 80
    asked = {"Does the edited image follow the editing instructions?": 14, "remain consistent with the original": 26}
    for words, count in asked.items():
        assert sum(words in question[-1] for question in questions) == count
    assert truth.tolist() == [True] * 7 + [False] * 7 + [True] * 13 + [False] * 13
    first = {tuple(answer[:1]) for answer, true in zip(answers, truth, strict=True) if true}
    assert first == {tuple(trainer.format.tokenizer.encode("yes", add_special_tokens=False))}


def test_the_colours_of_a_block_are_those_of_its_quarters():
    image = np.zeros((1, 48, 48, 3), np.uint8)
    image[0, 8:12, 20:24, 1] = 255  # row 1, column 2 of the blocks; upper right quarter; green
    colors = block_colors(image)
    assert colors.shape == (1, 36, 12)
    assert colors[0, 8].tolist() == [-1, -1, -1, -1, 1, -1] + [-1] * 6
    assert (colors == 1).sum() == 1


def test_training_moves_the_language_model_and_not_the_tower_and_the_result_is_a_scorer(trainer, pool, tmp_path):
    before = {name: p.detach().clone() for name, p in trainer.judge.named_parameters()}
    trainer.train("test", steps=2, batch=8)
    moved = {name for name, p in trainer.judge.named_parameters() if not torch.equal(p, before[name])}
    assert any("language_model" in name for name in moved) and not any("vision_tower" in name for name in moved)
    trainer.save(tmp_path)
    case = pool.cases[0]
    request = ScoreRequest("", Prompt("", case.edit.text), pool.images[case.index], pool.sources[case.index])
    parts = EditingJudge(tmp_path).score([request])[0].parts
    for name in ("following", "preserving"):
        assert parts[name] == pytest.approx(float(trainer.p_yes(name, pool, [case])[0]), abs=0.02)  # saved as bfloat16


def test_the_loss_of_answers_and_comparison_falls_on_one_batch(trainer):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(trainer._parameters(), lr=2e-3)
    batch = trainer._batch(8)
    losses = []
    for _ in range(12):
        loss, logits = trainer._loss(*batch[:3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trainer.head.weight.grad.abs().sum() > 0 and logits.shape[0] == 8
    assert losses[-1] < 0.7 * losses[0]
