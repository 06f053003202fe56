"""Rows that leave and rows that take their places: results stay those of each row by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rlpipe.rollout.batch import Batch
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only, draw_rounds, edit, introspect, introspect_rounds
from rlpipe.types import Prompt, Rollout, Sampling
from tests.rollout.naive import TEXTS, Naive, rows, same_tokens

THREE = Sampling(max_images=3, max_reflection_tokens=6)


@pytest.fixture(scope="module")
def decoder(tiny_policy) -> Decoder:
    return Decoder(tiny_policy)


@pytest.fixture
def turns(monkeypatch) -> list[tuple[str, int]]:
    """What was decoded together: the method of `Batch`, and how many rows."""
    seen: list[tuple[str, int]] = []
    image, look = Batch._image, Batch.look
    monkeypatch.setattr(
        Batch,
        "_image",
        lambda self, cache, hidden, positions, rows, rounds: (
            seen.append(("again" if any(rounds) else "first", len(rows)))
            or image(self, cache, hidden, positions, rows, rounds)
        ),
    )
    monkeypatch.setattr(Batch, "look", lambda self, wave: seen.append(("look", len(wave))) or look(self, wave))
    return seen


def same(one: Rollout, other: Rollout) -> bool:
    """Equal ids, tokens and images, and log-probs up to rounding."""
    pairs = list(zip(one.trajectory.segments, other.trajectory.segments, strict=True))
    return (
        one.trajectory.id == other.trajectory.id
        and same_tokens(one, other)
        and one.texts == other.texts
        and all(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))
        and all(np.abs(a.logprobs - b.logprobs).max() < 1e-5 and a.room == b.room for a, b in pairs)
        and all(np.array_equal(a.context_ids, b.context_ids) for a, b in pairs if a.context_ids is not None)
    )


def one_by_one(decoder: Decoder, columns: tuple) -> list[Rollout]:
    return [introspect(decoder, *([value] for value in row))[0] for row in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    "sampling",
    [
        THREE,
        replace(THREE, guidance=2.0, redraw="always", reflection_room="exact"),
        replace(THREE, redraw_context="reencoded"),
        replace(THREE, guidance=2.0, history="all"),
        replace(THREE, history="all", redraw_context="reencoded"),
    ],
    ids=["plain", "guided", "reencoded", "guided, all seen", "all seen, reencoded"],
)
def test_every_limit_draws_what_each_row_draws_alone(decoder, sampling):
    columns = rows(9, sampling)
    alone = one_by_one(decoder, columns)
    assert len({len(rollout.images) for rollout in alone}) > (sampling.redraw == "on_no")
    for limit in (1, 4) if sampling == THREE else (4,):
        assert all(map(same, introspect(decoder, *columns, limit=limit), alone))


def test_the_limit_holds_and_places_of_rows_that_leave_are_taken(decoder, turns):
    rollouts = introspect(decoder, *rows(24, THREE), limit=4)
    again = sum(len(rollout.images) - 1 for rollout in rollouts)
    assert again > 4 and max(count for _, count in turns) == 4
    drawn = {kind: [count for name, count in turns if name == kind] for kind in ("first", "again", "look")}
    assert drawn["first"] == [4] * 6
    assert sum(drawn["again"]) == again and sum(drawn["look"]) == sum(len(r.trajectory.texts) for r in rollouts)
    # The last few rows have nobody to wait for; before them every batch is full.
    last = len(turns) - 1 - turns[::-1].index(("first", 4))
    assert {count for name, count in turns[:last] if name == "again"} == {4}
    assert len(drawn["again"]) < 6, "wave by wave it would be one or two of each"


def test_images_come_in_the_order_of_their_rows_rounds_whatever_the_limit(decoder):
    columns, counted = rows(12, THREE), [0] * 12
    rounds = introspect_rounds(decoder, *columns, limit=3)
    while True:
        try:
            finished = next(rounds)
        except StopIteration as end:
            rollouts = end.value
            break
        for row, image in zip(finished.rows, finished.images, strict=True):
            assert counted[row] == finished.number
            counted[row] += 1
            assert image.shape == (48, 48, 3)
    assert counted == [len(rollout.images) for rollout in rollouts]


def test_rows_that_share_a_room_are_looked_at_together(decoder, turns):
    sampling = replace(THREE, redraw="always", reflection_room="group", max_reflection_tokens=40)
    columns = rows(9, sampling, first_seed=40)
    whole = introspect(decoder, *columns)
    turns.clear()
    assert all(map(same, introspect(decoder, *columns, limit=4), whole))
    assert {count for _, count in turns} == {3}
    with pytest.raises(ValueError, match="rollout.rows: 2 is fewer than the 3 rows of one prompt"):
        introspect(decoder, *columns, limit=2)


def test_drawing_and_editing_keep_to_the_limit(decoder, turns):
    columns = rows(7, Sampling(guidance=2.0))
    sources = [np.full((48, 48, 3), 30 * i, np.uint8) for i in range(7)]
    whole, edited = draw_only(decoder, *columns), edit(decoder, columns[0], sources, *columns[1:])
    turns.clear()
    assert all(map(same, draw_only(decoder, *columns, limit=3), whole))
    assert all(map(same, edit(decoder, columns[0], sources, *columns[1:], limit=3), edited))
    assert [count for _, count in turns] == [3, 3, 1] * 2
    assert [finished.rows for finished in draw_rounds(decoder, *columns, limit=3)] == [(0, 1, 2), (3, 4, 5), (6,)]


def branched(groups: int, branches: int, sampling: Sampling) -> tuple[list[Prompt], list[Sampling], list[str]]:
    """For each prompt `branches` rows that share the first image of the first of them."""
    prompts = [Prompt(f"p{g}", TEXTS[g % 3]) for g in range(groups) for _ in range(branches)]
    samplings = [
        replace(sampling, seed=100 * g + k, first_seed=100 * g if k else None)
        for g in range(groups)
        for k in range(branches)
    ]
    return prompts, samplings, [f"{g}-{k}" for g in range(groups) for k in range(branches)]


@pytest.mark.parametrize(
    ("guidance", "history", "context"),
    [
        (2.0, "last", "sampled"),
        pytest.param(1.0, "last", "reencoded", marks=pytest.mark.slow),
        pytest.param(1.0, "all", "sampled", marks=pytest.mark.slow),
        (2.0, "all", "reencoded"),
    ],
)
def test_branches_share_a_first_image_that_is_drawn_once(tiny_policy, decoder, turns, guidance, history, context):
    sampling = replace(THREE, guidance=guidance, history=history, redraw_context=context, redraw="always")
    columns = branched(3, 3, sampling)
    rollouts = introspect(decoder, *columns, limit=4)
    assert sum(count for name, count in turns if name == "first") == 3
    assert max(count for _, count in turns) <= 4
    for start in range(0, 9, 3):
        branches = rollouts[start : start + 3]
        assert {id(rollout.images[0]) for rollout in branches} == {id(branches[0].images[0])}
        first = [rollout.trajectory.segments[0] for rollout in branches]
        assert len({(id(segment.token_ids), id(segment.logprobs)) for segment in first}) == 1
        assert len({tuple(rollout.trajectory.segments[2].token_ids) for rollout in branches}) == 3
        assert len({tuple(rollout.trajectory.segments[1].token_ids) for rollout in branches}) > 1
    assert Naive(tiny_policy, rollouts[5]).gap() < 1e-4
    alone = one_by_one(decoder, columns)
    assert all(map(same, rollouts, alone))
    assert all(map(same, introspect(decoder, *columns), alone))


def test_rows_of_different_prompts_never_share_a_first_image(decoder):
    prompts = [Prompt("a", TEXTS[0]), Prompt("b", TEXTS[1])]
    one, two = introspect(
        decoder, prompts, [Sampling(seed=1, first_seed=7), Sampling(seed=2, first_seed=7)], ["a", "b"]
    )
    assert not np.array_equal(one.images[0], two.images[0])
