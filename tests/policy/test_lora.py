from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlpipe.config import to_yaml
from rlpipe.learn.checkpoint import load_checkpoint, save_checkpoint
from rlpipe.learn.export import export_run
from rlpipe.learn.learner import Learner
from rlpipe.learn.reference import reference_options
from rlpipe.learn.replay import segment_logprobs
from rlpipe.policy.adapter import AdapterError, adapter_problems, save_adapter
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import adapted_layers, add_adapters, base_is_reference, scaled_adapters
from rlpipe.schema import Config, PolicySection
from rlpipe.types import SegmentCredit
from tests.learn.builders import config, item, with_logprobs

ROOT = Path(__file__).parents[2]
TARGETS = ["q_proj", "down_proj", "lm_head"]


def lora_config(path: Path, dtype: str = "float32", **learner) -> Config:
    settings = config(path, eps=1e-3, micro_batch=2, **learner)
    settings.policy.dtype = dtype
    settings.policy.lora.rank, settings.policy.lora.alpha = 4, 8.0
    settings.policy.lora.targets = TARGETS
    return settings


def train(
    learner: Learner, policy: JanusPolicy, share: slice = slice(None), steps: int = 2, own_reference: bool = False
) -> list[dict]:
    items = with_logprobs(policy, [item(policy, i, 1 + i % 3) for i in range(5)])
    if own_reference:
        items = [replace(example, ref_logprobs=()) for example in items]
    return [learner.step(items[share], 15.0, step, 10, fresh=False) for step in range(steps)]


@pytest.fixture(scope="module")
def trained(tiny_policy, tiny_policy_path) -> Learner:
    learner = Learner(lora_config(tiny_policy_path, lr=1e-2))
    train(learner, tiny_policy)
    return learner


def test_adapters_change_no_output_before_the_first_step(tiny_policy_path):
    base, learner = JanusPolicy.load(tiny_policy_path), Learner(lora_config(tiny_policy_path))
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
    resumed = Learner(lora_config(tiny_policy_path, lr=1e-2))
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


