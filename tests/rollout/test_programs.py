from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only, introspect, look
from rlpipe.types import Prompt, Sampling
from tests.rollout.naive import TEXTS, Naive, rows, same_tokens

GREEDY = Sampling(image_temperature=0.0, text_temperature=0.0, max_reflection_tokens=6)


@pytest.fixture(scope="module")
def decoder(tiny_policy) -> Decoder:
    return Decoder(tiny_policy)


@pytest.mark.parametrize("context", ["sampled", "reencoded"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampler_logprobs_equal_those_of_full_forwards(tiny_policy, decoder, guidance, context):
    sampling = Sampling(
        guidance=guidance,
        image_temperature=0.9,
        text_temperature=1.2,
        max_reflection_tokens=60,
        redraw="always",
        redraw_context=context,
    )
    rollouts = introspect(decoder, *rows(8, sampling))
    lengths = {len(rollout.trajectory.segments[1]) for rollout in rollouts}
    assert len(lengths) > 1, "the rows should end their reflections at different lengths"
    for rollout in rollouts:
        for segment in rollout.trajectory.segments:
            assert segment.logprobs.dtype == np.float32 and segment.token_ids.dtype == np.int64
        assert Naive(tiny_policy, rollout).gap() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_tokens_are_the_largest_logits_of_full_forwards(tiny_policy, decoder, guidance):
    sampling = replace(GREEDY, guidance=guidance, redraw="always")
    for rollout in introspect(decoder, *rows(3, sampling)):
        naive = Naive(tiny_policy, rollout)
        for index, segment in enumerate(rollout.trajectory.segments):
            assert np.array_equal(naive.logits(index).argmax(-1).numpy(), segment.token_ids)
            assert not segment.logprobs.any()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(guidance=2.0),
        Sampling(max_images=3, reflection_room="exact"),
        Sampling(guidance=2.0, max_images=3, history="all", redraw_context="reencoded"),
    ],
    ids=["plain", "guided", "three images", "three images, all seen"],
)
def test_a_row_does_not_depend_on_its_batch_mates_or_their_order(decoder, sampling):
    prompts, samplings, ids = rows(9, sampling)
    whole = introspect(decoder, prompts, samplings, ids)
    order = [4, 8, 0, 3]
    part = introspect(decoder, *[[column[i] for i in order] for column in (prompts, samplings, ids)])
    alone = introspect(decoder, prompts[4:5], samplings[4:5], ids[4:5])
    for rollout, index in [*zip(part, order, strict=True), (alone[0], 4)]:
        assert rollout.trajectory.id == ids[index]
        assert same_tokens(rollout, whole[index])
        assert all(np.array_equal(a, b) for a, b in zip(rollout.images, whole[index].images, strict=True))
        for one, other in zip(rollout.trajectory.segments, whole[index].trajectory.segments, strict=True):
            assert np.abs(one.logprobs - other.logprobs).max() < 1e-5


def test_the_same_seed_draws_the_same_and_another_seed_another(decoder):
    sampling = Sampling(redraw="always")
    first, second = (introspect(decoder, *rows(3, sampling)) for _ in range(2))
    other = introspect(decoder, *rows(3, sampling, first_seed=50))
    for one, two, three in zip(first, second, other, strict=True):
        assert same_tokens(one, two)
        for a, b in zip(one.trajectory.segments, three.trajectory.segments, strict=True):
            assert not np.array_equal(a.token_ids, b.token_ids)


def test_rows_of_one_prompt_and_the_two_images_of_a_row_have_noise_of_their_own(decoder):
    prompt = Prompt(id="p", text=TEXTS[0])
    samplings = [Sampling(seed=seed, redraw="always") for seed in range(4)]
    rollouts = introspect(decoder, [prompt] * 4, samplings, list("abcd"))
    images = [tuple(r.trajectory.segments[i].token_ids) for r in rollouts for i in r.trajectory.images]
    assert len(set(images)) == 8


