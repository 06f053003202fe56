"""A reinforcement run that trains adapters: its reference is the base, so nobody else holds a copy of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from rlpipe.config import Config
from rlpipe.learn.checkpoint import latest_checkpoint, read_weights
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.lora import merge
from roles.placement import grpo_demands
from roles.trainer import Stopped, Trainer
from tests.roles.office import Office

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def with_adapters(config: Config) -> Config:
    config.policy.lora.rank, config.policy.lora.alpha, config.learner.lr = 4, 8.0, 1e-2
    config.train.steps, config.train.checkpoint_every = 3, 1
    return config


@pytest.fixture(scope="module")
def office(cluster, config_for, prompts_file, tmp_path_factory) -> Iterator[Office]:
    office = Office(with_adapters(config_for(tmp_path_factory.mktemp("office"), prompts_file)))
    yield office
    office.close()


def of_worker(office: Office) -> dict[str, torch.Tensor]:
    """The weights that a rollout worker holds."""

    def weights(actor) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in actor.policy.janus.state_dict().items()}

    return ray.get(office.rollout.replicas[0].handle.__ray_call__.remote(weights))


@pytest.mark.slow
def test_adapters_train_against_their_base_reach_the_workers_and_go_on_after_a_stop(office, tmp_path: Path) -> None:
    assert office.reference is None and "reference" not in grpo_demands(office.base)
    config = office.config(tmp_path / "whole")
    whole = office.train(config)
    first, *_, last = whole
    assert first["loss/ratio_mean"] == pytest.approx(1.0, abs=1e-4) and first["mismatch/max_abs"] < 1e-4
    assert first["kl/image"] == pytest.approx(0.0, abs=1e-9) and last["kl/image"] > 1e-6
    assert all(row["mismatch/max_abs"] < 1e-4 for row in whole)
    adapters = read_weights(latest_checkpoint(tmp_path / "whole" / "checkpoints"))
    assert adapters and all(".lora_" in name for name in adapters)
    policy = JanusPolicy.load(config.policy.path)
    base = {name: tensor.clone() for name, tensor in policy.janus.state_dict().items()}
    merge(policy, adapters, config.policy.lora)
    held = of_worker(office)
    for name, tensor in policy.janus.state_dict().items():
        torch.testing.assert_close(held[name], tensor, atol=1e-6, rtol=0, msg=name)
    assert any(not torch.equal(held[name], base[name]) for name in base)

    def stop(step: int, office: Office, trainer: Trainer) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    config = office.config(tmp_path / "halves")
    with pytest.raises(Stopped):
        office.train(config, stop)
    assert latest_checkpoint(tmp_path / "halves" / "checkpoints").name == "step_000002"
    assert office.train(config) == whole


def test_a_save_that_fails_and_a_checkpoint_that_is_damaged_are_told_counted_and_survived(
    office, tmp_path: Path, capsys
) -> None:
    config = office.config(tmp_path, train__checkpoint_async="always", train__steps=3)
    config.observe.terminal = "plain"
    obstacle = tmp_path / "checkpoints" / ".unfinished_step_000002"

    def block(step: int, office: Office, trainer: Trainer) -> None:
        if step == 1:
            obstacle.parent.mkdir(parents=True)
            obstacle.write_text("no folder can have this name")
        if step == 3:
            obstacle.unlink()

    assert office.train(config, block)[-1]["failures/saves"] == 1
    assert "no checkpoint of step 2: checkpoint: FileExistsError" in capsys.readouterr().out.replace("\n", "")
    data = tmp_path / "checkpoints" / "step_000003" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    config.train.steps = 4
    rows = office.train(config)
    told = capsys.readouterr().out.replace("\n", "")
    assert "step_000003: __0_0.distcp has CRC-32" in told and "resume: step 1" in told
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4]
    assert [row["failures/damaged_checkpoints"] for row in rows] == [0, 1, 1, 1]


def test_a_run_leaves_policies_for_others_while_it_goes_on(office, tmp_path: Path) -> None:
    config = office.config(tmp_path, train__steps=2, train__export_every=2)
    office.train(config)
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step_000002"]
    exported = JanusPolicy.load(tmp_path / "exports" / "step_000002").janus.state_dict()
    held = of_worker(office)
    assert all(torch.equal(held[name], tensor) for name, tensor in exported.items())
