"""One loss whatever keeps the weights: every strategy and option against one process that has everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from rlpipe.config import ConfigError, load_config, validate
from rlpipe.learn.checkpoint import latest_checkpoint, save_checkpoint
from rlpipe.learn.learner import Learner
from rlpipe.learn.strategy import StrategyError
from tests.learn.builders import config
from tests.learn.ranks import batches
from tests.learn.strategies import FSDP2, STEPS, ZERO, build, crossed, items_of, train

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
ALONE = {"zero-2 lora": "lora", "zero-3 lora": "lora", "zero-2 bfloat16": "bfloat16", "zero-3 bfloat16": "bfloat16"}
"""The variant on one process that a variant on two ranks is compared with, where that is not plain fsdp2."""
BFLOAT16 = {"abs": 2e-2, "rel": 5e-2}


def run_ranks(policy_path: Path, out: Path, variants: list[str], crossing: Path | None = None) -> Path:
    """Folder with what two gloo ranks made of every variant."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.learn.strategies", str(policy_path), str(out), str(crossing), *variants]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(tiny_policy_path):
    """Metrics of some steps and weights of a variant on this process; runs each once."""
    known = {}

    def measure(variant: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
        if variant not in known:
            learner = build(tiny_policy_path, variant)
            known[variant] = (train(learner, items_of(tiny_policy_path, variant)), learner.weights())
        return known[variant]

    return measure


@pytest.fixture(scope="module")
def fsdp2_ranks(tiny_policy_path, tmp_path_factory) -> Path:
    return run_ranks(tiny_policy_path, tmp_path_factory.mktemp("fsdp2"), list(FSDP2))


@pytest.fixture(scope="module")
def checkpoint_alone(tiny_policy_path, tmp_path_factory) -> Path:
    """Folder of the checkpoint of one process under fsdp2."""
    learner = build(tiny_policy_path, "fsdp2")
    train(learner, items_of(tiny_policy_path, "fsdp2"))
    return save_checkpoint(tmp_path_factory.mktemp("alone"), STEPS, learner, {})


@pytest.fixture(scope="module")
def zero_ranks(tiny_policy_path, tmp_path_factory, checkpoint_alone) -> Path:
    return run_ranks(tiny_policy_path, tmp_path_factory.mktemp("zero"), list(ZERO), checkpoint_alone)


def compare(found: Path, variant: str, alone) -> None:
    metrics, weights = alone(ALONE.get(variant, variant if variant in ("lora", "bfloat16") else "fsdp2"))
    ranks = [torch.load(found / f"{variant}_{rank}.pt") for rank in range(2)]
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    close = BFLOAT16 if "bfloat16" in variant else {"abs": 1e-5, "rel": 1e-4}
    for one, two in zip(metrics, ranks[0]["metrics"], strict=True):
        assert two == pytest.approx(one, **close)
    assert ranks[1]["weights"] == {} and ranks[0]["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        bound = 5e-3 if "bfloat16" in variant else 5e-6
        torch.testing.assert_close(ranks[0]["weights"][name], weight, atol=bound, rtol=0, msg=name)


def compare_refusal(found: Path, variant: str) -> None:
    (reason, unchanged), (other, _) = (torch.load(found / f"{variant}_{rank}.pt")["refused"] for rank in range(2))
    assert reason == other and "refused" in reason and unchanged


def compare_resumed(found: Path, variant: str) -> None:
    record = torch.load(found / f"{variant}_0.pt")
    assert record["resumed"] == pytest.approx(record["next"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FSDP2)
def test_two_ranks_under_any_option_do_what_one_process_does(fsdp2_ranks, alone, variant):
    compare(fsdp2_ranks, variant, alone)
    compare_refusal(fsdp2_ranks, variant)
    compare_resumed(fsdp2_ranks, variant)


@pytest.mark.deepspeed
@pytest.mark.parametrize("variant", ZERO)
def test_zero_does_what_fsdp2_does(zero_ranks, alone, variant):
    compare(zero_ranks, variant, alone)


@pytest.mark.deepspeed
@pytest.mark.parametrize("variant", ZERO)
def test_a_step_that_zero_refuses_leaves_weights_alone_and_the_next_one_undisturbed(zero_ranks, variant):
    compare_refusal(zero_ranks, variant)


@pytest.mark.deepspeed
@pytest.mark.parametrize("variant", ZERO)
def test_a_checkpoint_of_zero_continues(zero_ranks, variant):
    compare_resumed(zero_ranks, variant)


@pytest.mark.deepspeed
@pytest.mark.parametrize("variant", ["zero-1", "zero-2", "zero-3"])
def test_a_checkpoint_continues_under_the_other_strategy(zero_ranks, tiny_policy_path, checkpoint_alone, variant):
    under_zero = torch.load(zero_ranks / f"{variant}_0.pt")
    under_fsdp2 = crossed(tiny_policy_path, "fsdp2", checkpoint_alone)
    assert under_zero["crossed"] == pytest.approx(under_fsdp2, rel=1e-4, abs=1e-5)
    back = crossed(tiny_policy_path, "fsdp2", latest_checkpoint(zero_ranks / variant))
    assert back == pytest.approx(under_zero["next"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_step(tiny_policy_path, alone, mode):
    metrics, _ = alone("fsdp2")
    learner = build(tiny_policy_path, mode)
    assert train(learner, items_of(tiny_policy_path, mode), range(1)) == [pytest.approx(metrics[0], rel=1e-6)]


def test_full_recomputation_computes_matrix_products_again_and_selective_does_not(tiny_policy_path):
    operations = {}
    items = items_of(tiny_policy_path, "fsdp2")
    for mode in ("none", "selective", "full"):
        learner = Learner(config(tiny_policy_path, activation_checkpointing=mode))
        with FlopCounterMode(display=False) as counter:
            train(learner, items, range(1))
        operations[mode] = counter.get_total_flops()
    assert operations["none"] == operations["selective"] < operations["full"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled_layers_change_no_step(tiny_policy_path, alone, mode):
    metrics, _ = alone("fsdp2")
    torch._dynamo.reset()
    counters.clear()
    settings = config(tiny_policy_path, micro_batch=2, eps=1e-3, compile=True, activation_checkpointing=mode)
    compiled = train(Learner(settings), batches(tiny_policy_path, "uneven")[0], range(2))
    for one, other in zip(metrics, compiled, strict=False):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
    assert counters["stats"]["unique_graphs"] >= 2


def test_frozen_parts_have_no_moments_and_no_gradients(tiny_policy_path):
    settings = config(tiny_policy_path)
    learner = Learner(settings)
    assert not any(part in name for name in learner.state_dict() for part in ("vision_model", "vqmodel"))
    train(learner, items_of(tiny_policy_path, "fsdp2"), range(1))
    frozen = [p for part in ("vision_model", "vqmodel") for p in learner.policy.part(part).parameters()]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)


def test_without_deepspeed_the_error_names_the_key_and_the_command(tiny_policy_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(StrategyError, match=r"learner\.strategy.*pip install 'rlpipe\[deepspeed\]'"):
        Learner(config(tiny_policy_path, strategy="deepspeed"))
    with pytest.raises(ConfigError, match=r"learner\.strategy: deepspeed is not installed"):
        validate(load_config(overrides=["learner.strategy=deepspeed"]))


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["learner.ranks=4", "learner.replicas=3"], "learner.replicas: 3 does not divide learner.ranks 4"),
        (["learner.deepspeed={zero_optimization: {stage: 1}}"], "learner.deepspeed: .* with learner.strategy fsdp2"),
        (["learner.strategy=deepspeed", "learner.offload=parameters"], "learner.offload: .*zero_stage 2"),
        (["learner.strategy=deepspeed", "learner.zero_stage=4"], "learner.zero_stage: 4"),
        (["learner.activation_checkpointing=some"], "learner.activation_checkpointing: 'some'"),
    ],
)
def test_options_that_do_not_go_together_are_told_in_one_line(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        validate(load_config(overrides=overrides))


def test_true_and_false_still_name_full_recomputation_and_none():
    modes = [load_config(overrides=[f"learner.activation_checkpointing={text}"]) for text in ("true", "false")]
    assert [mode.learner.activation_checkpointing for mode in modes] == ["full", "none"]