def test_only_a_no_is_followed_by_a_second_image(tiny_policy, decoder):
    rollouts = introspect(decoder, *rows(16, Sampling(max_reflection_tokens=8)), policy_version=7)
    verdicts = [rollout.trajectory.verdicts[0] for rollout in rollouts]
    assert any(verdicts) and not all(verdicts)
    for rollout, yes in zip(rollouts, verdicts, strict=True):
        trajectory = rollout.trajectory
        words = trajectory.segments[1].token_ids
        assert yes == (words[0] == tiny_policy.templates.yes) and (yes or words[0] == tiny_policy.templates.no)
        assert [s.kind for s in trajectory.segments] == ["image", "text"] + ([] if yes else ["image"])
        assert trajectory.policy_version == 7
        assert len(rollout.images) == len(trajectory.images)
        for position, image in zip(trajectory.images, rollout.images, strict=True):
            assert image.dtype == np.uint8
            codes = torch.from_numpy(trajectory.segments[position].token_ids)[None]
            # one value up or down where another batch size rounds to the other side
            gap = image.astype(int) - tiny_policy.decode_codes(codes)[0].numpy()
            assert np.abs(gap).max() <= 1 and (gap != 0).mean() < 0.01


def test_redraw_always_adds_a_second_image_and_changes_nothing_before_it(decoder):
    some = introspect(decoder, *rows(12, Sampling()))
    every = introspect(decoder, *rows(12, Sampling(redraw="always")))
    for one, other in zip(some, every, strict=True):
        assert len(other.trajectory.segments) == 3
        for a, b in zip(one.trajectory.segments, other.trajectory.segments, strict=False):
            assert np.array_equal(a.token_ids, b.token_ids)


def test_one_image_at_most_stops_after_the_reflection(decoder):
    for rollout in introspect(decoder, *rows(6, Sampling(max_images=1, redraw="always"))):
        assert [s.kind for s in rollout.trajectory.segments] == ["image", "text"]


def test_a_reflection_ends_with_end_of_sentence_or_is_marked_as_truncated(tiny_policy, decoder):
    limit = 24
    rollouts = introspect(decoder, *rows(24, Sampling(max_reflection_tokens=limit, max_images=1)))
    truncated = [rollout.trajectory.truncated[0] for rollout in rollouts]
    assert any(truncated) and not all(truncated)
    for rollout, cut in zip(rollouts, truncated, strict=True):
        tokens = rollout.trajectory.segments[1].token_ids
        assert tiny_policy.templates.eos not in tokens[:-1]
        assert (tokens[-1] == tiny_policy.templates.eos) != cut
        assert len(tokens) == limit or not cut


def test_the_second_image_stands_at_a_constant_distance_whatever_the_reflection_says(tiny_policy):
    class Recording(Decoder):
        blocks: list[torch.Tensor] = []

        def extend(self, cache, embeddings, positions, valid=None):
            self.blocks.append(positions)
            return super().extend(cache, embeddings, positions, valid)

    decoder, limit = Recording(tiny_policy), 60
    rollouts = introspect(decoder, *rows(8, Sampling(max_reflection_tokens=limit, redraw="always")))
    assert len({len(rollout.trajectory.segments[1]) for rollout in rollouts}) > 1
    templates = tiny_policy.templates
    prompts = torch.tensor([len(templates.prompt(r.trajectory.prompt.text)) for r in rollouts])
    count = tiny_policy.num_image_tokens
    behind = prompts + count + len(templates.look) + limit + len(templates.redraw)
    first, last = decoder.blocks[-count + 1][:, 0], decoder.blocks[-1][:, 0]
    assert torch.equal(first, behind) and torch.equal(last, behind + count - 2)


def test_the_reencoded_context_is_the_first_image_seen_through_the_tokenizer(tiny_policy, decoder):
    for rollout in introspect(decoder, *rows(8, Sampling(redraw_context="reencoded"))):
        first = rollout.trajectory.segments[0]
        if rollout.trajectory.verdicts[0]:
            assert first.context_ids is None
        else:
            codes = tiny_policy.encode_pixels(torch.from_numpy(rollout.images[0])[None])[0]
            assert np.array_equal(first.context_ids, codes.numpy())


