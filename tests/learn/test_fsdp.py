"""The learner's step: what it refuses, and that two ranks do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlpipe.learn.checkpoint import latest_checkpoint, load_checkpoint
from rlpipe.learn.learner import Learner, LearnerError
from rlpipe.types import SegmentCredit
from tests.learn.builders import config, item, with_logprobs
from tests.learn.ranks import SCENARIOS, TOTAL, batches, build, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_ranks(tiny_policy_path, tmp_path_factory) -> Path:
    """Folder with what two gloo ranks made of every scenario."""
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.learn.ranks", str(tiny_policy_path), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_do_what_one_does(two_ranks, tiny_policy_path, scenario):
    metrics, weights = train(build(tiny_policy_path, scenario), tiny_policy_path, scenario, slice(None))
    close = {"abs": 2e-2, "rel": 5e-2} if scenario == "bfloat16" else {"abs": 1e-5, "rel": 1e-4}
    ranks = [torch.load(two_ranks / f"{scenario}_{rank}.pt") for rank in range(2)]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    for expected, found in zip(metrics, ranks[0]["metrics"], strict=True):
        assert found == pytest.approx(expected, **close)
        if scenario != "bfloat16":
            assert found["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-6)
            assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-5)
    assert ranks[1]["weights"] == {} and ranks[0]["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        bound = 2e-3 if scenario == "bfloat16" else 2e-6
        torch.testing.assert_close(ranks[0]["weights"][name], weight, atol=bound, rtol=0, msg=name)


def test_a_step_refused_on_one_rank_is_refused_on_both(two_ranks):
    reasons = [torch.load(two_ranks / f"refused_{rank}.pt") for rank in range(2)]
    assert reasons[0] == reasons[1] and "refused" in reasons[0]


def test_a_checkpoint_of_two_ranks_continues_on_one(two_ranks, tiny_policy_path):
    alone = build(tiny_policy_path, "uneven")
    train(alone, tiny_policy_path, "uneven", slice(None))
    resumed = build(tiny_policy_path, "uneven")
    assert load_checkpoint(latest_checkpoint(two_ranks / "checkpoints"), resumed) == {"cursor": 7}
    assert resumed.policy_version == 2
    items = batches(tiny_policy_path, "uneven")[0]
    metrics = [learner.step(items, 15.0, 2, TOTAL, fresh=False) for learner in (alone, resumed)]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)


def test_weights_have_checkpoint_names_and_only_trained_parts(tiny_policy, tiny_policy_path):
    settings = config(tiny_policy_path)
    settings.policy.trainable = ["generation_head", "lm_head"]
    learner = Learner(settings)
    before = {name: value.clone() for name, value in tiny_policy.janus.state_dict().items()}
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 2) for i in range(2)])
    learner.step(items, 6.0, 0, TOTAL)
    weights = learner.weights()
    heads = ("model.generation_head.", "lm_head.")
    assert set(weights) == {name for name in before if name.startswith(heads)}
    assert all(not torch.equal(weights[name], before[name]) for name in weights)
    assert learner.weights(torch.bfloat16)["lm_head.weight"].dtype == torch.bfloat16
    after = learner.policy.janus.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name not in weights)


def test_micro_batches_do_not_change_a_step(tiny_policy, tiny_policy_path):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 1 + i % 3) for i in range(6)])
    results = []
    for micro_batch in (1, 4, 64):
        learner = Learner(config(tiny_policy_path, micro_batch=micro_batch, eps=1e-3))
        results.append((learner.step(items, 18.0, 0, TOTAL), learner.weights()))
    for metrics, weights in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-5, rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, results[0][1][name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"token_budget": 400}, {"offload": "parameters"}])
def test_a_batch_with_nothing_to_train_is_a_step_that_changes_nothing(tiny_policy, tiny_policy_path, options):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 3) for i in range(6)])
    idle = [replace(i, credits=(SegmentCredit(),) * 3) for i in items]
    learner = Learner(config(tiny_policy_path, micro_batch=2, weight_decay=0.0, **options))
    before = learner.weights()
    metrics = learner.step(idle, 6.0, 0, TOTAL, kl_scale=0.0)
    after = learner.weights()
    assert metrics["train/grad_norm"] == 0 and metrics["train/policy_version"] == 1
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"offload": "parameters"}])
def test_micro_batches_with_nothing_to_train_do_not_change_a_step(tiny_policy, tiny_policy_path, options):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 3) for i in range(6)])
    items[:5] = [replace(i, credits=(SegmentCredit(),) * 3) for i in items[:5]]
    results = []
    for micro_batch in (2, 6):
        learner = Learner(config(tiny_policy_path, micro_batch=micro_batch, eps=1e-3, **options))
        # Nothing, something, nothing, something.
        metrics = [learner.step(batch, 6.0, n, TOTAL) for n, batch in enumerate([items[:4], items[::-1]] * 2)]
        results.append((metrics, learner.weights()))
    for one, two in zip(results[0][0], results[1][0], strict=True):
        assert one == pytest.approx(two, abs=1e-5, rel=1e-4)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], atol=2e-6, rtol=0)


def test_a_step_of_supervised_examples_lowers_their_loss(tiny_policy, tiny_policy_path):
    items = [item(tiny_policy, i, 1, credits=(SegmentCredit(ce=1.0),)) for i in range(4)]
    learner = Learner(config(tiny_policy_path))
    losses = [learner.step(items, 4.0, step, TOTAL)["loss/ce_image"] for step in range(5)]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    assert learner.policy_version == 5


def test_a_refused_step_leaves_weights_and_version_alone(tiny_policy, tiny_policy_path):
    settings = config(tiny_policy_path)
    settings.loss.max_mismatch = 0.01
    learner = Learner(settings)
    good = with_logprobs(tiny_policy, [item(tiny_policy, 0, 2)], noise=0.0001)
    far = with_logprobs(tiny_policy, [item(tiny_policy, 0, 2)], noise=0.1)
    broken = replace(good[0], credits=(SegmentCredit(advantage=float("inf")), SegmentCredit()))
    before = learner.weights()
    with pytest.raises(LearnerError, match="max_mismatch=0.01"):
        learner.step(far, 3.0, 0, TOTAL)
    with pytest.raises(LearnerError, match="not finite"):
        learner.step([broken], 3.0, 0, TOTAL)
    with pytest.raises(ValueError, match="denominator"):
        learner.step(good, 0.0, 0, TOTAL)
    after = learner.weights()
    assert learner.policy_version == 0 and all(torch.equal(after[n], before[n]) for n in before)
    of_another = [replace(i, trajectory=replace(i.trajectory, policy_version=7)) for i in far]
    assert learner.step(of_another, 3.0, 0, TOTAL, fresh=False)["train/policy_version"] == 1
    assert np.isfinite(learner.step(good, 3.0, 1, TOTAL, fresh=False)["train/grad_norm"])


def test_weight_decay_spares_vectors(tiny_policy_path):
    learner = Learner(config(tiny_policy_path, weight_decay=0.5, lr=0.1))
    before = learner.weights()
    unused = [item(learner.policy, 0, 1, credits=(SegmentCredit(ce=1.0),))]
    learner.step(unused, 1.0, 0, TOTAL)
    after = learner.weights()
    # The text head takes no part in a drawing: its matrix decays and nothing else moves it.
    torch.testing.assert_close(after["lm_head.weight"], before["lm_head.weight"] * 0.95)
    torch.testing.assert_close(after["model.aligner.fc1.bias"], before["model.aligner.fc1.bias"])
