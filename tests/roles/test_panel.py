"""Several scorers of a run: what each is asked and when, replicas that are lost, failures, the canary."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from rlpipe.config import Config, CreditSection, ScorerSection
from rlpipe.observe.tracker import read_metrics
from rlpipe.types import ImageScore, Score
from roles.batch import ScoredGroup, ScoresMissing, canary_correlations, part_means
from roles.group import ActorPool
from roles.panel import FailureWindow
from roles.placement import grpo_demands
from roles.pools import scorer_pools
from roles.trainer import Trainer
from tests.roles.office import Office
from tests.roles.role_workers import PatientWorker

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def scorer(name: str, log: Path, **keys) -> ScorerSection:
    common = {"path": None, "threads": 1, "num_cpus": 0.1, "retries": 0, "backoff_s": 0.0}
    return ScorerSection(name=name, scorer="role_scorers:Recorder", options={"log": str(log)}, **common | keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("panel")


@pytest.fixture(scope="module")
def config(config_for, prompts_file, folder) -> Config:
    """A judge of two replicas that sees first images, a scorer of final images and their verdicts, a canary."""
    config = config_for(folder / "run", prompts_file)
    config.train.steps, config.rollout.groups_per_call = 2, 2
    config.reward = [
        scorer("judge", folder / "judge", sees=["first_image"], replicas=2, weight=0.5),
        scorer("style", folder / "style", sees=["final_image", "verdict"], rewards=["generation"], weight=0.25),
        scorer("watch", folder / "watch", weight=0.0, canary=True),
    ]
    return config


@pytest.fixture(scope="module")
def office(cluster, config, folder) -> Iterator[Office]:
    office = Office(config)
    office.rollout = patient_pool(config, folder / "judge")
    yield office
    office.close()


def patient_pool(config: Config, log: Path) -> ActorPool:
    actor = ray.remote(PatientWorker).options(**grpo_demands(config)["rollout"].options)
    return ActorPool("rollout", lambda index: actor.remote(config, index, str(log)))


def calls(log: Path) -> list[list[tuple[str, str | None]]]:
    return [[tuple(pair) for pair in json.loads(line)] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(office, folder) -> list[dict[str, float]]:
    """Two steps. They end only because scorers are asked while the worker has not ended its call: it waits for that."""
    metrics = office.train(office.config(folder / "undisturbed"))
    for name in ("judge", "style", "watch"):
        (folder / name).rename(folder / f"{name}.undisturbed")
    (folder / "judge").write_text((folder / "judge.undisturbed").read_text())
    return metrics


def test_each_scorer_is_asked_about_its_images_alone(undisturbed, folder) -> None:
    asked = {n: [p for call in calls(folder / f"{n}.undisturbed") for p in call] for n in ("judge", "style", "watch")}
    trajectories = {f"{ordinal}-{member}" for ordinal in range(4) for member in range(3)}
    assert sorted(name for name, _ in asked["judge"]) == sorted(f"{name}/0" for name in trajectories)
    every = {name for name, _ in asked["watch"]}
    assert every > {name for name, _ in asked["judge"]}
    last = {name.split("/")[0]: name for name in sorted(every)}
    assert sorted(name for name, _ in asked["style"]) == sorted(last.values())
    for name, verdict in asked["style"]:
        assert verdict is None if name.endswith("/1") else verdict.startswith("Yes"), "the final image's own verdict"
    assert all(verdict is None for _, verdict in asked["judge"] + asked["watch"])


def test_the_parts_of_the_reward_and_the_canary_are_logged(undisturbed) -> None:
    for row in undisturbed:
        assert 0 < row["reward/judge/mean"] < 1 and 0 < row["reward/style/mean"] < 1
        assert row["reward/first/mean"] == pytest.approx(0.5 * row["reward/judge/mean"])
        assert 0 < row["canary/watch/mean"] < 1 and -1 <= row["canary/watch/correlation"] <= 1
        assert "reward/watch/mean" not in row
        assert row["failures/scores"] == row["failures/judge/missing"] == row["failures/watch/attempts"] == 0


def with_scorer(office: Office, place: int, **changes) -> list[ActorPool]:
    """The office's scorers, one of them another one; the workers need not know."""
    config = office.config(Path("unused"))
    config.reward[place] = replace(config.reward[place], **changes)
    demands = grpo_demands(config)
    pools = list(office.scorers)
    pools[place] = scorer_pools(config, demands)[place]
    return pools


def train_with(office: Office, config: Config, pools: list[ActorPool], **hooks) -> list[dict[str, float]]:
    ours, office.scorers = office.scorers, pools
    try:
        return office.train(config, **hooks)
    finally:
        office.scorers = ours
        for pool in pools:
            if pool not in ours:
                pool.close()


def same(rows: list[dict[str, float]], others: list[dict[str, float]]) -> bool:
    """Equal in all but what was counted on the way."""
    kept = [{k: v for k, v in row.items() if not k.startswith("failures/")} for row in rows]
    return kept == [{k: v for k, v in row.items() if not k.startswith("failures/")} for row in others]


@pytest.mark.slow
def test_a_judge_loses_one_of_two_replicas_for_good_and_the_run_goes_on_to_the_same_numbers(
    office, undisturbed, tmp_path
) -> None:
    pools = with_scorer(office, 0)
    pools[0]._failures = 0

    def kill(step: int, office: Office, trainer: Trainer) -> None:
        if step == 1:
            os.kill(ray.get(pools[0].replicas[0].handle.__ray_call__.remote(lambda actor: os.getpid())), signal.SIGKILL)

    metrics = train_with(office, office.config(tmp_path), pools, on_step=kill)
    assert metrics == undisturbed
    assert len(pools[0].replicas) == 1 and pools[0].given_up == 1


