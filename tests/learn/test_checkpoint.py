"""Checkpoints: the same next step after a resume, and damaged folders passed over."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from rlpipe.learn.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from rlpipe.learn.fsdp import FsdpLearner
from tests.learn.builders import config, item, with_logprobs


@pytest.fixture(scope="module")
def items(tiny_policy):
    return with_logprobs(tiny_policy, [item(tiny_policy, i, 1 + i % 3) for i in range(3)])


@pytest.fixture(scope="module")
def saved(tiny_policy_path, items, tmp_path_factory):
    """A folder of three checkpoints, and their learner after the last."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    learner = FsdpLearner(config(tiny_policy_path))
    for step in range(3):
        learner.step(items, 9.0, step, 10, fresh=False)
        save_checkpoint(folder, step + 1, learner, {"step": step + 1, "rng": [1, 2, 3]})
    return folder, learner


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_the_step_after_a_resume_is_the_same_to_the_bit(saved, tiny_policy_path, items):
    folder, learner = saved
    resumed = FsdpLearner(config(tiny_policy_path))
    assert load_checkpoint(latest_checkpoint(folder), resumed) == {"step": 3, "rng": [1, 2, 3]}
    assert resumed.policy_version == 3
    metrics = [each.step(items, 9.0, 3, 10, fresh=False) for each in (learner, resumed)]
    assert metrics[0] == metrics[1]
    weights = [each.weights() for each in (learner, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_damaged_checkpoint_is_passed_over_and_said(copy, caplog):
    assert latest_checkpoint(copy).name == "step_000003"
    data = copy / "step_000003" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-100])
    assert latest_checkpoint(copy).name == "step_000002"
    assert "step_000003: __0_0.distcp has" in caplog.text
    (copy / "step_000002" / "state.json").unlink()
    assert latest_checkpoint(copy).name == "step_000001"
    shutil.rmtree(copy / "step_000001")
    with pytest.raises(CheckpointError, match="no usable checkpoint.*resume=never"):
        latest_checkpoint(copy)


def test_a_save_that_died_halfway_does_not_count(copy, saved):
    class Dies:
        rank, world_size, policy_version = 0, 1, 4

        def state_dict(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(copy, 4, Dies(), {"step": 4})
    assert not (copy / "step_000004").exists()
    assert latest_checkpoint(copy).name == "step_000003"
    prune_checkpoints(copy, keep=5)
    assert sorted(p.name for p in copy.iterdir()) == ["latest", *(f"step_00000{i}" for i in (1, 2, 3))]
    save_checkpoint(copy, 4, saved[1], {"step": 4})
    assert latest_checkpoint(copy).name == "step_000004"


def test_pruning_keeps_the_newest_and_what_latest_names(copy):
    prune_checkpoints(copy, keep=2)
    assert sorted(p.name for p in copy.glob("step_*")) == ["step_000002", "step_000003"]
    (copy / "latest").write_text("step_000002")
    prune_checkpoints(copy, keep=1)
    assert sorted(p.name for p in copy.glob("step_*")) == ["step_000002", "step_000003"]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_state_that_is_no_json_fails_before_anything_is_written(copy, saved):
    with pytest.raises(TypeError):
        save_checkpoint(copy, 9, saved[1], {"rng": object()})
    assert latest_checkpoint(copy).name == "step_000003" and not list(copy.glob("*9*"))


def test_another_set_of_trained_parts_is_named(copy, tiny_policy_path):
    settings = config(tiny_policy_path)
    settings.policy.trainable = ["lm_head"]
    with pytest.raises(CheckpointError, match="unknown tensor.*policy.trainable"):
        load_checkpoint(latest_checkpoint(copy), FsdpLearner(settings))


def test_an_index_that_names_other_classes_is_not_unpickled(copy, tiny_policy_path):
    folder = copy / "step_000003"
    (folder / ".metadata").write_bytes(pickle.dumps(json.JSONDecoder))
    record = json.loads((folder / "state.json").read_text())
    record["files"][".metadata"] = (folder / ".metadata").stat().st_size
    (folder / "state.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="names json.decoder.JSONDecoder"):
        load_checkpoint(folder, FsdpLearner(config(tiny_policy_path)))
