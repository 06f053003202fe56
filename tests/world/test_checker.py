from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from rlpipe.world.checker import Detection, check, check_detections, detect, scene_from_detections
from rlpipe.world.prompts import (
    PromptSpec,
)
from rlpipe.world.render import render
from rlpipe.world.scenes import (
    BACKGROUND,
    COLORS,
    SceneObject,
    near_miss,
    sample_scene,
    satisfies,
)
from tests.world.builders import (
    ABOVE,
    RED_CIRCLE_ONLY,
    TWO_RED_CIRCLES,
    picture,
    reason_for,
    specs_of_every_kind,
)


def test_the_checker_accepts_every_clean_render_of_a_sampled_scene():
    rng = random.Random(0)
    for spec in specs_of_every_kind(110):
        verdict = check(spec.metadata, render(sample_scene(rng, spec)))
        assert verdict.correct and verdict.partial == 1.0 and verdict.reason.startswith("Yes, "), spec.text


def test_the_checker_refuses_every_near_miss():
    rng = random.Random(1)
    for spec in specs_of_every_kind(80):
        scene = near_miss(rng, spec)
        verdict = check(spec.metadata, render(scene))
        assert not satisfies(scene, spec)
        assert not verdict.correct and 0 <= verdict.partial < 1 and verdict.reason.startswith("No, "), spec.text


def test_detection_reads_back_the_scene_that_was_drawn():
    rng = random.Random(3)
    for spec in specs_of_every_kind(20):
        scene = sample_scene(rng, spec)
        assert Counter(scene_from_detections(detect(render(scene)))) == Counter(scene)


def test_soft_and_noisy_renders_are_still_read_and_near_misses_still_refused():
    rng, noise = random.Random(4), np.random.default_rng(4)
    for spec in specs_of_every_kind(30):
        for scene, right in ((sample_scene(rng, spec), True), (near_miss(rng, spec), False)):
            soft = Image.fromarray(render(scene)).filter(ImageFilter.GaussianBlur(1))
            image = np.clip(np.asarray(soft) + noise.normal(0, 8, (48, 48, 3)), 0, 255).astype(np.uint8)
            assert check(spec.metadata, image).correct == right, (spec.text, scene)


def test_soft_edges_between_two_touching_colours_give_no_false_detection():
    for first, second in itertools.permutations(COLORS, 2):
        image = Image.new("RGB", (192, 192), BACKGROUND)
        draw = ImageDraw.Draw(image)
        draw.rectangle([40, 64, 103, 127], fill=COLORS[first])
        draw.rectangle([104, 64, 167, 127], fill=COLORS[second])
        found = detect(np.array(image.resize((48, 48), Image.Resampling.BILINEAR)))
        assert sorted((d.color, d.shape) for d in found) == sorted([(first, "square"), (second, "square")])


def test_the_reason_names_the_first_thing_wrong():
    circle, square = SceneObject("red", "circle", 12, 12), SceneObject("blue", "square", 12, 36)
    cross = SceneObject("green", "cross", 36, 24)
    blue_circle = SceneObject("blue", "circle", 12, 12)
    below = (SceneObject("red", "circle", 12, 36), SceneObject("blue", "square", 12, 12))
    assert reason_for(ABOVE, circle, square) == "Yes, there is a red circle above a blue square."
    assert reason_for(TWO_RED_CIRCLES, circle, SceneObject("red", "circle", 36, 12)) == (
        "Yes, there are two red circles."
    )
    assert reason_for(TWO_RED_CIRCLES, circle) == "No, there is one red circle, not two."
    assert reason_for(TWO_RED_CIRCLES) == "No, there are no circles."
    assert reason_for(ABOVE, circle) == "No, there is no square."
    assert reason_for(RED_CIRCLE_ONLY, blue_circle) == "No, the circle is blue, not red."
    assert reason_for(RED_CIRCLE_ONLY, circle, cross) == "No, there is also a green cross."
    assert reason_for(ABOVE, *below) == "No, the red circle is below the blue square, not above."
    crosses = tuple(SceneObject("orange", "cross", x, 36) for x in (12, 36))
    assert reason_for(RED_CIRCLE_ONLY, circle, *crosses) == "No, there are also two orange crosses."
    orange = PromptSpec("colors", (("orange", "cross"),))
    assert reason_for(orange, crosses[0]) == "Yes, there is an orange cross."
    assert reason_for(orange, *crosses) == "No, there are two orange crosses, not one."


