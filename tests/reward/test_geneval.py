"""GenEval's rules on plain detections, against hand-worked cases and a literal walk through the official steps."""

from __future__ import annotations

import random
import re

import pytest

from rlpipe.reward.geneval import RELATIONS, Detection, Thresholds, judge, metadata_problems, relations_between
from rlpipe.world import scenes

CLASSES, COLORS = ("dog", "cat", "clock"), ("red", "blue")


def box(x: float, y: float, width: float = 10.0, height: float = 10.0) -> tuple[float, float, float, float]:
    """Around a centre."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def dogs(*colors: str, score: float = 0.95) -> list[Detection]:
    return [Detection("dog", score, box(20.0 * i, 0.0), color) for i, color in enumerate(colors)]


def want(count: int = 1, label: str = "dog", **more) -> dict:
    return {"class": label, "count": count, **more}


@pytest.mark.parametrize(
    ("a", "b", "held"),
    [
        (box(0, 0), box(100, 0), {"left of"}),
        (box(100, 0), box(0, 0), {"right of"}),
        (box(0, 0), box(0, 50), {"above"}),
        (box(0, 50), box(0, 0), {"below"}),
        (box(0, 0), box(50, 50), {"left of", "above"}),  # (50 - 2) / 70.7 on both axes
        (box(0, 0), box(100, 60), {"left of"}),  # 98 / 116.6 and 58 / 116.6
        (box(0, 0), box(0, 0), set()),
        (box(0, 0), box(2, 0), set()),  # exactly the margin: 0.1 * (10 + 10)
        (box(0, 0), box(3.9, 0), set()),  # 1.9 / 3.9 is below one half
        (box(0, 0), box(4.1, 0), {"left of"}),
        (box(0, 0, 100, 10), box(15, 0, 100, 10), set()),  # large boxes that overlap
    ],
)
def test_relations_hold_where_the_clear_offset_is_more_than_half_of_the_whole(a, b, held):
    assert relations_between(a, b) == held


def test_relations_are_those_of_the_tiny_world():
    rng = random.Random(0)
    for _ in range(500):
        centered = [tuple(rng.uniform(*bounds) for bounds in ((0, 48), (0, 48), (4, 20), (4, 20))) for _ in range(2)]
        corners = [box(*values) for values in centered]
        assert relations_between(*corners) == scenes.relations_between(*centered)
    assert RELATIONS == scenes.RELATIONS


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"include": ["dog"]}, "include[0]: 'dog'; give an object"),
        ({"include": [want()], "exclude": [want(), 3]}, "exclude[1]: 3; give an object"),
        ({"include": [want()], "exclude": want()}, "exclude: {'class': 'dog', 'count': 1}; give a list"),
    ],
)
def test_metadata_of_another_shape_is_one_line(metadata, problem):
    (line,) = metadata_problems(metadata)
    assert line.startswith(problem)


def official(metadata: dict, detections: list[Detection]) -> bool:
    """The steps of the official evaluator, one after the other."""
    least = 0.9 if metadata["tag"] == "counting" else 0.3
    found = {}
    for label in CLASSES:
        ordered = sorted((d for d in detections if d.label == label), key=lambda d: d.score, reverse=True)
        found[label] = [d for d in ordered if d.score > least][:16]
    correct, matched = True, []
    for entry in metadata["include"]:
        chosen, fine = found[entry["class"]][: entry["count"]], True
        if len(chosen) < entry["count"]:
            correct = fine = False
        else:
            if "color" in entry and [d.color for d in chosen].count(entry["color"]) < entry["count"]:
                correct = fine = False
            if "position" in entry and fine:
                relation, index = entry["position"]
                if matched[index] is None:
                    correct = fine = False
                else:
                    for a in chosen:
                        for b in matched[index]:
                            if relation not in relations_between(a.box, b.box):
                                correct = fine = False
        matched.append(chosen if fine else None)
    return correct and not any(len(found[e["class"]]) >= e["count"] for e in metadata.get("exclude", ()))


def random_case(rng: random.Random) -> tuple[dict, list[Detection]]:
    include = []
    for i in range(rng.randint(1, 3)):
        entry = want(rng.choice((1, 1, 2, 3)), rng.choice(CLASSES))
        if rng.random() < 0.4:
            entry["color"] = rng.choice(COLORS)
        if i and rng.random() < 0.5:
            entry["position"] = [rng.choice(RELATIONS), rng.randrange(i)]
        include.append(entry)
    exclude = [want(rng.randint(1, 4), rng.choice(CLASSES)) for _ in range(rng.choice((0, 0, 1, 2)))]
    metadata = {"tag": rng.choice(("counting", "position")), "include": include}
    detections = [
        Detection(
            rng.choice(CLASSES),
            rng.choice((0.2, 0.5, 0.95, 0.97, 0.99)),
            box(rng.uniform(0, 100), rng.uniform(0, 100)),
            rng.choice(("red", "red", "blue")),
        )
        for _ in range(rng.randint(0, 9))
    ]
    return metadata | ({"exclude": exclude} if exclude else {}), detections


def test_the_strict_verdict_is_that_of_the_official_steps():
    rng = random.Random(1)
    verdicts = []
    for _ in range(6000):
        metadata, detections = random_case(rng)
        assert not metadata_problems(metadata, CLASSES)
        verdict = judge(metadata, detections)
        assert verdict.correct == official(metadata, detections), (metadata, detections)
        assert (verdict.graded == 1.0) == verdict.correct == (not verdict.reason)
        assert 0.0 <= verdict.graded <= 1.0
        verdicts.append(verdict.correct)
    assert 300 < sum(verdicts) < 5700


def test_the_grade_is_the_mean_of_the_demands_times_the_share_that_is_allowed():
    two_red = {"tag": "counting", "include": [want(2, color="red")], "exclude": [want(3)]}
    assert judge(two_red, []).graded == 0.0
    assert judge(two_red, dogs("red")).graded == pytest.approx(0.5)  # half the count, half the colour
    assert judge(two_red, dogs("red", "blue")).graded == pytest.approx((1 + 1 / 2) / 2)
    assert judge(two_red, dogs("red", "red")).graded == 1.0
    assert judge(two_red, dogs("red", "red", "red")).graded == pytest.approx(2 / 3)
    assert judge(two_red, dogs("red", "red", "red", "red")).graded == pytest.approx(1 / 2)
    both = {"tag": "position", "include": [want(), want(1, "cat", position=["left of", 0])]}
    cat = [Detection("cat", 0.9, box(100, 0), "red")]
    assert judge(both, dogs("red") + cat).graded == pytest.approx(2 / 3)
    assert judge(both, dogs("red") + cat).shares() == {"count": 1.0, "position": 0.0}
    assert judge(both, dogs("red")).graded == pytest.approx(1 / 3)


def test_the_reason_names_all_that_is_wrong():
    metadata = {"include": [want(2, color="red"), want(1, "cat", position=["above", 0])], "exclude": [want(1, "clock")]}
    clocks = [Detection("clock", 0.9, box(0, 0), "red")]
    assert judge(metadata, dogs("red", "blue") + clocks).reason == (
        "dog is blue, not red; found 0 cat, not 1; found 1 clock, at most 0 allowed"
    )
    cat = [Detection("cat", 0.9, box(0, 50), "red")]
    assert judge(metadata, dogs("red", "red") + cat).reason == "cat is not above dog"


def test_only_scores_above_the_threshold_count_and_counting_has_its_own():
    one = {"tag": "single_object", "include": [want()]}
    assert not judge(one, dogs("red", score=0.3)).correct
    assert judge(one, dogs("red", score=0.31)).correct
    counting = {"tag": "counting", "include": [want(2)], "exclude": [want(3)]}
    assert not judge(counting, dogs("red", "red", score=0.9)).correct
    assert judge(counting, dogs("red", "red", score=0.91)).correct
    assert judge(counting, dogs("red", "red", score=0.6), Thresholds(counting=0.5)).correct


def test_at_most_sixteen_objects_of_a_class_are_seen():
    metadata = {"include": [want()], "exclude": [want(17)]}
    assert judge(metadata, dogs(*["red"] * 20)).correct
    assert not judge(metadata, dogs(*["red"] * 20), Thresholds(max_objects=17)).correct


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no include"),
        ({"include": []}, "no include"),
        ({"include": [{"class": "dog"}]}, r"include\[0\].count: None; give a whole number"),
        ({"include": [want(True)]}, r"include\[0\].count: True"),
        ({"include": [want(0)]}, r"include\[0\].count: 0"),
        ({"include": [want(1, "yeti")]}, r"include\[0\].class: 'yeti' is nothing that the detector can find"),
        ({"include": [want(color="mauve")]}, r"include\[0\].color: 'mauve' is none of red"),
        ({"include": [want(position=["above", 0])]}, r"include\[0\].position: .* an earlier entry"),
        ({"include": [want(), want(position=["near", 0])]}, r"include\[1\].position"),
        ({"include": [want()], "exclude": [want(1, "yeti")]}, r"exclude\[0\].class"),
    ],
)
def test_metadata_that_the_rules_do_not_fit_is_named(metadata, message):
    (problem,) = metadata_problems(metadata, CLASSES)
    assert re.search(message, problem)


def test_colors_are_refused_where_the_detector_names_none():
    (problem,) = metadata_problems({"include": [want(color="red")]}, CLASSES, ())
    assert "the detector names no colours" in problem
