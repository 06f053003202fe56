"""Checkpoints: the same next step after a resume, and damaged folders passed over."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

from rlpipe.learn.checkpoint import (
    CheckpointError,
    Snapshot,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_newest_weights,
    read_weights,
    save_checkpoint,
    verify,
)
from rlpipe.learn.learner import Learner
from tests.learn.builders import config, item, with_logprobs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def items(tiny_policy):
    return with_logprobs(tiny_policy, [item(tiny_policy, i, 1 + i % 3) for i in range(3)])


@pytest.fixture(scope="module")
def saved(tiny_policy_path, items, tmp_path_factory):
    """A folder of three checkpoints, and their learner after the last."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    learner = Learner(config(tiny_policy_path))
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
    resumed = Learner(config(tiny_policy_path))
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
    told = []
    latest_checkpoint(copy, told.append)
    assert [str(error).split(": ")[0][-11:] for error in told] == ["step_000003", "step_000002"]
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


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
def test_one_changed_byte_is_enough_to_take_the_checkpoint_before(copy, saved, name):
    file = copy / "step_000003" / name
    content = bytearray(file.read_bytes())
    place = len(content) // 2 if name != "state.json" else content.index(b'"rng": [1') + 8
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"step_000003: {name} (has CRC-32|is not what was written)"):
        verify(copy / "step_000003")
    with pytest.raises(CheckpointError, match="step_000003"):
        read_weights(copy / "step_000003")
    assert latest_checkpoint(copy).name == "step_000002"


def test_without_its_pointer_the_newest_folder_counts(copy):
    (copy / "latest").unlink()
    assert latest_checkpoint(copy).name == "step_000003"


def test_a_run_that_went_on_from_an_earlier_step_goes_on_from_there_again(copy):
    (copy / "latest").write_text("step_000002")
    assert latest_checkpoint(copy).name == "step_000002"


SAVES_FOR_EVER = """
import sys, torch
from rlpipe.learn.checkpoint import Snapshot, save_checkpoint
for step in range(1, 1000):
    tensors = {"model.a": torch.full((1 << 20,), float(step)), "model.b": torch.full((1 << 20,), float(step))}
    save_checkpoint(sys.argv[1], step, Snapshot(0, 1, step, tensors), {"step": step})
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_save_leaves_the_checkpoint_before(tmp_path):
    for death in range(3):
        folder = tmp_path / str(death)
        process = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, folder], cwd=ROOT)
        deadline = time.monotonic() + 60
        while not (list(folder.glob("step_*")) and list(folder.glob(".unfinished_*/__0_0.distcp"))):
            assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.003 * death)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        newest = latest_checkpoint(folder)
        (step,) = {float(value) for tensor in read_weights(newest).values() for value in tensor.unique()}
        assert newest.name == f"step_{int(step):06d}"
        save_checkpoint(folder, 1000, Snapshot(0, 1, 1000, {"model.a": torch.zeros(1)}), {})
        prune_checkpoints(folder, keep=1)
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_001000"]


def test_the_weights_of_a_checkpoint_are_read_without_a_learner(saved):
    folder, learner = saved
    path, weights = read_newest_weights(folder)
    assert path.name == "step_000003" and weights.keys() == learner.weights().keys()
    with pytest.raises(CheckpointError, match="no checkpoint to read"):
        read_newest_weights(folder / "nothing")


def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_the_last_word(copy, monkeypatch):
    def removed_first(folder):
        verify(folder)
        if folder.name == "step_000003":
            shutil.rmtree(folder)
            (copy / "latest").write_text("step_000002")

    monkeypatch.setattr("rlpipe.learn.checkpoint.verify", removed_first)
    assert read_newest_weights(copy)[0].name == "step_000002"


def test_checkpoints_of_every_so_many_steps_stay_for_ever(copy, saved):
    for step in range(4, 8):
        save_checkpoint(copy, step, saved[1], {"step": step})
        prune_checkpoints(copy, keep=2, every=3)
    assert sorted(p.name for p in copy.glob("step_*")) == [f"step_00000{i}" for i in (3, 6, 7)]


def test_pruning_keeps_the_newest_and_what_latest_names(copy):
    prune_checkpoints(copy, keep=2)
    assert sorted(p.name for p in copy.glob("step_*")) == ["step_000002", "step_000003"]
    (copy / "latest").write_text("step_000002")
    prune_checkpoints(copy, keep=1)
    assert sorted(p.name for p in copy.glob("step_*")) == ["step_000002", "step_000003"]


def test_what_cannot_be_removed_is_told_and_does_not_keep_the_rest(copy, caplog):
    (copy / ".removed_step_000001").write_text("no folder can have this name")
    prune_checkpoints(copy, keep=1)
    assert sorted(p.name for p in copy.glob("step_*")) == ["step_000001", "step_000003"]
    assert "step_000001: not removed: NotADirectoryError" in caplog.text


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
        load_checkpoint(latest_checkpoint(copy), Learner(settings))


def test_an_index_that_names_other_classes_is_not_unpickled(copy, tiny_policy_path):
    folder = copy / "step_000003"
    (folder / ".metadata").write_bytes(pickle.dumps(json.JSONDecoder))
    record = json.loads((folder / "state.json").read_text())
    del record["own_crc32"]
    record["files"][".metadata"] = (folder / ".metadata").stat().st_size
    record["crc32"][".metadata"] = zlib.crc32((folder / ".metadata").read_bytes())
    own = zlib.crc32(json.dumps(record, sort_keys=True).encode())
    (folder / "state.json").write_text(json.dumps({**record, "own_crc32": own}))
    verify(folder)
    with pytest.raises(CheckpointError, match="names json.decoder.JSONDecoder"):
        load_checkpoint(folder, Learner(config(tiny_policy_path)))