def test_an_exclude_entry_fails_from_its_count_on():
    two = tuple(Detection("red", "circle", (x, 12.0, 16.0, 16.0), 1.0) for x in (12.0, 36.0))
    include = [{"class": "circle", "count": 1}]
    assert check_detections({"include": include}, two).correct
    assert check_detections({"include": include, "exclude": [{"class": "circle", "count": 3}]}, two).correct
    assert not check_detections({"include": include, "exclude": [{"class": "circle", "count": 2}]}, two).correct


def test_the_most_confident_objects_are_judged_as_in_geneval():
    box = (12.0, 12.0, 16.0, 16.0)
    found = (Detection("blue", "circle", box, 0.8), Detection("red", "circle", box, 0.9))
    include = [{"class": "circle", "count": 1, "color": "red"}]
    assert check_detections({"include": include}, found).correct
    include[0]["color"] = "blue"
    assert not check_detections({"include": include}, found).correct


@pytest.mark.parametrize(
    "draw_blob",
    [
        lambda draw: draw.pieslice([100, 100, 164, 164], 0, 180, fill=COLORS["red"]),
        lambda draw: draw.ellipse([100, 100, 164, 164], outline=COLORS["blue"], width=14),
        lambda draw: draw.rectangle([0, 140, 191, 147], fill=COLORS["green"]),
        lambda draw: draw.ellipse([100, 100, 164, 164], fill=(120, 120, 120)),
        lambda draw: draw.ellipse([100, 100, 164, 164], fill=(10, 10, 10)),
        lambda draw: draw.ellipse([100, 100, 164, 164], fill=(228, 120, 120)),
    ],
    ids=["half a disc", "ring", "line", "grey disc", "black disc", "pale disc"],
)
def test_an_unclear_blob_makes_an_image_wrong(draw_blob):
    def draw(canvas: ImageDraw.ImageDraw) -> None:
        canvas.ellipse([16, 16, 79, 79], fill=COLORS["red"])
        draw_blob(canvas)

    verdict = check(RED_CIRCLE_ONLY.metadata, picture(draw))
    assert not verdict.correct and verdict.reason == "No, one shape is unclear."
    assert {d.color for d in verdict.detections} <= set(COLORS)


def test_an_empty_image_holds_nothing():
    assert detect(render(())) == ()
    assert detect(np.full((48, 48, 3), 255, np.uint8)) == ()
    verdict = check(RED_CIRCLE_ONLY.metadata, render(()))
    assert verdict.reason == "No, there is no circle." and verdict.partial == 0


def test_any_image_is_judged_without_an_error():
    noise = np.random.default_rng(0)
    for _ in range(20):
        image = noise.integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        assert not check(ABOVE.metadata, image).correct
    for value in (0, 128):
        assert not check(ABOVE.metadata, np.full((48, 48, 3), value, np.uint8)).correct


def test_partial_credit_grows_as_an_image_gets_closer():
    circle, square = SceneObject("red", "circle", 12, 12), SceneObject("blue", "square", 12, 36)
    wrong_color, swapped = SceneObject("green", "circle", 12, 12), SceneObject("red", "circle", 36, 36)
    scenes = [(), (wrong_color,), (circle,), (swapped, square), (circle, square)]
    partials = [check(ABOVE.metadata, render(scene)).partial for scene in scenes]
    assert partials == sorted(partials) and len(set(partials)) == len(partials) and partials[-1] == 1
