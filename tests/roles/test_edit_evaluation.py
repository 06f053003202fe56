"""Held-out edits as the rollout worker measures them, and when the exact checker can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlpipe.config import Config
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.editing import summarise_edits
from rlpipe.world.edits import KINDS, write_edits
from roles.buckets import WeightError
from roles.evaluation import show, uncheckable
from roles.rollout import RolloutWorker


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edits")
    write_edits(folder, train=4, test=8, pairs=1)
    return folder


@pytest.fixture
def config(config_for, edits: Path, tmp_path: Path) -> Config:
    config = config_for(tmp_path / "run", edits / "prompts_test.jsonl")
    config.rollout.program, config.rollout.max_images, config.credit.rule = "edit", 1, "single"
    return config


def test_a_worker_measures_edits_of_its_own_version_whatever_the_slices(config, edits) -> None:
    worker, prompts = RolloutWorker(config), load_prompts(edits / "prompts_test.jsonl")
    with pytest.raises(WeightError, match="holds no version yet"):
        worker.evaluate_edits(0, prompts, 1.0, True, None)
    worker.version = 0
    whole = worker.evaluate_edits(0, prompts, 1.0, True, None)
    parts = [worker.evaluate_edits(0, prompts[i : i + 3], 1.0, True, None) for i in (0, 3, 6)]
    assert [outcome for part in parts for outcome in part] == whole
    assert [outcome.tag for outcome in whole] == [*KINDS, *KINDS]
    assert {outcome.following_score for outcome in whole} == {None}


def test_the_checker_knows_edits_of_the_tiny_world_and_says_what_it_does_not_know(config, edits, prompts_file) -> None:
    path = config.policy.path
    assert uncheckable(load_prompts(edits / "prompts_test.jsonl"), path, "edit") is None
    assert "is none of the tiny world (metadata.edit" in uncheckable(load_prompts(prompts_file), path, "edit")
    assert "is none of the tiny world" in uncheckable(load_prompts(edits / "prompts_test.jsonl"), path)


def test_the_summary_of_edits_is_shown_as_their_table(config, edits, capsys) -> None:
    worker, prompts = RolloutWorker(config), load_prompts(edits / "prompts_test.jsonl")
    worker.version = 0
    outcomes = worker.evaluate_edits(0, prompts, 1.0, True, None)
    summary = summarise_edits({"sft": outcomes, "rl": outcomes}, seconds=60.0)
    run = Path(config.run.dir)
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps(summary))
    show(config, summary)
    told = capsys.readouterr().out
    assert "RL - SFT" in told and "preserving" in told and "8 prompts" in told
    assert (run / "report/index.html").is_file()
