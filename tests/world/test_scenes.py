from __future__ import annotations

import random

import pytest

from rlpipe.world.checker import check
from rlpipe.world.prompts import (
    PromptSpec,
    sample_spec,
)
from rlpipe.world.render import render
from rlpipe.world.scenes import (
    SceneObject,
    correct_scene,
    layouts,
    near_miss,
    near_miss_spec,
    relations_between,
    sample_scene,
    satisfies,
)
from tests.world.builders import (
    ABOVE,
    BLUE_SQUARE,
    RED_CIRCLE,
    TWO_RED_CIRCLES,
    specs_of_every_kind,
)


def test_a_near_miss_spec_is_of_the_same_kind_and_wrong_for_the_image():
    rng = random.Random(2)
    for spec in specs_of_every_kind(60):
        missed = near_miss_spec(rng, spec)
        assert missed.tag == spec.tag
        assert not check(missed.metadata, render(sample_scene(rng, spec))).correct


def test_a_correction_satisfies_the_prompt_whatever_the_scene():
    rng = random.Random(5)
    for spec in specs_of_every_kind(25):
        unrelated = sample_scene(rng, sample_spec(rng, "all"))
        for scene in (near_miss(rng, spec), unrelated, ()):
            corrected = correct_scene(rng, scene, spec)
            assert satisfies(corrected, spec)
            assert check(spec.metadata, render(corrected)).correct


def test_a_right_scene_is_its_own_correction():
    rng = random.Random(6)
    for spec in specs_of_every_kind(20):
        scene = sample_scene(rng, spec)
        assert correct_scene(rng, scene[::-1], spec) in (scene, scene[::-1])


def test_a_correction_keeps_what_is_right():
    circle, square = SceneObject("red", "circle", 16, 12), SceneObject("blue", "square", 16, 36)
    rng = random.Random(7)
    recoloured = SceneObject("green", "circle", 16, 12)
    reshaped = SceneObject("blue", "cross", 16, 36)
    extra = SceneObject("green", "cross", 36, 24)
    assert correct_scene(rng, (square, recoloured), ABOVE) == (circle, square)
    assert correct_scene(rng, (reshaped, circle), ABOVE) == (circle, square)
    assert correct_scene(rng, (extra, square, circle), ABOVE) == (circle, square)
    swapped = (SceneObject("red", "circle", 16, 36), SceneObject("blue", "square", 16, 12))
    assert correct_scene(rng, swapped, ABOVE) == (circle, square)
    added = correct_scene(rng, (square,), ABOVE)
    assert added[1] == square and added[0].shape == "circle"
    beside = (SceneObject("red", "circle", 12, 24), SceneObject("blue", "square", 36, 24))
    assert satisfies(correct_scene(rng, beside, ABOVE), ABOVE)  # both must move: the square leaves no room
    low_square = SceneObject("blue", "square", 36, 36)
    moved = correct_scene(rng, (SceneObject("red", "circle", 12, 36), low_square), ABOVE)
    assert moved[1] == low_square and satisfies(moved, ABOVE)


def test_a_correction_parts_objects_that_lie_too_close_and_drops_surplus_ones():
    rng = random.Random(8)
    crowd = tuple(SceneObject("red", "circle", x, 12) for x in (12, 16, 20, 24, 28, 32, 36))
    corrected = correct_scene(rng, crowd, TWO_RED_CIRCLES)
    assert satisfies(corrected, TWO_RED_CIRCLES)
    assert abs(corrected[0].x - corrected[1].x) >= 20 and set(corrected) <= set(crowd)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        # Both boxes are 10 x 10, so 0.1 * (10 + 10) = 2 pixels come off each axis.
        ((-20, 0), {"left of"}),  # 18 / 20 = 0.9
        ((20, 0), {"right of"}),
        ((0, -20), {"above"}),
        ((0, 20), {"below"}),
        ((2, 0), set()),  # nothing is left of the offset
        ((4, 0), set()),  # 2 / 4 is not more than 0.5
        ((5, 0), {"right of"}),  # 3 / 5 = 0.6
        ((30, 40), {"right of", "below"}),  # 28 / 50 = 0.56 and 38 / 50 = 0.76
        ((12, 16), {"below"}),  # 10 / 20 is not more than 0.5; 14 / 20 = 0.7
        ((0, 0), set()),
    ],
)
def test_relations_agree_with_the_rule_of_geneval(offset, expected):
    assert relations_between((50 + offset[0], 50 + offset[1], 10, 10), (50, 50, 10, 10)) == expected


def test_a_relation_that_holds_on_the_grid_holds_in_the_image():
    rng = random.Random(10)
    for places in rng.sample(layouts(2).tolist(), 120):
        scene = tuple(
            SceneObject(c, s, *place) for (c, s), place in zip((RED_CIRCLE, BLUE_SQUARE), places, strict=True)
        )
        for relation in relations_between(scene[0].box, scene[1].box):
            spec = PromptSpec("position", (RED_CIRCLE, BLUE_SQUARE), relation)
            assert check(spec.metadata, render(scene)).correct
