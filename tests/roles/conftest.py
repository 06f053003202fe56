"""One local Ray for the tests of the roles, and one small policy."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rlpipe.config import Config
from rlpipe.world.models import build_policy

HERE = Path(__file__).parent


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Four virtual CPUs, because a test's actors wait for each other most of the time."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    before = {name: os.environ.get(name) for name in (*environment, "RAY_ADDRESS")}
    os.environ.update(environment)
    sys.path.insert(0, str(HERE))
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        yield
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.path.remove(str(HERE))


@pytest.fixture(scope="session")
def small_policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Janus of 32 channels."""
    path = tmp_path_factory.mktemp("small_policy")
    build_policy(
        0, hidden=32, layers=1, heads=2, intermediate=64, vision_hidden=32, vision_layers=1, vq_channels=32
    ).save(path)
    return path


@pytest.fixture(scope="session")
def config_for(small_policy_path: Path):
    """`config_for(run_dir, prompts_file)`: two prompts of three trajectories a step, one worker, Red as the scorer."""

    def make(run_dir: Path, prompts: Path) -> Config:
        config = Config()
        config.run.dir, config.policy.path = str(run_dir), str(small_policy_path)
        config.data.prompts = config.evaluate.prompts = str(prompts)
        config.train.steps, config.train.prompts_per_step, config.train.group_size = 4, 2, 3
        config.train.checkpoint_every, config.observe.gallery_every = 2, 100
        config.rollout.groups_per_call, config.rollout.max_reflection_tokens = 1, 4
        config.rollout.threads = config.reference.threads = config.learner.threads = 1
        config.reward[0].scorer, config.reward[0].path = "role_scorers:Red", None
        config.reward[0].threads, config.reward[0].retries = 1, 0
        config.observe.terminal = "off"
        return config

    return make


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(
        "".join(f"a photo of {n} {c} circles\n" for n in ("two", "three") for c in ("red", "blue", "green"))
    )
    return path
