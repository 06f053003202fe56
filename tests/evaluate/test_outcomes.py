"""From a real (random, tiny) policy to records: pairing, seeds, controls, near misses."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from rlpipe.evaluate.near_miss import near_miss_cases, near_miss_verdicts
from rlpipe.evaluate.outcomes import evaluate_policy, row_seed
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import draw_only, introspect
from rlpipe.types import Prompt, Sampling, Score, ScoreRequest
from rlpipe.world.checker import check
from rlpipe.world.prompts import TAGS, sample_spec

SAMPLING = Sampling(max_reflection_tokens=6)


@pytest.fixture(scope="module")
def decoder(tiny_policy: JanusPolicy) -> Decoder:
    return Decoder(tiny_policy)


def world_prompts(count: int) -> list[Prompt]:
    rng = random.Random(0)
    prompts = []
    for index in range(count):
        metadata = sample_spec(rng, "test", TAGS[index % len(TAGS)]).metadata
        prompts.append(Prompt(f"test-{index}", metadata.pop("prompt"), metadata))
    return prompts


def coin(metadata: dict, image: np.ndarray) -> SimpleNamespace:
    """A checker whose answer depends on the pixels alone and is right about half of the time."""
    correct = bool(int(image.astype(np.int64).sum()) % 2)
    return SimpleNamespace(correct=correct, reason=f"{correct}")


def bright(requests: list[ScoreRequest]) -> list[Score]:
    return [Score(r.id, float(r.image.mean()) / 255) for r in reversed(requests)]


def test_each_outcome_is_that_of_its_own_rollout_and_control(decoder: Decoder) -> None:
    prompts = world_prompts(12)
    outcomes = evaluate_policy(decoder, prompts, coin, SAMPLING, seed=5, batch_size=5, judge=bright)
    assert [o.prompt_id for o in outcomes] == [p.id for p in prompts]
    assert {o.said_yes for o in outcomes} == {True, False}
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        drawn, fresh = (Sampling(seed=row_seed(5, prompt.id, u), max_reflection_tokens=6) for u in ("draw", "fresh"))
        (rollout,) = introspect(decoder, [prompt], [drawn], ["x"])
        images = rollout.images
        assert outcome.said_yes == rollout.trajectory.verdicts[0]
        assert outcome.first_correct == coin({}, images[0]).correct
        assert outcome.true_reason == coin({}, images[0]).reason
        assert outcome.final_correct == coin({}, images[-1]).correct
        assert outcome.first_score == pytest.approx(images[0].mean() / 255)
        if outcome.said_yes:
            assert outcome.fresh_correct == outcome.first_correct
            assert outcome.redraw_score is None and outcome.fresh_score is None
        else:
            (control,) = draw_only(decoder, [prompt], [fresh], ["x"])
            assert not np.array_equal(control.images[0], images[0])
            assert outcome.fresh_correct == coin({}, control.images[0]).correct
            assert outcome.fresh_score == pytest.approx(control.images[0].mean() / 255)
            assert outcome.redraw_score == pytest.approx(images[1].mean() / 255)


def test_outcomes_do_not_depend_on_how_the_prompts_are_shared_out(decoder: Decoder) -> None:
    prompts = world_prompts(6)
    whole = evaluate_policy(decoder, prompts, coin, SAMPLING, seed=1)
    halves = [evaluate_policy(decoder, part, coin, SAMPLING, seed=1) for part in (prompts[3:], prompts[:3])]
    assert whole == halves[1] + halves[0]


def test_progress_is_told_and_a_run_of_one_image_still_redraws(decoder: Decoder) -> None:
    told = []
    prompts = world_prompts(5)
    sampling = Sampling(max_reflection_tokens=6, max_images=1)
    outcomes = evaluate_policy(
        decoder,
        prompts,
        coin,
        sampling,
        batch_size=2,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert outcomes == evaluate_policy(decoder, prompts, coin, SAMPLING)


def test_a_missing_score_stays_missing(decoder: Decoder) -> None:
    failing = lambda requests: [Score(r.id, None, error="down") for r in requests]  # noqa: E731
    (outcome,) = evaluate_policy(decoder, world_prompts(1), coin, SAMPLING, judge=failing)
    assert outcome.first_score is None


def test_a_prompt_that_cannot_be_checked_is_named(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="row 'plain' has no `tag` and `include`"):
        evaluate_policy(decoder, [Prompt("plain", "a cat")], check, SAMPLING)


class Perfect:
    """Stands in for the VQ tokenizer: a round trip that changes nothing, or spoils every image."""

    def __init__(self, spoil: bool) -> None:
        self.spoil = spoil

    def encode_pixels(self, images):
        return images

    def decode_codes(self, codes):
        return codes * 0 if self.spoil else codes


def test_near_miss_cases_come_in_pairs_of_one_image_whose_truth_is_the_checkers() -> None:
    prompts = world_prompts(24)
    cases = near_miss_cases(SimpleNamespace(policy=Perfect(spoil=False)), prompts, seed=3, batch_size=10)
    assert len(cases) == 48
    for prompt, own, missed in zip(prompts, cases[::2], cases[1::2], strict=True):
        assert own.prompt is prompt and own.truth and not missed.truth
        assert np.array_equal(own.image, missed.image)
        assert missed.prompt.text != prompt.text and missed.prompt.metadata["tag"] == prompt.metadata["tag"]
        assert check(prompt.metadata, own.image).correct and not check(missed.prompt.metadata, own.image).correct


def test_images_that_the_round_trip_spoils_make_no_case() -> None:
    assert near_miss_cases(SimpleNamespace(policy=Perfect(spoil=True)), world_prompts(6)) == []


def test_near_miss_verdicts_follow_the_policys_own_probability(decoder: Decoder) -> None:
    cases = near_miss_cases(SimpleNamespace(policy=Perfect(spoil=False)), world_prompts(24))
    sampled = near_miss_verdicts(decoder, cases, seed=1, batch_size=20)
    assert [record.truth for record in sampled] == [True, False] * 24
    assert sampled == near_miss_verdicts(decoder, cases, seed=1, batch_size=48)
    greedy = near_miss_verdicts(decoder, cases, temperature=0.0)
    assert greedy == near_miss_verdicts(decoder, cases, seed=9, temperature=0.0)
    assert near_miss_verdicts(decoder, cases, seed=2) != near_miss_verdicts(decoder, cases, seed=1)
