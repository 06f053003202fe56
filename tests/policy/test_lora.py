from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlpipe.learn.checkpoint import load_checkpoint, save_checkpoint
from rlpipe.learn.fsdp import FsdpLearner
from rlpipe.learn.replay import segment_logprobs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import adapted_layers, add_adapters
from rlpipe.schema import Config, PolicySection
from tests.learn.builders import config, item, with_logprobs

ROOT = Path(__file__).parents[2]
TARGETS = ["q_proj", "down_proj", "lm_head"]


def lora_config(path: Path, dtype: str = "float32", **learner) -> Config:
    settings = config(path, eps=1e-3, micro_batch=2, **learner)
    settings.policy.dtype = dtype
    settings.policy.lora.rank, settings.policy.lora.alpha = 4, 8.0
    settings.policy.lora.targets = TARGETS
    return settings


def train(learner: FsdpLearner, policy: JanusPolicy, share: slice = slice(None), steps: int = 2) -> list[dict]:
    items = with_logprobs(policy, [item(policy, i, 1 + i % 3) for i in range(5)])
    return [learner.step(items[share], 15.0, step, 10, fresh=False) for step in range(steps)]


@pytest.fixture(scope="module")
def trained(tiny_policy, tiny_policy_path) -> FsdpLearner:
    learner = FsdpLearner(lora_config(tiny_policy_path, lr=1e-2))
    train(learner, tiny_policy)
    return learner


def test_adapters_change_no_output_before_the_first_step(tiny_policy_path):
    base, learner = JanusPolicy.load(tiny_policy_path), FsdpLearner(lora_config(tiny_policy_path))
    items = [item(base, i, 3) for i in range(2)]
    pairs = zip(segment_logprobs(base, items), segment_logprobs(learner.policy, items), strict=True)
    assert all((e == f).all() for expected, found in pairs for e, f in zip(expected, found, strict=True))


def test_only_adapters_train(trained, tiny_policy):
    assert trained.parameters and all("lora_" in name for name in trained.parameters)
    before = tiny_policy.janus.state_dict()
    after = {n.replace(".base_layer", ""): t for n, t in trained.policy.janus.state_dict().items() if "lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(trained.policy.janus.get_parameter(n).abs().max() > 0 for n in trained.parameters)


def test_published_weights_are_the_base_plus_the_scaled_product_under_the_bases_names(trained, tiny_policy):
    weights, base = trained.weights(), tiny_policy.janus.state_dict()
    layers = adapted_layers(tiny_policy.janus, trained.config.policy)
    assert len(layers) == 2 * 2 + 1 and set(weights) == {f"{name}.weight" for name in layers}
    assert sorted(trained.weight_names()) == sorted(weights)
    for layer in layers:
        a, b = (trained.parameters[f"{layer}.lora_{m}.default.weight"].detach() for m in "AB")
        torch.testing.assert_close(weights[f"{layer}.weight"], base[f"{layer}.weight"] + 8.0 / 4 * b @ a)
        assert not torch.equal(weights[f"{layer}.weight"], base[f"{layer}.weight"])


def test_a_sampler_with_the_published_weights_agrees_with_the_learner(trained, tiny_policy_path):
    sampler = JanusPolicy.load(tiny_policy_path)
    parameters = dict(sampler.janus.named_parameters())
    with torch.no_grad():
        for name, tensor in trained.weights().items():
            parameters[name].copy_(tensor)
    items = [item(sampler, i, 3) for i in range(3)]
    pairs = zip(segment_logprobs(sampler, items), segment_logprobs(trained.policy, items), strict=True)
    gap = max(abs(s - t).max() for sampled, scored in pairs for s, t in zip(sampled, scored, strict=True))
    assert gap <= 1e-4


def test_a_checkpoint_holds_adapters_alone_and_continues(trained, tiny_policy, tiny_policy_path, tmp_path):
    assert all("lora_" in name for name in trained.state_dict())
    folder = save_checkpoint(tmp_path, 2, trained, {"cursor": 1})
    resumed = FsdpLearner(lora_config(tiny_policy_path, lr=1e-2))
    assert load_checkpoint(folder, resumed) == {"cursor": 1}
    for name, weight in trained.weights().items():
        assert torch.equal(resumed.weights()[name], weight), name


@pytest.fixture(scope="module")
def two_ranks(tiny_policy_path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.policy.lora_ranks", str(tiny_policy_path), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_two_ranks_train_the_adapters_that_one_does(two_ranks, tiny_policy, tiny_policy_path, dtype):
    learner = FsdpLearner(lora_config(tiny_policy_path, dtype))
    metrics = train(learner, tiny_policy)
    found = torch.load(two_ranks / f"{dtype}.pt")
    close = {"abs": 2e-2, "rel": 5e-2} if dtype == "bfloat16" else {"abs": 1e-5, "rel": 1e-4}
    for one, two in zip(metrics, found["metrics"], strict=True):
        assert two == pytest.approx(one, **close)
    assert found["weights"].keys() == learner.weights().keys()
    for name, weight in learner.weights().items():
        bound = 5e-3 if dtype == "bfloat16" else 2e-6
        torch.testing.assert_close(found["weights"][name], weight, atol=bound, rtol=0, msg=name)


def test_under_bfloat16_the_base_is_bfloat16_and_the_adapters_are_float32(tiny_policy_path):
    learner = FsdpLearner(lora_config(tiny_policy_path, "bfloat16"))
    types = {"lora" if "lora_" in n else "base": p.dtype for n, p in learner.policy.janus.named_parameters()}
    assert types == {"base": torch.bfloat16, "lora": torch.float32}
    assert {t.dtype for t in learner.weights().values()} == {torch.float32}


def test_recomputed_activations_give_the_same_adapters(trained, tiny_policy, tiny_policy_path):
    learner = FsdpLearner(lora_config(tiny_policy_path, lr=1e-2, activation_checkpointing=True))
    train(learner, tiny_policy)
    for name, weight in trained.weights().items():
        torch.testing.assert_close(learner.weights()[name], weight, atol=1e-6, rtol=0)


def test_a_target_that_names_no_layer_is_refused(tiny_policy_path):
    policy, section = JanusPolicy.load(tiny_policy_path), PolicySection()
    section.lora.rank, section.lora.targets = 4, ["q_proj", "qkv"]
    with pytest.raises(ValueError, match=r"policy\.lora\.targets: no linear layer qkv in language_model"):
        add_adapters(policy, section)


def test_the_vision_towers_layers_of_the_same_name_get_no_adapter(tiny_policy):
    section = PolicySection()
    assert all("vision_model" not in name for name in adapted_layers(tiny_policy.janus, section))
