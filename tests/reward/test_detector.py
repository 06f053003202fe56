"""The detector scorer in the tiny world, whose exact detection stands behind the same interface."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rlpipe.config import ConfigError, ScorerSection
from rlpipe.reward.detector import DetectorScorer
from rlpipe.reward.scorer import build_scorer, check_scorers, score_all
from rlpipe.types import Prompt, ScoreRequest
from rlpipe.world.checker import check
from rlpipe.world.render import render
from rlpipe.world.scenes import SceneObject, near_miss, sample_scene
from tests.world.builders import ABOVE, RED_CIRCLE_ONLY, TWO_RED_CIRCLES, picture, specs_of_every_kind


def tiny(rules: str = "strict", **options) -> DetectorScorer:
    return build_scorer(ScorerSection(scorer="detector", options={"detector": "tiny", "rules": rules, **options}))


def request(spec, image: np.ndarray, name: str = "r") -> ScoreRequest:
    return ScoreRequest(name, Prompt(name, spec.text, spec.metadata), image)


def renders(count_per_tag: int) -> list[tuple]:
    """Right scenes and near misses of every kind of prompt, drawn sharp and soft with noise."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    cases = []
    for spec in specs_of_every_kind(count_per_tag):
        for scene in (sample_scene(rng, spec), near_miss(rng, spec)):
            sharp = render(scene)
            soft = np.asarray(Image.fromarray(sharp).filter(ImageFilter.GaussianBlur(1)))
            noisy = np.clip(soft + noise.normal(0, 8, soft.shape), 0, 255).astype(np.uint8)
            cases += [(spec, sharp), (spec, noisy)]
    return cases


def test_strict_agrees_with_the_tiny_worlds_checker_wherever_no_blob_is_unclear():
    cases = renders(40)
    verdicts = [check(spec.metadata, image) for spec, image in cases]
    clear = [all(d.shape is not None for d in verdict.detections) for verdict in verdicts]
    scores = score_all(tiny(), [request(spec, image) for spec, image in cases])
    for score, verdict, sure in zip(scores, verdicts, clear, strict=True):
        assert not sure or score.value == float(verdict.correct), verdict
    assert sum(clear) > 0.9 * len(clear) and 0.3 < np.mean([score.value for score in scores]) < 0.7


def test_an_unclear_blob_is_wrong_for_the_checker_and_nothing_for_genevals_rules():
    circle = SceneObject("red", "circle", 12, 12)
    ring = picture(
        lambda draw: (
            draw.ellipse([16, 16, 79, 79], fill=(220, 40, 40)),
            draw.ellipse([100, 100, 164, 164], outline=(40, 80, 220), width=14),
        )
    )
    assert not check(RED_CIRCLE_ONLY.metadata, ring).correct
    assert check(RED_CIRCLE_ONLY.metadata, render((circle,))).correct
    assert tiny().score([request(RED_CIRCLE_ONLY, ring)])[0].value == 1.0


def test_graded_is_one_exactly_where_strict_is_and_both_are_parts():
    cases = renders(8)
    requests = [request(spec, image, f"r{i}") for i, (spec, image) in enumerate(cases)]
    strict, graded = (score_all(tiny(rules), requests) for rules in ("strict", "graded"))
    for a, b in zip(strict, graded, strict=True):
        assert a.value == a.parts["strict"] == float(b.value == 1.0)
        assert b.value == b.parts["graded"] == a.parts["graded"] and 0 <= b.value <= 1
        assert a.id == b.id and "count" in a.parts
    assert {score.value for score in strict} == {0.0, 1.0} and len({score.value for score in graded}) > 4


def test_graded_rises_as_an_image_gets_closer():
    circle, square = SceneObject("red", "circle", 12, 12), SceneObject("blue", "square", 12, 36)
    swapped = SceneObject("red", "circle", 36, 36)
    scenes = [(), (SceneObject("green", "circle", 12, 12),), (circle,), (swapped, square), (circle, square)]
    values = [score.value for score in tiny("graded").score([request(ABOVE, render(scene)) for scene in scenes])]
    assert values == sorted(values) and len(set(values)) == 5 and values[0] == 0 and values[-1] == 1


def test_a_prompt_without_metadata_is_named_before_the_run_and_missing_in_it():
    scorer, bare = tiny(), Prompt("p7", "a red circle")
    foreign = Prompt("p8", "a dog", {"include": [{"class": "dog", "count": 1}]})
    fine = Prompt("p9", ABOVE.text, ABOVE.metadata)
    problems = scorer.check([bare, foreign, fine])
    assert len(problems) == 2
    assert "'p7': no include" in problems[0]
    assert "'p8': include[0].class: 'dog' is nothing that the detector can find" in problems[1]
    image = render(())
    scores = scorer.score([ScoreRequest(p.id, p, image) for p in (bare, fine, foreign)])
    assert [score.value for score in scores] == [None, 0.0, None]
    assert scores[0].error.startswith("no include") and [score.id for score in scores] == ["p7", "p9", "p8"]


def test_thresholds_of_the_configuration_replace_the_detectors_own():
    image = render((SceneObject("red", "circle", 12, 12), SceneObject("red", "circle", 36, 36)))
    assert tiny().score([request(TWO_RED_CIRCLES, image)])[0].value == 1.0
    assert tiny(thresholds={"counting": 1.0}).score([request(TWO_RED_CIRCLES, image)])[0].value == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"detector": "yolo"}}, "options.detector: 'yolo' is none of mask2former, tiny"),
        ({"options": {"detector": "tiny", "rules": "soft"}}, "options.rules: 'soft' is none of strict, graded"),
        ({"options": {"thresholds": {"socre": 0.5}}}, "options.thresholds: 'socre' is none of score, counting"),
        ({"options": {"thresholds": {"max_objects": 1.5}}}, "max_objects is 1.5; give a number from 0"),
        ({"options": {"thresholds": 0.5}}, "thresholds: 0.5 is no mapping"),
        ({"options": {"micro_batch": 0}}, "options.micro_batch: 0; give a whole number from 1"),
        ({"path": None}, "path: null; give the folder of a Mask2Former"),
        ({"path": "/not/there"}, "reward[found].path: no config.json in /not/there"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(change, message):
    with pytest.raises(ConfigError) as error:
        check_scorers([ScorerSection(**{"name": "found", "scorer": "detector", **change})])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(ConfigError, match=r"reward\[judge\].path: .* holds a model of type 'internvl'"):
        build_scorer(ScorerSection(scorer="detector"))
