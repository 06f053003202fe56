"""The driver: synchronous and asynchronous training, resume, dead actors, failing scorers.

The actors of all runs are the same, kept by the fixture `office`; every run starts the learner afresh.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from rlpipe.config import Config
from rlpipe.observe.gallery import read_rollouts
from rlpipe.schema_learn import EntropySection
from roles.batch import Batch, ScoresMissing
from roles.group import ActorPool
from roles.placement import grpo_demands
from roles.trainer import Stopped, Trainer
from tests.roles.office import Office, metrics_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def office(cluster, config_for, prompts_file, tmp_path_factory) -> Iterator[Office]:
    office = Office(config_for(tmp_path_factory.mktemp("office"), prompts_file))
    yield office
    office.close()


@pytest.fixture(scope="module")
def undisturbed(office, tmp_path_factory) -> list[dict[str, float]]:
    """Four synchronous steps in which nothing happens."""
    metrics = office.train(office.config(tmp_path_factory.mktemp("undisturbed")))
    assert office.ordinals() == list(range(8))
    return metrics


def test_a_synchronous_step_trains_on_what_its_own_version_drew(undisturbed) -> None:
    assert [row["train/step"] for row in undisturbed] == [1, 2, 3, 4]
    for number, row in enumerate(undisturbed, start=1):
        assert row["train/staleness_max"] == 0 and row["train/policy_version"] == number
        assert row["mismatch/max_abs"] < 1e-4
        assert row["failures/scores"] == row["failures/groups"] == 0
    assert undisturbed[0]["kl/image"] == 0 < undisturbed[3]["kl/image"]
    assert len({row["loss/total"] for row in undisturbed}) == 4


def test_a_run_that_ended_after_its_checkpoint_goes_on_bit_for_bit(office, undisturbed, tmp_path) -> None:
    config = office.config(tmp_path)

    class PowerCut(BaseException):
        """Nothing is saved on the way out, as after kill -9."""

    def cut(step: int, office: Office, trainer: Trainer) -> None:
        if step == 4:
            raise PowerCut

    with pytest.raises(PowerCut):
        office.train(config, cut)
    assert office.ordinals() == list(range(8))
    assert office.train(config) == undisturbed
    assert office.ordinals() == [4, 5, 6, 7]


def test_roles_killed_in_mid_run_change_nothing(office, undisturbed, tmp_path) -> None:
    victims = {1: office.rollout, 2: office.scorers[0], 3: office.reference}
    pids = {}

    def kill(step: int, office: Office, trainer: Trainer) -> None:
        async def now(pool: ActorPool) -> None:
            # The workers draw for the next step by now, or will in a moment.
            pids[pool.role] = await pool.replicas[0].handle.__ray_call__.remote(lambda actor: os.getpid())
            os.kill(pids[pool.role], signal.SIGKILL)

        if step in victims:
            tasks.append(asyncio.ensure_future(now(victims[step])))

    tasks: list[asyncio.Future] = []
    restarts = {pool.role: pool.restarts for pool in victims.values()}
    assert office.train(office.config(tmp_path), kill) == undisturbed
    assert {pool.role: pool.restarts - restarts[pool.role] for pool in victims.values()} == dict.fromkeys(pids, 1)
    assert office.ordinals() == list(range(8)), "every prompt is trained on once"


def test_an_asynchronous_run_overlaps_steps_and_never_exceeds_its_staleness(office, tmp_path) -> None:
    metrics = office.train(office.config(tmp_path, max_staleness=1, train__steps=5))
    staleness = [step - version for step, batch in enumerate(office.trained) for _, version in batch]
    assert max(staleness) == 1
    assert office.ordinals() == list(range(10))
    assert [row["train/policy_version"] for row in metrics] == [1, 2, 3, 4, 5]
    # What the present weights drew is compared, whatever else is in the batch.
    assert [("mismatch/max_abs" in row) for row in metrics] == [row["train/staleness"] < 1 for row in metrics]
    assert all(row.get("mismatch/max_abs", 0) < 1e-4 for row in metrics)


def test_prompts_in_flight_at_an_asynchronous_checkpoint_are_drawn_again_once(office, tmp_path) -> None:
    config = office.config(tmp_path, max_staleness=1)

    def stop(step: int, office: Office, trainer: Trainer) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="SIGTERM"):
        office.train(config, stop)
    before = office.ordinals()
    office.train(config)
    assert sorted(before + office.ordinals()) == list(range(8))


def test_a_stop_saves_the_finished_steps_and_the_run_goes_on_as_if_nothing_was(office, undisturbed, tmp_path) -> None:
    config = office.config(tmp_path)

    def stop(step: int, office: Office, trainer: Trainer) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="SIGINT"):
        office.train(config, stop)
    assert len(metrics_of(tmp_path)) == 1 and (tmp_path / "checkpoints" / "step_000001").is_dir()
    assert office.train(config) == undisturbed


def with_prompts(path: Path, *texts: str) -> str:
    path.write_text("\n".join(texts) + "\n")
    return str(path)


def test_a_group_without_scores_is_dropped_counted_and_replaced_by_the_next_prompt(office, tmp_path) -> None:
    prompts = with_prompts(tmp_path / "p.txt", "one circle", "an unscorable circle", "two squares", "a nan", "a star")
    changes = {
        "data__prompts": prompts,
        "data__shuffle": False,
        "credit__max_failed_share": 0.7,
        "train__steps": 2,
    }
    metrics = office.train(office.config(tmp_path / "run", **changes))
    assert [[ordinal for ordinal, _ in step] for step in office.trained] == [[0, 2], [4, 5]]
    assert [row["failures/groups"] for row in metrics] == [1, 1]
    assert all(row["failures/scores"] >= 3 for row in metrics)


def test_groups_of_equal_rewards_are_replaced_by_the_next_prompts_up_to_the_cap(office, tmp_path) -> None:
    prompts = with_prompts(tmp_path / "p.txt", "one circle", "equal 1", "two squares", "equal 2", "a star")
    changes = {"data__prompts": prompts, "data__shuffle": False, "train__steps": 2, "credit__redraws": 1}
    metrics = office.train(office.config(tmp_path / "run", **changes))
    assert [[ordinal for ordinal, _ in step] for step in office.trained] == [[0, 2], [4, 5]]
    assert [(row["rollout/equal_groups"], row["failures/groups"]) for row in metrics] == [(1, 0), (1, 0)]
    # Where all are equal, a step takes two more for its two prompts, and is content with those.
    changes |= {"data__prompts": with_prompts(tmp_path / "e.txt", *(f"equal {i}" for i in range(5)))}
    metrics = office.train(office.config(tmp_path / "equal", **changes | {"train__steps": 1}))
    assert [[ordinal for ordinal, _ in step] for step in office.trained] == [[2, 3]]
    assert metrics[0]["rollout/equal_groups"] == 2 and metrics[0]["reward/trajectory/std"] == 0


def test_the_weights_of_entropies_move_with_every_step_and_outlive_the_run(office, tmp_path) -> None:
    section = EntropySection("adaptive", image_target=0.0, text_target=100.0)
    changes = {"loss__entropy": section, "train__steps": 2, "train__checkpoint_every": 1}
    whole = office.train(office.config(tmp_path / "whole", **changes))
    assert [row["entropy/image_weight"] for row in whole] == pytest.approx([5e-5, 1e-4], rel=0.05)
    assert [row["entropy/text_weight"] for row in whole] == pytest.approx([-5e-5, -1e-4], rel=0.05)
    assert whole[0]["entropy/image"] > 0 and whole[0]["loss/entropy"] == 0 != whole[1]["loss/entropy"]

    def stop(step: int, office: Office, trainer: Trainer) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    config = office.config(tmp_path / "halves", **changes)
    with pytest.raises(Stopped):
        office.train(config, stop)
    assert office.train(config) == whole


def test_too_many_missing_scores_stop_the_run_with_a_checkpoint_and_name_the_scorer(office, tmp_path) -> None:
    prompts = with_prompts(tmp_path / "p.txt", "one circle", "a square", "unscorable 1", "unscorable 2")
    config = office.config(tmp_path / "run", data__prompts=prompts, data__shuffle=False)
    with pytest.raises(ScoresMissing, match=r"reward/judge: \d+ of its last \d+ scores are missing .*no red in this"):
        office.train(config)
    assert (tmp_path / "run" / "checkpoints" / "step_000001").is_dir()


@pytest.mark.slow
def test_two_learner_ranks_train_as_one(office, undisturbed, tmp_path) -> None:
    config = office.config(tmp_path, learner__ranks=2, train__checkpoint_every=10)
    alone, office.ranks = office.ranks, Trainer(config, grpo_demands(config)["learner"]).ranks

    def stop(step: int, office: Office, trainer: Trainer) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(Stopped):
            office.train(config, stop)
    finally:
        office.ranks.close()
        office.ranks = alone
    for ours, theirs in zip(metrics_of(tmp_path), undisturbed, strict=False):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    # One rank goes on from what two wrote.
    rest = office.train(office.config(tmp_path))
    assert rest[3] == pytest.approx(undisturbed[3], rel=1e-3, abs=1e-4)


def reference_to_nothing(reader: ray.actor.ActorHandle) -> ray.ObjectRef:
    """A reference whose owner is dead, as those of a lost node are; `reader` has noticed it."""

    class Owner:
        def put(self) -> list[ray.ObjectRef]:
            return [ray.put(bytes(1_000_000))]

    def is_gone(actor: object, refs: list[ray.ObjectRef]) -> bool:
        try:
            ray.get(refs, timeout=1)
        except ObjectLostError:
            return True
        except GetTimeoutError:
            pass
        return False

    owner = ray.remote(Owner).options(num_cpus=0).remote()
    (ref,) = ray.get(owner.put.remote())
    ray.kill(owner)
    deadline = time.monotonic() + 60
    while not ray.get(reader.__ray_call__.remote(is_gone, [ref])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return ref


def test_drawn_groups_that_get_lost_are_drawn_again_and_change_nothing(office, undisturbed, tmp_path) -> None:
    lost = reference_to_nothing(office.ranks.replicas[0].handle)

    def lose(step: int, batch: Batch) -> None:
        if step == 2 and batch.lost == 0:
            batch.groups[5] = replace(batch.groups[5], rollouts=lost)

    metrics = office.train(office.config(tmp_path), before_step=lose)
    assert [row.pop("failures/lost_draws") for row in metrics] == [0, 0, 1, 0]
    assert metrics == [{k: v for k, v in row.items() if k != "failures/lost_draws"} for row in undisturbed]
    assert office.ordinals() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]


def reacting(config: Config) -> Config:
    """Every step counts as a slow decline: the KL weight is halved after one step, the reference renewed after two."""
    config.decline.action, config.decline.window, config.decline.patience = "react", 1, 1
    config.decline.cooldown, config.decline.reference_age = 0, 2
    config.decline.slow_fall, config.decline.sharp_fall = -1.0, 1e9
    return config


@pytest.mark.slow
def test_a_renewed_reference_is_the_policy_of_its_step_and_outlives_its_actor_and_the_run(office, tmp_path) -> None:
    whole = office.train(reacting(office.config(tmp_path / "whole")))
    assert [row["decline/renew_reference"] for row in whole] == [0, 1, 0, 1]
    assert [row["decline/reference_step"] for row in whole] == [0, 2, 2, 4]
    assert [row["decline/kl_scale"] for row in whole] == [0.5, 0.5, 0.25, 0.25]
    distances = [row["kl/image"] for row in whole]
    assert distances[1] > 0 and distances[3] > 0
    assert distances[0] == 0 and distances[2] < 1e-9, "what is trained on is what the reference is"
    assert (tmp_path / "whole" / "reference" / "step_000002" / "config.json").is_file()

    def end(step: int, office: Office, trainer: Trainer) -> None:
        if step == 3:
            pid = ray.get(office.reference.replicas[0].handle.__ray_call__.remote(lambda actor: os.getpid()))
            os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGINT)

    config = reacting(office.config(tmp_path / "halves"))
    with pytest.raises(Stopped):
        office.train(config, end)
    assert office.train(config) == whole


def test_samples_of_a_step_are_written_for_the_report(office, tmp_path) -> None:
    changes = {"train__steps": 1, "observe__gallery_size": 4}
    office.train(office.config(tmp_path, **changes))
    (step,) = read_rollouts(tmp_path)
    assert step.step == 1
    assert [row["id"] for row in step.rows] == ["0-0", "1-0", "0-1", "1-1"]
    assert all((step.folder / row["segments"][0]["file"]).is_file() for row in step.rows)
