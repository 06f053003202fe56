"""Measuring edits with the real program on a small random policy, and the table made of the records."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from rich.console import Console

from rlpipe.evaluate.editing import EditOutcome, evaluate_edits, print_edit_table, summarise_edits
from rlpipe.rollout.decoder import Decoder
from rlpipe.types import Prompt, Sampling, Score
from rlpipe.world.edits import KINDS, check_edit, sample_task
from rlpipe.world.render import render


@pytest.fixture(scope="module")
def decoder(tiny_policy) -> Decoder:
    return Decoder(tiny_policy)


def rows(count: int) -> tuple[list[Prompt], list[np.ndarray]]:
    rng = random.Random(0)
    tasks = [sample_task(rng, "test", KINDS[i % 4]) for i in range(count)]
    prompts = [Prompt(f"p{i}", task.edit.text, task.edit.metadata) for i, task in enumerate(tasks)]
    return prompts, [render(task.source) for task in tasks]


def test_outcomes_do_not_depend_on_the_batch_and_change_with_the_seed(decoder):
    prompts, sources = rows(6)
    seen = []

    def check(metadata, source, image):
        seen.append((metadata["edit"]["kind"], source.tobytes(), image.tobytes()))
        return check_edit(metadata, source, image)

    for size, seed in ((6, 1), (2, 1), (6, 2)):
        outcomes = evaluate_edits(decoder, prompts, sources, check, Sampling(), seed, size)
        assert [o.prompt_id for o in outcomes] == [p.id for p in prompts]
        assert [o.tag for o in outcomes] == [*KINDS, *KINDS[:2]]
    assert seen[:6] == seen[6:12] and seen[:6] != seen[12:]
    assert [source for _, source, _ in seen[:6]] == [source.tobytes() for source in sources]


def test_the_judge_is_shown_source_and_edited_image_and_its_parts_are_kept(decoder):
    prompts, sources = rows(4)

    def judge(requests):
        for request, prompt, source in zip(requests, prompts, sources, strict=True):
            assert request.prompt == prompt and (request.source == source).all()
            assert request.image.shape == source.shape and (request.image != source).any()
        parts = [{"following": 0.1 * i, "preserving": 0.5} for i in range(len(requests))]
        return [Score(r.id, 1.0, p) for r, p in zip(requests, parts, strict=True)]

    outcomes = evaluate_edits(decoder, prompts, sources, check_edit, Sampling(), judge=judge)
    assert [o.following_score for o in outcomes] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {o.preserving_score for o in outcomes} == {0.5}


def outcomes(following: list[int], preserving: list[int], scores: bool = False) -> list[EditOutcome]:
    return [
        EditOutcome(str(i), KINDS[i % 2], bool(f), bool(p), *((0.9 * f, 0.9 * p) if scores else ()))
        for i, (f, p) in enumerate(zip(following, preserving, strict=True))
    ]


def test_shares_are_means_over_kinds_and_both_needs_both():
    row = summarise_edits({"sft": outcomes([1, 0, 1, 0, 1], [1, 1, 0, 0, 0])})["edits"]["sft"]
    assert row["following"]["by_tag"] == {"recolor": 1.0, "move": 0.0}
    assert row["following"]["value"] == 0.5
    assert row["preserving"]["value"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert row["both"]["value"] == pytest.approx((1 / 3 + 0) / 2)
    low, high = row["both"]["ci95"]
    assert 0 <= low < row["both"]["value"] < high <= 1


def test_gains_are_paired_by_prompt_whatever_the_order():
    sft, rl = outcomes([0, 0, 1, 1], [1, 1, 1, 1]), outcomes([1, 1, 1, 1], [1, 0, 1, 1])
    gain = summarise_edits({"sft": sft, "rl": rl[::-1]})["rl_gain"]
    assert gain["following"]["value"] == 0.5 and gain["preserving"]["value"] == -0.25
    same = summarise_edits({"sft": sft, "rl": sft})["rl_gain"]
    assert same["both"] == {"value": 0.0, "ci95": [0.0, 0.0], "by_tag": {"recolor": 0.0, "move": 0.0}}
    with pytest.raises(ValueError, match="measured on different prompts"):
        summarise_edits({"sft": sft[:2], "rl": rl})
    with pytest.raises(ValueError, match="no outcomes"):
        summarise_edits({})


def test_the_judge_s_agreement_is_told_where_it_was_asked():
    asked = summarise_edits({"rl": outcomes([1, 0, 1, 0], [1, 1, 1, 1], scores=True)})["edits"]["rl"]["judge"]
    assert asked["following"] == {"agreement": 1.0, "balanced": 1.0, "images": 4}
    assert asked["preserving"] == {"agreement": 1.0, "balanced": None, "images": 4}
    silent = summarise_edits({"rl": outcomes([1, 0], [1, 1])})["edits"]["rl"]["judge"]
    assert silent["following"] == {"agreement": None, "balanced": None, "images": 0}


def test_the_table_is_printed_with_every_number(decoder):
    sft, rl = outcomes([0, 0, 1, 1], [1, 1, 1, 1], True), outcomes([1, 1, 1, 1], [1, 0, 1, 1], True)
    file = io.StringIO()
    print_edit_table(summarise_edits({"sft": sft, "rl": rl}, guidance=1.0, seconds=90), Console(file=file))
    text = file.getvalue()
    for part in ("4 prompts", "SFT", "RL - SFT", "+50.0", "-25.0", "following", "both", "recolor", "1.5 minutes"):
        assert part in text
    assert "the judge agrees on following after SFT: 100.0 %" in text
