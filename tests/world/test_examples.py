from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from rlpipe.config import SftSection
from rlpipe.data.sft import SftMixture
from rlpipe.types import Sampling
from rlpipe.world.checker import check, check_detections
from rlpipe.world.detection import detect
from rlpipe.world.examples import WorldExamples
from rlpipe.world.pool import Pool, encode, near_miss_pairs, shown_specs
from rlpipe.world.prompts import is_held_out, sample_spec
from rlpipe.world.render import render
from rlpipe.world.scenes import near_miss, sample_scene


def pool_of_renders(policy, count: int, seed: int) -> Pool:
    """Clean renders as a pool, every second one a near miss; the random VQ tokenizer only gives the codes."""
    rng = random.Random(seed)
    specs = [sample_spec(rng) for _ in range(count)]
    images = [render((near_miss if i % 2 else sample_scene)(rng, spec)) for i, spec in enumerate(specs)]
    detections = [detect(image) for image in images]
    verdicts = [check_detections(s.metadata, d) for s, d in zip(specs, detections, strict=True)]
    correct = np.array([v.correct for v in verdicts])
    return Pool(specs, encode(policy, images), np.stack(images), detections, correct, [v.reason for v in verdicts])


@pytest.fixture(scope="module")
def pools(tiny_policy) -> tuple[Pool, Pool]:
    return pool_of_renders(tiny_policy, 150, 1), pool_of_renders(tiny_policy, 150, 2)


@pytest.fixture(scope="module")
def examples(tiny_policy, pools) -> WorldExamples:
    correction = np.full((150, 36), 7)
    sampling = Sampling(max_reflection_tokens=20)
    return WorldExamples(*pools, correction, tiny_policy.templates, sampling, seed=0, correction_share=1.0)


def test_a_pool_comes_back_from_disk_as_it_was(pools, tmp_path):
    pools[0].save(tmp_path / "pool.npz")
    loaded = Pool.load(tmp_path / "pool.npz")
    assert loaded.specs == pools[0].specs and loaded.detections == pools[0].detections
    assert np.array_equal(loaded.images, pools[0].images) and loaded.reasons == pools[0].reasons


def test_every_prompt_an_image_is_said_to_show_is_right_and_of_the_training_split(pools):
    for detections, image in zip(pools[0].detections, pools[0].images, strict=True):
        for spec in shown_specs(detections):
            assert check(spec.metadata, image).correct
            assert not is_held_out(spec)


def test_near_miss_pairs_are_half_right_and_never_held_out(pools):
    pairs = near_miss_pairs(pools[0], seed=3)
    assert len(pairs) > 100
    assert Counter(p.correct for p in pairs)[True] == len(pairs) // 2
    assert not any(is_held_out(p.spec) for p in pairs)


def test_judgements_are_true_and_balanced(examples):
    items = examples.judge(np.random.default_rng(0), 60)
    verdicts = []
    for item in items:
        trajectory = item.trajectory
        verdict = check(trajectory.prompt.metadata, item.images[0])
        assert trajectory.verdicts == (verdict.correct,)
        words = examples.templates.text(trajectory.segments[1].token_ids)
        assert words == verdict.reason
        verdicts.append(verdict.correct)
    assert abs(sum(verdicts) - 30) <= 2


def test_a_redraw_shows_a_wrong_image_its_reason_and_the_correction(examples):
    for item in examples.redraw(np.random.default_rng(0), 20):
        image, text, target = item.trajectory.segments
        assert examples.templates.text(text.token_ids).startswith("No, ")
        assert (target.token_ids == 7).all() and not np.array_equal(image.token_ids, target.token_ids)
        assert [credit.ce for credit in item.credits] == [0.0, 0.0, 1.0]


def test_a_batch_depends_on_seed_and_step_alone(examples):
    section = SftSection(batch_size=8)
    first, again, other = (SftMixture(section, examples, seed) for seed in (0, 0, 1))
    ids = [[i.trajectory.id for i in m.batch(5)] for m in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]


def test_sub_tasks_come_in_their_ratio(examples):
    mixture = SftMixture(SftSection(draw=0.2, judge=0.3, redraw=0.5), examples, seed=0)
    counts = Counter(mixture.task(step) for step in range(2000))
    assert [round(counts[task] / 2000, 1) for task in ("draw", "judge", "redraw")] == [0.2, 0.3, 0.5]


def test_one_drawing_in_ten_loses_its_prompt_and_no_judgement_does(examples):
    section = SftSection(draw=1.0, judge=0.0, redraw=0.0, batch_size=500)
    blanked = sum(item.blank_prompt for item in SftMixture(section, examples, 0).batch(0))
    assert 30 <= blanked <= 75
    judging = SftSection(draw=0.0, judge=1.0, redraw=0.0, batch_size=100)
    assert not any(item.blank_prompt for item in SftMixture(judging, examples, 0).batch(0))


def test_a_reason_that_does_not_fit_is_refused_with_the_key_to_change(tiny_policy, pools):
    short = WorldExamples(*pools, None, tiny_policy.templates, Sampling(max_reflection_tokens=4), seed=0)
    with pytest.raises(ValueError, match=r"rollout\.max_reflection_tokens: 4"):
        short.judge(np.random.default_rng(0), 4)
