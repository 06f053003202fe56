from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from rlpipe.world.checker import Detection, check, check_detections, detect, scene_from_detections
from rlpipe.world.prompts import (
    TAGS,
    PromptSpec,
    all_specs,
    is_held_out,
    sample_spec,
    spec_from_metadata,
    split_specs,
    write_prompts,
)
from rlpipe.world.render import render
from rlpipe.world.scenes import (
    BACKGROUND,
    COLORS,
    RELATIONS,
    SHAPES,
    SceneObject,
    correct_scene,
    layouts,
    near_miss,
    near_miss_spec,
    relations_between,
    sample_scene,
    satisfies,
)
from rlpipe.world.vocabulary import WORDS

RED_CIRCLE = ("red", "circle")
BLUE_SQUARE = ("blue", "square")
ABOVE = PromptSpec("position", (RED_CIRCLE, BLUE_SQUARE), "above")
TWO_RED_CIRCLES = PromptSpec("counting", (RED_CIRCLE, RED_CIRCLE))
RED_CIRCLE_ONLY = PromptSpec("colors", (RED_CIRCLE,))


def specs_of_every_kind(count_per_tag: int, seed: int = 0) -> list[PromptSpec]:
    rng = random.Random(seed)
    return [sample_spec(rng, "all", tag) for tag in TAGS for _ in range(count_per_tag)]


def reason_for(spec: PromptSpec, *objects: SceneObject) -> str:
    return check(spec.metadata, render(objects)).reason


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def picture(draw_on) -> np.ndarray:
    """A uint8 image [48, 48, 3] drawn at four times the size."""
    image = Image.new("RGB", (192, 192), BACKGROUND)
    draw_on(ImageDraw.Draw(image))
    return np.array(image.resize((48, 48), Image.Resampling.BOX))


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


def test_a_near_miss_spec_is_of_the_same_kind_and_wrong_for_the_image():
    rng = random.Random(2)
    for spec in specs_of_every_kind(60):
        missed = near_miss_spec(rng, spec)
        assert missed.tag == spec.tag
        assert not check(missed.metadata, render(sample_scene(rng, spec))).correct


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


def test_metadata_round_trips_for_every_prompt():
    for tag in TAGS:
        for spec in all_specs(tag):
            assert spec_from_metadata(json.loads(json.dumps(spec.metadata))) == spec


def test_metadata_follows_the_schema_of_geneval():
    assert ABOVE.metadata == {
        "tag": "position",
        "include": [
            {"class": "square", "count": 1, "color": "blue"},
            {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]},
        ],
        "exclude": [
            {"class": "circle", "count": 2},
            {"class": "square", "count": 2},
            {"class": "triangle", "count": 1},
            {"class": "diamond", "count": 1},
            {"class": "cross", "count": 1},
        ],
        "prompt": "a photo of a red circle above a blue square",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tag": "size"}, "tag .*'size'"),
        ({"include": [{"class": "bench", "count": 1}]}, "class .*'bench'"),
        ({"include": [{"class": "circle", "count": 1, "color": "pink"}]}, "color .*'pink'"),
        ({"include": [{"class": "circle", "count": 9}]}, "count .*9"),
        ({"include": [{"class": "circle"}]}, "'count'"),
        ({"exclude": []}, r"exclude .*\[\]"),
        ({"prompt": "a red circle"}, "prompt .*'a red circle'"),
    ],
)
def test_illegal_metadata_is_refused_with_field_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        spec_from_metadata(RED_CIRCLE_ONLY.metadata | change)


def test_the_kinds_keep_their_constraints():
    for tag in ("two_object", "position", "color_attr"):
        assert all(len({shape for _, shape in spec.objects}) == 2 for spec in all_specs(tag))
    assert all(spec.objects[0][0] != spec.objects[1][0] for spec in all_specs("color_attr"))
    with pytest.raises(ValueError, match="must differ"):
        PromptSpec("two_object", ((None, "cross"), (None, "cross")))
    texts = [spec.text for tag in TAGS for spec in all_specs(tag)]
    assert len(texts) == len(set(texts)) == 5 + 20 + 105 + 30 + 2880 + 600


