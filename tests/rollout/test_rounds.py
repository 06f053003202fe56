"""More than two images, what decides how many there are, and edits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import edit, introspect
from rlpipe.types import Sampling
from tests.rollout.naive import Naive, rows, same_tokens


@pytest.fixture(scope="module")
def decoder(tiny_policy) -> Decoder:
    return Decoder(tiny_policy)


@pytest.mark.parametrize("room", ["fixed", "exact", "group"])
@pytest.mark.parametrize("context", ["sampled", "reencoded"])
@pytest.mark.parametrize("history", ["last", "all"])
def test_three_images_are_drawn_and_looked_at_as_full_forwards_say(tiny_policy, decoder, history, context, room):
    sampling = Sampling(
        guidance=2.0,
        max_reflection_tokens=40,
        max_images=3,
        redraw="always" if room == "group" else "on_no",
        redraw_context=context,
        history=history,
        reflection_room=room,
    )
    rollouts = introspect(decoder, *rows(8, sampling))
    assert max(len(rollout.images) for rollout in rollouts) == 3
    for rollout in rollouts:
        assert Naive(tiny_policy, rollout).gap() < 1e-4


def test_a_row_goes_on_until_it_says_yes_and_the_last_image_is_not_looked_at(decoder):
    rollouts = introspect(decoder, *rows(24, Sampling(max_images=3, max_reflection_tokens=8)))
    assert {len(rollout.images) for rollout in rollouts} == {1, 2, 3}
    for rollout in rollouts:
        trajectory, count = rollout.trajectory, len(rollout.images)
        assert [s.kind for s in trajectory.segments] == (["image", "text"] * count)[: 5 if count == 3 else 2 * count]
        assert trajectory.verdicts == (False,) * (count - 1) + (True,) * (count < 3)
        assert len(trajectory.truncated) == len(trajectory.verdicts)
        assert trajectory.final_image == 2 * (count - 1)


@pytest.mark.parametrize("history", ["last", "all"])
def test_rows_that_have_stopped_are_decoded_no_more(tiny_policy, history):
    class Counting(Decoder):
        sizes: list[int] = []

        def extend(self, cache, embeddings, positions, valid=None):
            self.sizes.append(len(embeddings))
            return super().extend(cache, embeddings, positions, valid)

    decoder, count = Counting(tiny_policy), tiny_policy.num_image_tokens
    rollouts = introspect(decoder, *rows(12, Sampling(max_images=3, history=history, max_reflection_tokens=1)))
    drawn = [sum(len(rollout.images) > number for rollout in rollouts) for number in range(3)]
    assert 12 > drawn[1] > drawn[2] > 0
    steps = decoder.sizes[-(count - 1) :], decoder.sizes[-2 * count : -count - 1]
    assert set(steps[0]) == {drawn[2]} and set(steps[1]) == {drawn[1]}


def test_two_images_are_the_same_whether_all_or_the_last_is_looked_back_at(decoder):
    for context in ("sampled", "reencoded"):
        one, two = (
            introspect(decoder, *rows(6, Sampling(guidance=2.0, redraw_context=context, history=history)))
            for history in ("last", "all")
        )
        assert all(map(same_tokens, one, two))


def test_a_group_shares_the_room_of_its_longest_reflection(decoder):
    sampling = Sampling(max_images=3, redraw="always", reflection_room="group", max_reflection_tokens=60)
    rollouts = introspect(decoder, *rows(6, sampling, first_seed=40))
    for number in (1, 3):
        for prompt in range(3):
            group = [rollout.trajectory.segments[number] for rollout in rollouts[prompt::3]]
            assert {segment.room for segment in group} == {max(map(len, group))}
    assert len({rollout.trajectory.segments[1].room for rollout in rollouts}) > 1


def test_a_threshold_decides_the_verdict_and_the_words_follow(tiny_policy, decoder):
    sampling = Sampling(text_temperature=0.0, max_reflection_tokens=8, verdict_threshold=0.5)
    prompts, samplings, ids = rows(9, replace(sampling, max_images=1))
    greedy = introspect(decoder, prompts, [replace(s, verdict_threshold=None) for s in samplings], ids)
    for one, other in zip(introspect(decoder, prompts, samplings, ids), greedy, strict=True):
        assert same_tokens(one, other)
        assert np.isnan(one.trajectory.segments[1].logprobs[0])
        assert not np.isnan(one.trajectory.segments[1].logprobs[1:]).any()
    for threshold, count in ((0.0, 1), (1.0, 3)):
        always = introspect(decoder, *rows(4, replace(sampling, max_images=3, verdict_threshold=threshold)))
        assert {len(rollout.images) for rollout in always} == {count}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_edit_is_drawn_behind_its_source_and_guidance_blanks_the_instruction_alone(tiny_policy, decoder, guidance):
    prompts, samplings, ids = rows(6, Sampling(guidance=guidance))
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, (48, 48, 3)).astype(np.uint8) for _ in range(2)] * 3
    rollouts = edit(decoder, prompts, sources, samplings, ids, policy_version=3)
    for rollout, source in zip(rollouts, sources, strict=True):
        trajectory = rollout.trajectory
        codes = tiny_policy.encode_pixels(torch.from_numpy(source)[None])[0].numpy()
        assert np.array_equal(trajectory.source_codes, codes) and np.array_equal(rollout.source, source)
        assert [s.kind for s in trajectory.segments] == ["image"] and trajectory.policy_version == 3
        assert Naive(tiny_policy, rollout).gap() < 1e-4
    alone = edit(decoder, prompts[4:5], sources[4:5], samplings[4:5], ids[4:5])
    assert same_tokens(alone[0], rollouts[4])


def test_sources_that_are_no_images_of_the_policys_size_are_named(decoder):
    columns = rows(1, Sampling())
    with pytest.raises(ValueError, match=r"uint8 \(32, 32, 3\); give uint8 \(48, 48, 3\)"):
        edit(decoder, columns[0], [np.zeros((32, 32, 3), np.uint8)], *columns[1:])
    with pytest.raises(ValueError, match="1 prompts but 0 source images"):
        edit(decoder, columns[0], [], *columns[1:])
