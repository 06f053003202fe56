"""A forecast against what is measured on small models, and against what it must say of large ones."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from trajectories import examples

from rlpipe.config import load_config
from rlpipe.learn.layout import lay_out
from rlpipe.learn.learner import Learner
from rlpipe.learn.replay import replay_logprobs
from rlpipe.paths import ROOT
from rlpipe.policy.activations import activations
from rlpipe.policy.devices import ASSUMED, GIB, GPUS, Figure, device, efficiencies
from rlpipe.policy.forecast import Forecast, forecast_json, forecast_table, make_forecast
from rlpipe.policy.plan import meta_model
from rlpipe.rollout.memory import GPU_SHARE
from rlpipe.schema import Config

FIGURES = {kind: Figure(value, "assumed") for kind, value in ASSUMED.items()}


@cache
def model(name: str):
    return meta_model(ROOT / f"configs/models/janus_pro_{name}.json")


def forecast(config: Config, name: str = "7b", on: str = "h200") -> Forecast:
    return make_forecast(config, model(name), GPUS[on], FIGURES)


def seven(**overrides) -> Config:
    return load_config(ROOT / "configs/janus_pro_7b_grpo.yaml", [f"{key}={value}" for key, value in overrides.items()])


def saved_bytes(learner: Learner, replay) -> int:
    """Bytes of distinct memory that a forward pass leaves behind for its backward pass."""
    known = {tensor.untyped_storage().data_ptr() for tensor in live_tensors()}
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = learner.strategy.forward(replay_logprobs, replay)
    # Selective recomputation keeps what it does not compute again beside autograd's own.
    for tensor in live_tensors():
        keep(tensor)
    del result
    return sum(size for size, _ in held.values())


def live_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_activations_are_what_autograd_keeps(mode, dtype):
    config = load_config(overrides=[f"policy.dtype={dtype}", f"learner.activation_checkpointing={mode}"])
    learner = Learner(config)
    batch = examples(learner.policy, 4, words=24, options=learner.options)
    replay = lay_out([example.item for example in batch], learner.policy.templates, learner.options)
    text, size = learner.policy.janus.config.text_config, getattr(torch, dtype).itemsize
    section = config.learner
    planned = activations(text, 512, replay.num_tokens, section, size, paired=True)
    # Autocast keeps a copy of every weight besides, which a plan counts as gathered.
    copies = sum(p.numel() * size for p in learner.policy.part("language_model").parameters()) if size < 4 else 0
    measured = saved_bytes(learner, replay)
    assert 0.7 * planned.layers < measured < 1.1 * (planned.layers + planned.heads + copies)


def test_the_shares_of_a_rank_fall_with_the_ranks_and_activations_do_not():
    few, many = (forecast(seven(**{"learner.ranks": ranks})).roles["learner rank"].bytes for ranks in (2, 8))
    assert few["moments"] == pytest.approx(4 * many["moments"], rel=1e-3)
    assert few["activations"] == many["activations"]


def test_recomputation_and_a_smaller_budget_take_memory_off():
    def kept(**overrides) -> int:
        return forecast(seven(**overrides)).roles["learner rank"].bytes["activations"]

    by_mode = [kept(**{"learner.activation_checkpointing": mode}) for mode in ("none", "selective", "full")]
    assert by_mode == sorted(by_mode, reverse=True) and by_mode[0] > 5 * by_mode[2]
    assert kept(**{"learner.token_budget": 8192}) < kept()


def test_what_does_not_fit_is_named_with_changes_that_make_it_fit():
    config = seven(**{"learner.ranks": 1})
    found = forecast(config, on="h100")
    (problem,) = found.problems
    assert problem.startswith("learner rank: ") and "GiB of 78 usable on h100" in problem
    for change in ("learner.ranks 2", "policy.lora.rank 64"):
        assert change in problem
        key, value = change.split()
        assert forecast(seven(**{"learner.ranks": 1, key: value}), on="h100").problems == []


def test_rows_that_a_worker_would_refuse_are_named():
    fit = forecast(seven(), on="h100").rows[1]
    (problem,) = forecast(seven(**{"rollout.rows": fit + 1}), on="h100").problems
    assert problem.startswith(f"rollout worker: {fit + 1} rows at once") and problem.endswith(f"rollout.rows {fit}")


def test_roles_that_share_a_gpu_are_added_up():
    shares = {"rollout.num_gpus": 0.4, "rollout.workers": 1, "learner.num_gpus": 0.4, "learner.ranks": 1}
    config = seven(**shares, **{"reference.num_gpus": 0.1, "reward.0.num_gpus": 0.1, "policy.lora.rank": 16})
    found = forecast(config)
    (held,) = (held for _, held in found.gpus)
    assert held == sum(role.total for role in found.roles.values())
    apart = forecast(load_apart(config))
    assert len(apart.gpus) == len(found.roles)


def load_apart(config: Config) -> Config:
    config.rollout.num_gpus = config.learner.num_gpus = config.reference.num_gpus = config.reward[0].num_gpus = 1
    return config


def test_a_reference_that_is_the_base_of_the_adapters_has_no_actor():
    config = seven(**{"policy.lora.rank": 16, "reference.context": "own"})
    assert "reference" not in forecast(config).roles and "reference" in forecast(seven()).roles
    assert forecast(config).seconds["reference"] > 0


def test_a_rollout_worker_has_room_for_as_many_rows_as_memory_leaves():
    small, large = (forecast(seven(), on=name) for name in ("h100", "h200"))
    row = small.roles["rollout worker"].bytes["rows"] / small.rows[0]
    assert large.rows[1] - small.rows[1] == pytest.approx(GPU_SHARE * 61 * GIB / row, abs=1)


def test_more_of_everything_is_faster_and_stale_samples_overlap():
    base = forecast(seven()).seconds
    assert forecast(seven(), on="a100").seconds["learn"] > 3 * base["learn"]
    assert forecast(seven(**{"learner.ranks": 8})).seconds["learn"] == pytest.approx(base["learn"] / 2)
    assert forecast(seven(**{"rollout.workers": 4})).seconds["draw"] == pytest.approx(base["draw"] / 2)
    assert forecast(seven(**{"max_staleness": 1, "loss.logits": "guided"})).seconds["step"] < base["step"]


def test_figures_of_ones_own_replace_the_tables():
    own = device("h100").given(1e15, None, 96)
    assert (own.flops("bfloat16"), own.bandwidth, own.memory) == (1e15, GPUS["h100"].bandwidth, 96 * GIB)
    assert device("h100").given(None, None, None) is GPUS["h100"]
    with pytest.raises(ValueError, match="--device: 'h300' is none of h200, h100, a100, cpu"):
        device("h300")


def test_measured_shares_replace_assumed_ones_and_say_where_they_are_from(tmp_path):
    (tmp_path / "learner_small.json").write_text('{"hardware": "x86_64, 2 cores", "size": "small", "mfu": 0.5}')
    (tmp_path / "learner_tiny.json").write_text('{"hardware": "x86_64, 2 cores", "size": "tiny", "mfu": 0.1}')
    (tmp_path / "suite.json").write_text(
        '{"hardware": "NVIDIA H200", "parts": {"rollout 7b": {"runs": [{"engine": "native", "share_of_limit": 0.6}]}}}'
    )
    assert efficiencies("cpu", tmp_path)["learner"] == Figure(0.5, "learner_small.json, small")
    assert efficiencies("h200", tmp_path)["rollout"] == Figure(0.6, "suite.json, 7b")
    assert efficiencies("a100", tmp_path)["rollout"].source == "assumed"


def test_the_table_names_every_role_and_the_source_of_every_share():
    found = forecast(seven())
    table = forecast_table(found)
    assert all(role in table for role in found.roles) and table.count("(assumed)") == 3
    assert forecast_json(found)["roles"]["learner rank"]["total"] == found.roles["learner rank"].total
    assert "Everything fits." in table and "Does not fit." in forecast_table(replace(found, problems=["x"]))


@pytest.mark.parametrize(("file", "name"), [("1b_one_gpu", "1b"), ("7b_one_node", "7b"), ("7b_nodes", "7b")])
def test_the_configurations_of_the_scale_page_fit_their_gpus(file, name):
    found = forecast(load_config(ROOT / f"configs/janus_pro_{file}.yaml"), name, "h100")
    assert found.problems == []
    assert len(found.gpus) == {"1b_one_gpu": 1, "7b_one_node": 8, "7b_nodes": 32}[file]


@pytest.mark.slow
def test_the_command_ends_with_1_where_something_does_not_fit():
    command = [sys.executable, "launch/plan.py", "--config", "configs/janus_pro_7b_grpo.yaml"]
    command += ["--model", "configs/models/janus_pro_7b.json", "--device", "h200"]
    fits = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert fits.returncode == 0 and "Everything fits." in fits.stdout
    large = subprocess.run([*command, "--device", "h100", "learner.ranks=1"], cwd=ROOT, capture_output=True, text=True)
    assert large.returncode == 1 and "Does not fit. learner rank" in large.stdout
    wrong = subprocess.run([*command, "--device", "h300"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("--device: 'h300'")
