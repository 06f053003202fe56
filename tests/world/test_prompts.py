from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest

from rlpipe.world.checker import Detection, check_detections
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
from rlpipe.world.scenes import (
    COLORS,
    RELATIONS,
    SHAPES,
    correct_scene,
    near_miss,
    near_miss_spec,
    sample_scene,
)
from rlpipe.world.vocabulary import WORDS
from tests.world.builders import (
    ABOVE,
    RED_CIRCLE_ONLY,
    tokens,
)


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
