"""The work that no engine can avoid, against counts by hand."""

from __future__ import annotations

import pytest

from benchmarks.limits import Machine, Phase, Unavoidable, Work
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Sampling
from tests.rollout.naive import rows

HIDDEN, LAYERS, MLP, CODES, BYTES, TOKENS = 64, 2, 128, 512, 4, 36
"""Of the small test policy, in float32."""


@pytest.fixture(scope="module")
def unavoidable(tiny_policy) -> Unavoidable:
    return Unavoidable(tiny_policy)


def test_an_image_reads_every_weight_once_per_step_for_all_rows(unavoidable):
    few, many = (unavoidable.images(1, rows, 10, 2)["draw"].works for rows in (1, 5))
    norms = 2 * HIDDEN
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP + norms)
    assert few["layers"].bytes == many["layers"].bytes == (TOKENS - 1) * weights * BYTES
    assert many["layers"].operations == 5 * few["layers"].operations == 5 * (TOKENS - 1) * 2 * weights * 2


def test_attention_sees_one_slot_more_at_every_token(unavoidable):
    attention = unavoidable.images(1, 1, 10, 1)["draw"].works["attention"]
    slots = [10 + token for token in range(1, TOKENS)]
    assert attention.operations == pytest.approx(4 * HIDDEN * LAYERS * sum(slots))
    # keys and values of all slots are read, those of the newest were written before
    assert attention.bytes == pytest.approx(2 * HIDDEN * LAYERS * BYTES * sum(slot + 1 for slot in slots))


def test_guidance_doubles_the_rows_and_not_the_pixels(unavoidable):
    plain, guided = (unavoidable.images(2, 4, 10, per_row) for per_row in (1, 2))
    assert guided["draw"].works["layers"].operations == 2 * plain["draw"].works["layers"].operations
    assert guided["decode pixels"].works == plain["decode pixels"].works


def test_only_who_said_no_draws_again(tiny_policy, unavoidable):
    rollouts = introspect(Decoder(tiny_policy), *rows(6, Sampling(max_reflection_tokens=8)))
    seconds = sum(len(rollout.images) == 2 for rollout in rollouts)
    assert 0 < seconds < 6
    phases = unavoidable.trajectories(rollouts)
    drawn, redrawn = (phases[name].works["head"].operations for name in ("draw", "redraw"))
    assert redrawn / drawn == pytest.approx(seconds / 6)
    accepted = [rollout for rollout in rollouts if len(rollout.images) == 1]
    assert "redraw" not in unavoidable.trajectories(accepted)


def test_the_limit_adds_what_has_to_wait_and_overlaps_nothing_else():
    phase, machine = Phase(), Machine(flops=10.0, bandwidth=1.0)
    phase.add("layers", 100.0, 2.0)
    phase.add("attention", 10.0, 8.0)
    assert Work(100.0, 2.0).seconds(machine) == 10.0
    assert phase.seconds(machine) == 10.0 + 8.0
    assert phase.overlapped(machine) == 11.0
