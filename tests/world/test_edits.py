"""Edits of the tiny world: instructions, what they make of scenes, and the exact checker."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from rlpipe.data.prompts import load_prompts
from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.edit_examples import EditPool, edited_pool, near_edit, pool_of_edits
from rlpipe.world.edits import (
    KINDS,
    LEAST_MOVE,
    Edit,
    Task,
    all_edits,
    apply_edit,
    check_edit,
    edit_from_metadata,
    is_held_out,
    sample_task,
    split_edits,
    write_edits,
)
from rlpipe.world.render import render
from rlpipe.world.scenes import COLORS, SHAPES, Scene, SceneObject

RED, BLUE = SceneObject("red", "circle", 12, 12), SceneObject("blue", "square", 36, 32)
GREEN = SceneObject("green", "cross", 36, 12)


def tasks(count: int, split: str = "all", seed: int = 0) -> list[Task]:
    rng = random.Random(seed)
    return [sample_task(rng, split) for _ in range(count)]


def judged(edit: Edit, source: Scene, edited: Scene) -> tuple[bool, bool]:
    verdict = check_edit(edit.metadata, render(source), render(edited))
    assert verdict.following == verdict.following_reason.startswith("Yes")
    assert verdict.preserving == verdict.preserving_reason.startswith("Yes")
    return verdict.following, verdict.preserving


def test_the_target_of_a_task_follows_and_preserves_and_its_source_only_preserves():
    for task in tasks(200):
        assert judged(task.edit, task.source, task.target) == (True, True), task
        assert judged(task.edit, task.source, task.source) == (False, True), task


def test_sources_name_one_object_and_targets_differ_from_them_in_that_object_alone():
    for task in tasks(200, seed=1):
        looks = [(o.color, o.shape) for o in task.source]
        assert len(set(looks)) == len(looks) and 2 <= max(len(task.source), len(task.target)) <= 3
        assert looks.count((task.edit.color, task.edit.shape)) == (task.edit.kind != "add")
        changed = set(task.source) ^ set(task.target)
        assert len(changed) == (1 if task.edit.kind in ("add", "remove") else 2)


def test_instructions_are_five_words_that_the_shipped_policy_knows():
    templates = JanusPolicy.load("rlpipe/world/assets/policy").templates
    unknown = templates.tokenizer.unk_token_id
    for kind in KINDS:
        for edit in all_edits(kind):
            ids = templates.tokenizer.encode(edit.text, add_special_tokens=False)
            assert len(ids) == 5 and unknown not in ids, edit.text


def test_instructions_are_distinct_and_splits_share_none():
    every = [edit.text for kind in KINDS for edit in all_edits(kind)]
    assert len(set(every)) == len(every) == 30 * (5 + 4 + 1 + 1)
    for kind in KINDS:
        train, test = split_edits("train", kind), split_edits("test", kind)
        assert set(train) | set(test) == set(all_edits(kind)) and not set(train) & set(test)
        assert all(map(is_held_out, test)) and 3 <= len(test) < len(train) / 2
    assert not any(is_held_out(task.edit) for task in tasks(200, "train"))


def test_metadata_names_the_edit_and_is_read_back():
    edit = Edit("move", "red", "circle", "above")
    assert edit.metadata == {
        "tag": "move",
        "edit": {"kind": "move", "color": "red", "shape": "circle", "to": "above"},
    }
    assert edit_from_metadata({**edit.metadata, "id": "7"}) == edit
    with pytest.raises(ValueError, match="metadata.edit: None; give an object"):
        edit_from_metadata({"tag": "move"})
    with pytest.raises(ValueError, match="edit.to: 'up' is none of left, right, above, below"):
        Edit("move", "red", "circle", "up")
    with pytest.raises(ValueError, match="edit.to: 'red' is the colour that it has already"):
        Edit("recolor", "red", "circle", "red")


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        ((replace(RED, color="yellow"), BLUE), (True, True)),
        ((replace(RED, color="green"), BLUE), (False, True)),
        ((replace(RED, color="yellow", shape="cross"), BLUE), (False, True)),
        ((BLUE,), (False, True)),
        ((replace(RED, color="yellow"), replace(BLUE, color="purple")), (True, False)),
        ((replace(RED, color="yellow"), replace(BLUE, shape="circle")), (True, False)),
        ((replace(RED, color="yellow"), replace(BLUE, y=36)), (True, False)),
        ((replace(RED, color="yellow"),), (True, False)),
        ((replace(RED, color="yellow"), BLUE, GREEN), (True, False)),
        ((replace(RED, color="yellow", x=16), BLUE), (False, True)),
        ((RED, replace(BLUE, color="yellow")), (False, False)),
        ((), (False, False)),
    ],
)
def test_a_recoloring_is_checked_by_place_shape_and_colour(edited, expected):
    assert judged(Edit("recolor", "red", "circle", "yellow"), (RED, BLUE), edited) == expected


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        ((replace(RED, y=24), BLUE), (True, True)),
        ((replace(RED, y=12 + LEAST_MOVE), BLUE), (True, True)),
        ((replace(RED, y=12 + LEAST_MOVE // 2), BLUE), (False, True)),
        ((replace(RED, y=24, x=16), BLUE), (False, True)),
        ((replace(RED, y=32), BLUE, RED), (False, False)),
        ((replace(RED, y=32, color="green"), BLUE), (False, True)),
        ((replace(RED, y=32), replace(BLUE, y=12)), (True, False)),
    ],
)
def test_a_move_is_checked_by_its_direction_and_leaves_nothing_behind(edited, expected):
    assert judged(Edit("move", "red", "circle", "below"), (RED, BLUE), edited) == expected


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        ((BLUE,), (True, True)),
        ((RED, BLUE), (False, True)),
        ((replace(RED, color="green"), BLUE), (False, True)),
        ((RED,), (False, False)),
        ((BLUE, GREEN), (True, False)),
        ((), (True, False)),
    ],
)
def test_a_removal_leaves_its_place_empty(edited, expected):
    assert judged(Edit("remove", "red", "circle"), (RED, BLUE), edited) == expected


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        ((RED, BLUE, GREEN), (True, True)),
        ((RED, BLUE, replace(GREEN, shape="circle")), (False, True)),
        ((RED, BLUE, GREEN, replace(GREEN, x=12, y=36)), (False, False)),
        ((RED, GREEN), (True, False)),
        ((GREEN, replace(RED, x=16), BLUE), (True, False)),
    ],
)
def test_an_addition_is_one_more_object_and_nothing_else(edited, expected):
    assert judged(Edit("add", "green", "cross"), (RED, BLUE), edited) == expected


def test_an_instruction_that_does_not_fit_its_source_is_refused():
    with pytest.raises(ValueError, match="'draw not the green cross' on a source image without a green cross"):
        check_edit(Edit("remove", "green", "cross").metadata, render((RED,)), render((RED,)))
    with pytest.raises(ValueError, match="on a source image with a red circle"):
        check_edit(Edit("add", "red", "circle").metadata, render((RED,)), render((RED,)))
    rng = random.Random(0)
    assert apply_edit(rng, Edit("remove", "green", "cross"), (RED,)) is None
    assert apply_edit(rng, Edit("move", "red", "circle", "left"), (RED,)) is None


def test_a_round_trip_through_the_vq_tokenizer_is_still_judged_right():
    policy, some = JanusPolicy.load("rlpipe/world/assets/policy"), tasks(60, seed=3)
    codes = policy.encode_pixels(torch.from_numpy(np.stack([render(task.target) for task in some])))
    images = policy.decode_codes(codes).numpy()
    pool = pool_of_edits(some, images, seed=0, near_misses=False)
    right = [case.verdict.following and case.verdict.preserving for case in pool.cases]
    assert np.mean(right) > 0.9


def test_pools_hold_every_answer_to_both_questions_and_survive_saving(tmp_path):
    pool = edited_pool(JanusPolicy.load("rlpipe/world/assets/policy"), 60, seed=5)
    assert {(c.verdict.following, c.verdict.preserving) for c in pool.cases} == {
        (a, b) for a in (True, False) for b in (True, False)
    }
    assert not any(is_held_out(case.edit) for case in pool.cases) and len(pool.cases) == 120
    pool.save(tmp_path / "pool.npz")
    loaded = EditPool.load(tmp_path / "pool.npz")
    assert loaded.cases == pool.cases
    np.testing.assert_array_equal(loaded.images, pool.images)
    np.testing.assert_array_equal(loaded.sources, pool.sources)


def test_a_near_instruction_fits_the_source_and_is_another_one():
    rng = random.Random(2)
    for task in tasks(100, "train"):
        edit = near_edit(rng, task)
        assert edit != task.edit and apply_edit(rng, edit, task.source) != task.target
        check_edit(edit.metadata, render(task.source), render(task.target))


def test_written_prompts_load_with_their_sources_and_are_the_same_again(tmp_path):
    for name in ("one", "two"):
        write_edits(tmp_path / name, train=8, test=8, pairs=4, seed=3)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    prompts = load_prompts(tmp_path / "one/prompts_test.jsonl")
    assert [prompt.metadata["tag"] for prompt in prompts] == [*KINDS, *KINDS]
    for prompt in prompts:
        edit = edit_from_metadata(prompt.metadata)
        assert edit.text == prompt.text and is_held_out(edit)
        source = np.asarray(Image.open(prompt.source_image))
        assert check_edit(prompt.metadata, source, source).preserving


def test_supervised_pairs_show_their_instruction(tmp_path):
    write_edits(tmp_path, train=4, test=4, pairs=8)
    edits = {edit.text: edit for kind in KINDS for edit in all_edits(kind)}
    for line in (tmp_path / "sft.jsonl").read_text().splitlines():
        row = json.loads(line)
        source, target = (np.asarray(Image.open(tmp_path / row[key])) for key in ("image1", "image2"))
        verdict = check_edit(edits[row["text"]].metadata, source, target)
        assert verdict.following and verdict.preserving and not is_held_out(edits[row["text"]])


def test_every_colour_and_shape_is_edited():
    seen = {(task.edit.color, task.edit.shape) for task in tasks(600)}
    assert {color for color, _ in seen} == set(COLORS) and {shape for _, shape in seen} == set(SHAPES)