@pytest.mark.parametrize("own_reference", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_two_ranks_train_the_adapters_that_one_does(two_ranks, tiny_policy, tiny_policy_path, dtype, own_reference):
    learner = Learner(lora_config(tiny_policy_path, dtype))
    metrics = train(learner, tiny_policy, own_reference=own_reference)
    found = torch.load(two_ranks / f"{dtype}_{own_reference}.pt")
    close = {"abs": 2e-2, "rel": 5e-2} if dtype == "bfloat16" else {"abs": 1e-5, "rel": 1e-4}
    for one, two in zip(metrics, found["metrics"], strict=True):
        assert two == pytest.approx(one, **close)
    assert found["weights"].keys() == learner.weights().keys()
    for name, weight in learner.weights().items():
        bound = 5e-3 if dtype == "bfloat16" else 2e-6
        torch.testing.assert_close(found["weights"][name], weight, atol=bound, rtol=0, msg=name)


def test_under_bfloat16_the_base_is_bfloat16_and_the_adapters_are_float32(tiny_policy_path):
    learner = Learner(lora_config(tiny_policy_path, "bfloat16"))
    types = {"lora" if "lora_" in n else "base": p.dtype for n, p in learner.policy.janus.named_parameters()}
    assert types == {"base": torch.bfloat16, "lora": torch.float32}
    assert {t.dtype for t in learner.weights().values()} == {torch.float32}


def test_recomputed_activations_give_the_same_adapters(trained, tiny_policy, tiny_policy_path):
    learner = Learner(lora_config(tiny_policy_path, lr=1e-2, activation_checkpointing="full"))
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


HEADS_AND_ALIGNERS = ["proj_out", "vision_head", "lm_head", "aligner.fc1", "generation_aligner.hidden_layers.0"]


def test_heads_and_aligners_are_adapted_where_their_names_are_given(tiny_policy, tiny_policy_path):
    settings = lora_config(tiny_policy_path, lr=1e-2)
    settings.policy.lora.targets = HEADS_AND_ALIGNERS
    names = adapted_layers(tiny_policy.janus, settings.policy)
    of = [name.removeprefix("model.") for name in names]
    assert of == [
        "generation_head.proj_out",
        "generation_head.vision_head",
        "lm_head",
        "aligner.fc1",
        "generation_aligner.hidden_layers.0",
    ]
    learner = Learner(settings)
    train(learner, tiny_policy)
    assert all(learner.policy.janus.get_parameter(name).abs().max() > 0 for name in learner.parameters)
    sampler = with_weights(JanusPolicy.load(tiny_policy_path), learner.weights())
    assert gap(sampler, learner.policy) <= 1e-4 < gap(tiny_policy, learner.policy)


def with_weights(policy: JanusPolicy, weights: dict[str, torch.Tensor]) -> JanusPolicy:
    parameters = dict(policy.janus.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    return policy


def gap(one: JanusPolicy, other: JanusPolicy) -> float:
    """The largest difference between the log-probs of two policies."""
    items = [item(one, i, 3) for i in range(3)]
    pairs = zip(segment_logprobs(one, items), segment_logprobs(other, items), strict=True)
    return max(abs(s - t).max() for mine, its in pairs for s, t in zip(mine, its, strict=True))


def test_without_its_adapters_a_policy_is_its_base_to_the_bit(trained, tiny_policy_path):
    base = JanusPolicy.load(tiny_policy_path)
    with scaled_adapters(trained.policy, 0.0):
        assert gap(trained.policy, base) == 0
    assert gap(trained.policy, base) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learners_own_reference_is_what_a_reference_policy_says(tiny_policy_path, dtype):
    base = JanusPolicy.load(tiny_policy_path, getattr(torch, dtype))
    items = with_logprobs(base, [item(base, i, 1 + i % 3) for i in range(5)])
    said = segment_logprobs(base, [replace(i, credits=(SegmentCredit(kl=1.0),) * len(i.credits)) for i in items])
    compared = [replace(example, ref_logprobs=logprobs) for example, logprobs in zip(items, said, strict=True)]
    found = []
    for batch in (compared, [replace(example, ref_logprobs=()) for example in items]):
        settings = lora_config(tiny_policy_path, dtype, lr=1e-2)
        assert base_is_reference(settings)
        learner = Learner(settings)
        found.append([learner.step(batch, 15.0, step, 10, fresh=False) for step in range(3)])
    close = {"abs": 1e-6, "rel": 1e-6} if dtype == "float32" else {"abs": 2e-3, "rel": 2e-2}
    for actors, own in zip(*found, strict=True):
        assert own == pytest.approx(actors, **close)
    assert found[1][2]["kl/image"] > 1e-5 and found[1][2]["kl/text"] > 1e-5


@pytest.mark.parametrize("context", ["live", "constant"])
def test_where_the_reference_looks_back_at_the_policys_embeddings_those_are_of_the_adapted_aligners(
    tiny_policy, tiny_policy_path, context
):
    settings = lora_config(tiny_policy_path, lr=1e-2)
    settings.policy.lora.targets = [*HEADS_AND_ALIGNERS, "q_proj"]
    settings.reference.context, settings.loss.context = "policy", context
    learners = [Learner(settings) for _ in range(2)]
    for learner in learners:
        train(learner, tiny_policy)
    base = JanusPolicy.load(tiny_policy_path)
    embedder = with_weights(JanusPolicy.load(tiny_policy_path), learners[0].weights()).embedder()
    items = with_logprobs(base, [item(base, i, 3) for i in range(3)])
    said = segment_logprobs(base, items, reference_options(settings), context_policy=embedder)
    own = segment_logprobs(base, items)
    assert max(abs(a[2] - b[2]).max() for a, b in zip(said, own, strict=True)) > 1e-3
    compared = [replace(example, ref_logprobs=logprobs) for example, logprobs in zip(items, said, strict=True)]
    batches = [compared, [replace(example, ref_logprobs=()) for example in items]]
    found = [one.step(batch, 9.0, 2, 10, fresh=False) for one, batch in zip(learners, batches, strict=True)]
    assert found[1] == pytest.approx(found[0], abs=2e-6, rel=2e-6)


def test_another_reference_than_the_base_is_not_the_learners(tiny_policy_path):
    changes = [("reference", "path", "x"), ("decline", "action", "react")]
    for section, key, value in [*changes, ("loss", "kl_beta", 0.0)]:
        settings = lora_config(tiny_policy_path)
        setattr(getattr(settings, section), key, value)
        assert not base_is_reference(settings), key
    assert not base_is_reference(config(tiny_policy_path))


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    save_adapter(tmp_path / "adapter", trained.parameters, trained.config.policy)
    return tmp_path / "adapter"


def test_peft_itself_makes_the_same_policy_of_a_saved_adapter(trained, adapter, tiny_policy_path):
    from peft import PeftModel

    other = JanusPolicy.load(tiny_policy_path)
    wrapped = PeftModel.from_pretrained(other.janus, str(adapter))
    other.janus = wrapped.get_base_model()
    assert gap(other, trained.policy) == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_policy_path)
    wrapped.save_pretrained(adapter.parent / "again")
    for folder in (adapter, adapter.parent / "again"):
        settings = lora_config(tiny_policy_path)
        settings.policy.lora.path = str(folder)
        learner = Learner(settings)
        assert gap(learner.policy, trained.policy) == 0
        assert all(p.requires_grad and p.dtype == torch.float32 for p in learner.parameters.values())


def test_an_adapter_that_does_not_fit_is_refused_with_the_key(adapter, tiny_policy_path):
    section = lora_config(tiny_policy_path).policy
    section.lora.path = str(adapter)
    assert list(adapter_problems(section.lora)) == []
    for key, value in (("rank", 8), ("alpha", 1.0)):
        (line,) = adapter_problems(replace(section.lora, **{key: value}))
        assert line.startswith(f"policy.lora.{key}: {value:g}, and the adapter of policy.lora.path has")
    (line,) = adapter_problems(replace(section.lora, path=str(adapter.parent)))
    assert "no adapter_config.json and no adapter_model.safetensors" in line
    others = {"has an adapter.*down_proj": ["q_proj", "lm_head"], "has no adapter.*k_proj": [*TARGETS, "k_proj"]}
    for message, targets in others.items():
        policy = JanusPolicy.load(tiny_policy_path)
        with pytest.raises(AdapterError, match=f"{message}.*name its layers in policy.lora.targets"):
            add_adapters(policy, replace(section, lora=replace(section.lora, targets=targets)))
    record = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**record, "use_dora": True}))
    (line,) = adapter_problems(section.lora)
    assert "use_dora True" in line


def test_a_run_folder_is_exported_whole_or_as_an_adapter_without_its_learner(trained, tiny_policy_path, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(trained.config))
    save_checkpoint(tmp_path / "run" / "checkpoints", 2, trained, {})
    for layout in ("original", "transformers"):
        folder, dtype = export_run(tmp_path / "run", tmp_path / layout, layout)
        assert (folder.name, dtype) == ("step_000002", torch.float32)
        exported, weights = JanusPolicy.load(tmp_path / layout).janus.state_dict(), trained.weights()
        assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())
    export_run(tmp_path / "run", tmp_path / "adapter", "adapter", step=2)
    settings = lora_config(tiny_policy_path)
    settings.policy.lora.path = str(tmp_path / "adapter")
    assert gap(Learner(settings).policy, trained.policy) == 0
    with pytest.raises(FileNotFoundError, match="--out: .*original is not empty"):
        export_run(tmp_path / "run", tmp_path / "original", "original")