def test_failures_of_every_kind_are_tried_again_and_counted_and_change_nothing(office, undisturbed, tmp_path) -> None:
    log = tmp_path / "failures"
    pools = with_scorer(
        office, 0, scorer="role_scorers:Flaky", options={"log": str(log)}, retries=3, batch_size=1, replicas=1
    )
    config = office.config(tmp_path)
    metrics = train_with(office, config, pools)
    assert same(metrics, undisturbed)
    failed, rows = log.read_text().split(), read_metrics(tmp_path).rows
    assert {"raise", "short", "nan", "none", "timeout"} == set(failed)
    counts = {name: sum(row[f"failures/judge/{name}"] for row in rows) for name in ("attempts", "retries", "timeouts")}
    assert counts == {"attempts": len(failed), "retries": len(failed), "timeouts": failed.count("timeout")}
    assert sum(row["failures/judge/missing"] for row in rows) == 0


@pytest.mark.slow
def test_a_scorer_that_hangs_is_replaced_and_asked_again(office, undisturbed, tmp_path) -> None:
    options = {"marker": str(tmp_path / "marker")}
    pools = with_scorer(office, 1, scorer="role_scorers:HangsOnce", options=options, timeout_s=2.0)
    metrics = train_with(office, office.config(tmp_path), pools)
    assert same(metrics, undisturbed)
    assert pools[1].restarts == 1 and pools[1].counts()["failures/reward/style/retries"] == 1


def test_a_scorer_that_always_fails_ends_the_run_with_a_checkpoint_its_name_and_the_reason(office, tmp_path) -> None:
    pools = with_scorer(office, 1, scorer="role_scorers:Raises", options={})
    with pytest.raises(ScoresMissing, match=r"reward/style: (\d+) of its last \1 scores .*100%.*the service is down"):
        train_with(office, office.config(tmp_path), pools)
    assert (tmp_path / "checkpoints" / "step_000000").is_dir()


def test_a_canary_that_fails_is_counted_and_changes_nothing(office, undisturbed, tmp_path) -> None:
    pools = with_scorer(office, 2, scorer="role_scorers:Raises", options={})
    metrics = train_with(office, office.config(tmp_path), pools)
    assert all(row["failures/watch/missing"] > 0 and row["failures/groups"] == 0 for row in metrics)
    assert [row["loss/total"] for row in metrics] == [row["loss/total"] for row in undisturbed]
    assert not any(name.startswith("canary/") for row in metrics for name in row)


def scores(*values: float | None) -> list[Score]:
    return [Score("x", value, error=None if value is not None else "busy") for value in values]


def test_the_window_remembers_across_steps_and_forgets_what_is_old() -> None:
    window = FailureWindow("judge", CreditSection(max_failed_share=0.5, failed_window=8), step_size=4)
    window.add(scores(None, None, None))  # less than a step's worth says nothing
    window.add(scores(0.5, 0.5, 0.5))
    window.add(scores(0.5, 0.5, None, None))  # the first two are forgotten
    with pytest.raises(ScoresMissing, match=r"reward/judge: 5 of its last 8 scores are missing \(62%\).*busy"):
        window.add(scores(None, None, None))


def test_a_window_is_never_shorter_than_a_step() -> None:
    window = FailureWindow("judge", CreditSection(max_failed_share=0.5, failed_window=1), step_size=4)
    window.add(scores(0.5, 0.5, None, None))
    with pytest.raises(ScoresMissing):
        window.add(scores(None))


def group(*members: tuple[dict[str, float], ...]) -> ScoredGroup:
    images = (tuple(ImageScore("x", 0.0, parts) for parts in member) for member in members)
    return ScoredGroup(None, None, tuple(images), None)


def test_a_canary_is_correlated_with_the_reward_over_the_trajectories_that_have_both() -> None:
    canary = [ScorerSection(name="watch", weight=0.0, canary=True)]
    watched = ({"watch": 0.1},), ({"watch": 0.2}, {"watch": 0.4}), ({},), ({"watch": 0.5},)
    groups = [group(*watched[:2]), group(*watched[2:])]
    both = np.array([1.0, 3.0, 9.0, 5.0])
    assert canary_correlations(canary, groups, both) == {"canary/watch/correlation": pytest.approx(1.0)}
    assert canary_correlations(canary, groups, -both) == {"canary/watch/correlation": pytest.approx(-1.0)}
    assert canary_correlations(canary, groups, np.array([1.0, np.nan, 2.0, np.nan])) == {}
    assert canary_correlations(canary, groups, np.ones(4)) == {}


def test_means_are_over_the_images_that_a_scorer_looked_at() -> None:
    sections = [ScorerSection(name="judge"), ScorerSection(name="watch", weight=0.0, canary=True)]
    images = [{"judge": 0.5, "judge/line": 1.0}, {"judge": 1.0, "watch": 0.25}, {}]
    (whole,) = group(tuple(images)).scores
    assert part_means(sections, whole) == {
        "reward/judge/mean": 0.75,
        "reward/judge/line": 1.0,
        "canary/watch/mean": 0.25,
    }
