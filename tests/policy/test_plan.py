from __future__ import annotations

import json
import subprocess
import sys
from math import prod

import pytest
import torch

from rlpipe.learn.learner import Learner
from rlpipe.paths import ROOT
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.plan import make_plan, parts_of, plan_table
from rlpipe.schema import Config
from tests.learn.builders import config

MODELS = ROOT / "configs/models"


def settings(dtype: str = "bfloat16", ranks: int = 1, lora: int = 0) -> Config:
    result = Config()
    result.policy.dtype, result.policy.lora.rank, result.learner.ranks = dtype, lora, ranks
    return result


@pytest.mark.parametrize(("model", "billions"), [("janus_pro_1b.json", 2.09), ("janus_pro_7b.json", 7.42)])
def test_the_published_models_have_their_published_sizes(model, billions):
    count = sum(prod(row.shape) for row in make_plan(settings(), MODELS / model).rows)
    # The published files hold the vision tower's unused pooling head (1024 wide, mlp ratio 4) besides.
    head = 12 * 1024**2 + 12 * 1024
    assert round((count + head) / 1e9, 2) == billions


def test_a_plan_of_one_rank_is_what_the_learner_holds(tiny_policy_path):
    run = config(tiny_policy_path)
    learner, plan = Learner(run), make_plan(run)
    held = {name: p.nbytes for name, p in learner.policy.janus.named_parameters()}
    assert {row.name: row.weights for row in plan.rows} == held
    moments = sum(t.nbytes for n, t in learner.state_dict().items() if ".exp_avg" in n)
    assert plan.roles["learner rank"]["moments"] == moments
    assert plan.roles["learner rank"]["gradients"] == sum(p.nbytes for p in learner.parameters.values())
    sampler = JanusPolicy.load(tiny_policy_path, torch.bfloat16)
    run.policy.dtype = "bfloat16"
    total = make_plan(run).roles["rollout worker"]["weights"]
    assert total == sum(p.nbytes for p in sampler.janus.parameters())


def test_ranks_share_everything_but_the_vq_tokenizer():
    one, eight = (make_plan(settings(ranks=ranks), MODELS / "janus_pro_7b.json") for ranks in (1, 8))
    whole, shared = parts_of(one), parts_of(eight)
    assert whole["vqmodel"]["weights"] == shared["vqmodel"]["weights"]
    for part in whole.keys() - {"vqmodel"}:
        assert shared[part]["weights"] == pytest.approx(whole[part]["weights"] / 8, rel=1e-3)
    assert eight.roles["rollout worker"] == one.roles["rollout worker"]


def test_only_trained_parts_have_gradients_and_moments():
    run = settings()
    run.policy.trainable = ["aligner", "lm_head"]
    parts = parts_of(make_plan(run, MODELS / "janus_pro_1b.json"))
    assert {name for name, part in parts.items() if part["gradients"]} == {"aligner", "lm_head"}
    assert all(part["moments"] == 2 * part["gradients"] for part in parts.values())


def test_adapters_train_in_place_of_the_base_and_reach_no_sampler():
    base, lora = (make_plan(settings(lora=rank), MODELS / "janus_pro_7b.json") for rank in (0, 16))
    adapters = [row for row in lora.rows if row.trained]
    assert adapters and all("lora_" in row.name and row.sampler == 0 for row in adapters)
    # Two matrices for each of seven layers in each of 30 blocks: 16 x (inputs + outputs).
    expected = 30 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert sum(prod(row.shape) for row in adapters) == expected
    assert lora.roles["rollout worker"] == base.roles["rollout worker"]
    assert lora.roles["learner rank"]["total"] < base.roles["learner rank"]["total"] / 5


def test_the_table_names_every_part_and_on_request_every_parameter():
    plan = make_plan(settings(ranks=8), MODELS / "janus_pro_1b.json")
    short, long = plan_table(plan), plan_table(plan, parameters=True)
    assert all(part in short for part in parts_of(plan))
    assert all(row.name in long for row in plan.rows) and plan.rows[0].name not in short


@pytest.mark.slow
def test_the_command_prints_json_and_names_a_missing_model():
    command = [sys.executable, "launch/plan.py", "--json", "--model"]
    done = subprocess.run(
        [*command, "configs/models/janus_pro_1b.json", "learner.ranks=2"], cwd=ROOT, capture_output=True, text=True
    )
    document = json.loads(done.stdout)
    assert document["ranks"] == 2 and document["roles"]["learner rank"]["total"] > 0
    wrong = subprocess.run([*command, "nowhere.json"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("--model: no file")