def test_train_and_test_prompts_are_disjoint_and_training_covers_everything():
    for tag in TAGS:
        train, test = split_specs("train", tag), split_specs("test", tag)
        assert train and test
        assert any(is_held_out(spec) for spec in test) == (tag != "single_object")
        if tag != "single_object":
            assert not set(train) & set(test) and len(train) + len(test) == len(all_specs(tag))
            assert 0.1 < len(test) / len(all_specs(tag)) < 0.3
        assert {shape for spec in train for _, shape in spec.objects} == set(SHAPES)
        if tag in ("counting", "colors", "position", "color_attr"):
            assert {color for spec in train for color, _ in spec.objects} >= set(COLORS)
    assert {len(spec.objects) for spec in split_specs("train", "counting")} == {2, 3, 4}
    assert {spec.relation for spec in split_specs("train", "position")} == set(RELATIONS)
    for spec in split_specs("train", "position"):
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        assert not is_held_out(PromptSpec("position", spec.objects[::-1], opposite[spec.relation]))


def test_prompt_and_reason_words_are_in_the_vocabulary_and_reasons_are_short():
    rng = random.Random(9)
    used: set[str] = set()
    for tag in TAGS:
        for spec in all_specs(tag):
            used.update(tokens(spec.text))
    for _ in range(4000):
        spec = sample_spec(rng, "all")
        found = tuple(
            Detection(
                rng.choice(list(COLORS)),
                rng.choice([*SHAPES, None]) if rng.random() < 0.2 else rng.choice(spec.objects)[1],
                (rng.uniform(8, 40), rng.uniform(8, 40), 16.0, 16.0),
                rng.random(),
            )
            for _ in range(rng.randint(0, 7))
        )
        verdict = check_detections(spec.metadata, found)
        words = tokens(verdict.reason)
        assert words[0] == ("Yes" if verdict.correct else "No") and words[1] == ","
        assert 0 <= verdict.partial <= 1 and (verdict.partial == 1) == verdict.correct
        assert len([word for word in words if word not in (",", ".")]) <= 14, verdict.reason
        used.update(words)
    assert used <= set(WORDS)
    assert list(WORDS) == sorted(set(WORDS))
    assert set(WORDS) - used <= {"many", "five"}


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


def test_a_relation_that_holds_on_the_grid_holds_in_the_image():
    rng = random.Random(10)
    for places in rng.sample(layouts(2).tolist(), 120):
        scene = tuple(
            SceneObject(c, s, *place) for (c, s), place in zip((RED_CIRCLE, BLUE_SQUARE), places, strict=True)
        )
        for relation in relations_between(scene[0].box, scene[1].box):
            spec = PromptSpec("position", (RED_CIRCLE, BLUE_SQUARE), relation)
            assert check(spec.metadata, render(scene)).correct


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


def test_everything_is_deterministic_by_seed(tmp_path):
    def draw(seed: int) -> list[object]:
        rng = random.Random(seed)
        specs = [sample_spec(rng, split) for split in ("train", "test", "all")]
        scenes = [f(rng, spec) for spec in specs for f in (sample_scene, near_miss)]
        return [
            specs,
            scenes,
            [near_miss_spec(rng, s) for s in specs],
            correct_scene(rng, scenes[1], specs[0]),
        ]

    assert draw(3) == draw(3) != draw(4)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_prompts(tmp_path / name, "train", 10, seed)
    texts = {name: (tmp_path / name).read_text() for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_a_prompt_file_gives_every_kind_the_same_number_of_rows_in_turn(tmp_path):
    for split in ("train", "test"):
        path = tmp_path / f"{split}.jsonl"
        command = [sys.executable, "-m", "rlpipe.world.prompts", "--split", split, "--out", str(path)]
        subprocess.run([*command, "--per-tag", "30", "--seed", "5"], check=True)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["id"] for row in rows}) == len(rows)
        assert all(set(row) == {"id", "prompt", "tag", "include", "exclude"} for row in rows)
        for row in rows:
            spec = spec_from_metadata(row)
            assert spec.tag == "single_object" or is_held_out(spec) == (split == "test")
        assert [row["tag"] for row in rows] == list(TAGS) * 30
        for tag in TAGS:
            texts = [row["prompt"] for row in rows if row["tag"] == tag]
            assert len(set(texts)) == min(30, len(split_specs(split, tag)))