def test_draw_only_draws_the_first_image_of_an_introspection(decoder):
    whole = introspect(decoder, *rows(6, Sampling(guidance=2.0)))
    for plain, rollout in zip(draw_only(decoder, *rows(6, Sampling(guidance=2.0))), whole, strict=True):
        assert len(plain.trajectory.segments) == len(plain.images) == 1
        assert plain.trajectory.verdicts == () and plain.trajectory.final_image == 0
        assert np.array_equal(plain.trajectory.segments[0].token_ids, rollout.trajectory.segments[0].token_ids)
        assert np.array_equal(plain.images[0], rollout.images[0])


def test_look_says_what_a_greedy_introspection_says_of_the_same_images(tiny_policy, decoder):
    rollouts = introspect(decoder, *rows(6, replace(Sampling(text_temperature=0.0), max_images=1)))
    seen = look(decoder, [r.trajectory.prompt for r in rollouts], [r.images[0] for r in rollouts])
    for (p_yes, words), rollout in zip(seen, rollouts, strict=True):
        assert words == tiny_policy.templates.text(rollout.trajectory.segments[1].token_ids)
        logits = Naive(tiny_policy, rollout).logits(1)[0]
        assert p_yes == pytest.approx(float(logits.softmax(-1)[tiny_policy.templates.yes]), abs=1e-5)
        assert (p_yes > 0.5) == rollout.trajectory.verdicts[0]


def test_truncated_sampling_draws_from_the_tokens_left_and_reports_their_logprobs(tiny_policy, decoder):
    sampling = Sampling(image_top_k=5, text_top_p=0.4, max_reflection_tokens=6, redraw="always")
    for rollout in introspect(decoder, *rows(3, sampling)):
        naive = Naive(tiny_policy, rollout)
        for index in rollout.trajectory.images:
            segment = rollout.trajectory.segments[index]
            values, best = naive.logits(index).topk(5, dim=-1)
            hit = best == torch.from_numpy(segment.token_ids)[:, None]
            assert hit.any(1).all()
            assert np.abs(values.log_softmax(-1)[hit].numpy() - segment.logprobs).max() < 1e-4
        assert (rollout.trajectory.segments[1].logprobs <= 0.0).all()


def test_new_weights_draw_otherwise_once_refreshed_and_as_a_new_decoder_would(tiny_policy):
    policy = copy.deepcopy(tiny_policy)
    decoder = Decoder(policy)
    before = introspect(decoder, *rows(3, Sampling(redraw="always")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.janus.model.language_model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    decoder.refresh()
    after = introspect(decoder, *rows(3, Sampling(redraw="always")))
    fresh = introspect(Decoder(policy), *rows(3, Sampling(redraw="always")))
    for old, new, other in zip(before, after, fresh, strict=True):
        assert not np.array_equal(old.trajectory.segments[0].token_ids, new.trajectory.segments[0].token_ids)
        assert same_tokens(new, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": 2.0}, "sampling.guidance is 1.0 in one row and 2.0 in another"),
        ({"max_reflection_tokens": 3}, "sampling.max_reflection_tokens"),
        ({"redraw": "always"}, "sampling.redraw"),
    ],
)
def test_rows_that_differ_in_more_than_their_seed_are_refused(decoder, change, message):
    prompts, samplings, ids = rows(2, Sampling())
    with pytest.raises(ValueError, match=message):
        introspect(decoder, prompts, [samplings[0], replace(samplings[1], **change)], ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_images": 0}, "rollout.max_images: 0"),
        ({"max_images": 40, "history": "all"}, "trajectory can take"),
        ({"max_reflection_tokens": 0}, "rollout.max_reflection_tokens: 0"),
        ({"max_reflection_tokens": 1000}, "lower rollout.max_reflection_tokens"),
    ],
)
def test_settings_out_of_range_are_named(decoder, change, message):
    with pytest.raises(ValueError, match=message):
        introspect(decoder, *rows(2, Sampling(**change)))


def test_columns_of_unequal_length_are_refused_and_no_rows_give_no_rollouts(decoder):
    prompts, samplings, ids = rows(2, Sampling())
    with pytest.raises(ValueError, match="2 prompts, 1 samplings, 2 ids"):
        introspect(decoder, prompts, samplings[:1], ids)
    assert introspect(decoder, [], [], []) == [] == draw_only(decoder, [], [], [])
