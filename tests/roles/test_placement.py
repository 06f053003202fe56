"""Where actors run, and what is said when they cannot."""

from __future__ import annotations

import pytest

from rlpipe.config import Config
from roles.placement import Demand, PlacementError, check, grpo_demands, with_absolute_paths


def test_the_default_run_fits_on_two_cpus() -> None:
    check(grpo_demands(Config()), [{"CPU": 2.0}])


def test_without_a_kl_term_there_is_no_reference_actor() -> None:
    config = Config()
    assert "reference" in grpo_demands(config)
    config.loss.kl_beta = 0.0
    assert "reference" not in grpo_demands(config)


def test_too_many_actors_are_told_with_roles_numbers_and_the_keys_to_change() -> None:
    config = Config()
    config.rollout.workers = 8
    with pytest.raises(PlacementError) as error:
        check(grpo_demands(config), [{"CPU": 2.0}])
    for part in ("ask for 5.5 CPU", "there are 2", "rollout 8 x 0.5 (rollout.workers)", "placement.local_cpus"):
        assert part in str(error.value)


def test_an_actor_larger_than_any_node_is_refused_although_the_cluster_is_large_enough() -> None:
    demands = {"learner": Demand("learner", 1, 0.5, 4, "learner.ranks")}
    with pytest.raises(PlacementError, match="learner: one actor asks for 4 GPU, the largest node has 2"):
        check(demands, [{"CPU": 8.0, "GPU": 2.0}] * 4, local=False)


def test_actors_get_absolute_paths_and_the_callers_configuration_stays_as_it_is() -> None:
    config = Config()
    config.reference.path = config.policy.path
    there = with_absolute_paths(config)
    paths = (there.run.dir, there.policy.path, there.reference.path, there.reward[0].path)
    assert all(path.startswith("/") for path in paths)
    assert there.reference.path == there.policy.path
    config.reward[0].scorer, config.reward[0].options = "decomposed", {"questions": "q.jsonl", "writer": {"model": "m"}}
    options = with_absolute_paths(config).reward[0].options
    assert options["questions"].startswith("/") and options["writer"]["cache"].startswith("/")
    assert config.reward[0].options == {"questions": "q.jsonl", "writer": {"model": "m"}}
    assert config.run.dir == Config().run.dir and config.reward[0].path == Config().reward[0].path
