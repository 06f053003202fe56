"""Fixtures shared by all tests: small random models of the real classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.models import build_policy

torch.set_num_threads(1)


def small_policy(seed: int = 0) -> JanusPolicy:
    """A random Janus of 48 x 48 pixels, narrow enough for tests."""
    return build_policy(
        seed, hidden=64, layers=2, heads=2, intermediate=128, vision_hidden=64, vision_layers=1, vq_channels=32
    )


@pytest.fixture(scope="session")
def tiny_policy() -> JanusPolicy:
    return small_policy()


@pytest.fixture(scope="session")
def tiny_policy_path(tiny_policy: JanusPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    tiny_policy.save(path)
    return path
