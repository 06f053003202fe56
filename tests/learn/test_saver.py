"""Saving in the background: what is written is the state of the moment, and what goes wrong is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlpipe.learn.checkpoint import CheckpointError, latest_checkpoint, read_weights, verify
from rlpipe.learn.learner import Learner
from rlpipe.learn.saver import Saver, free_host_bytes
from tests.learn.builders import config, item, with_logprobs
from tests.learn.save_ranks import resumed_metrics, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def learner(tiny_policy_path) -> Learner:
    return Learner(config(tiny_policy_path))


@pytest.fixture(scope="module")
def items(tiny_policy):
    return with_logprobs(tiny_policy, [item(tiny_policy, i, 1) for i in range(2)])


@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_a_checkpoint_is_of_the_step_it_was_asked_for_though_training_went_on(learner, items, tmp_path, mode):
    saver, before, version = Saver(learner, mode, 60), learner.weights(), learner.policy_version
    saver.save(tmp_path, version, {"cursor": 3})
    learner.step(items, 2.0, 0, 10, fresh=False)
    saved = saver.ended(wait=True)
    assert (saved.step, saved.error) == (version, None) and saver.ended(wait=True) is None
    stored = read_weights(latest_checkpoint(tmp_path))
    assert all(torch.equal(stored[name], before[name]) for name in before)
    assert any(not torch.equal(stored[name], now) for name, now in learner.weights().items())


def test_saves_follow_each_other_and_the_last_one_is_waited_for(learner, tmp_path):
    saver = Saver(learner, "always", 60)
    for step in (1, 2, 3):
        saver.save(tmp_path, step, {"step": step})
    saver.close()
    assert (tmp_path / "latest").read_text() == "step_000003"
    for step in (1, 2, 3):
        verify(tmp_path / f"step_00000{step}")


def test_what_goes_wrong_in_the_background_is_told_and_at_once_is_raised(learner, tmp_path):
    (tmp_path / "file").write_text("no folder")
    saver = Saver(learner, "always", 60)
    saver.save(tmp_path / "file", 1, {})
    assert "NotADirectoryError" in saver.ended(wait=True).error
    saver.save(tmp_path / "good", 1, {})
    assert saver.ended(wait=True).error is None
    with pytest.raises(CheckpointError, match="NotADirectoryError"):
        Saver(learner, "never", 60).save(tmp_path / "file", 1, {})


def test_without_room_for_a_copy_the_checkpoint_is_written_at_once(learner, tmp_path, monkeypatch):
    needed = sum(tensor.nbytes for tensor in learner.state_dict().values())
    assert needed < free_host_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr("rlpipe.learn.saver.free_host_bytes", lambda: needed)
    saver = Saver(learner, "auto", 60)
    saver.save(tmp_path, 1, {})
    assert latest_checkpoint(tmp_path).name == "step_000001", "nobody has waited"


@pytest.fixture(scope="module")
def two_ranks(tiny_policy_path, tmp_path_factory) -> Path:
    """A folder with what `save_ranks` leaves, after one rank has left `one/`."""
    out = tmp_path_factory.mktemp("ranks")
    train(tiny_policy_path, out / "one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.learn.save_ranks", str(tiny_policy_path), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_two_ranks_save_while_they_train_and_any_number_goes_on(two_ranks, tiny_policy_path):
    whole = torch.load(two_ranks / "one" / "metrics.pt")
    for found in (
        torch.load(two_ranks / "two" / "metrics.pt"),
        resumed_metrics(tiny_policy_path, two_ranks / "two"),
        torch.load(two_ranks / "resumed.pt"),
    ):
        for ours, theirs in zip(found, whole[-len(found) :], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
