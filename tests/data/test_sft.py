"""Supervised examples of label files and edit pairs, as trajectories that the learner can score."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import SftSection, load_config
from rlpipe.data.codes import ImageStore
from rlpipe.data.edits import load_edits
from rlpipe.data.examples import EditExamples, LabelExamples
from rlpipe.data.prompts import LabelError, PromptError
from rlpipe.data.sft import SftMixture, build_mixture, supervised_sampling
from rlpipe.learn.replay import lay_out, segment_logprobs
from rlpipe.types import Sampling

STATES = [[(4, 0.9), (4, 0.8), (0, 0.1), (0, 0.3), (1, 0.75)], [(4, 0.95), (0, 0.2)], [(0, 0.4), (0, 0.05)]]
COLORS = ("red", "orange", "yellow", "green", "blue")
"""In the reasons of a prompt's images, by their number."""
WORDS = Sampling(max_reflection_tokens=20)


@pytest.fixture
def folder(write_set, tmp_path) -> Path:
    return write_set(tmp_path / "set", flux=STATES)


def examples_of(folder: Path, policy, sampling: Sampling = WORDS, cache: Path | None = None, **values) -> LabelExamples:
    section = SftSection(data=str(folder), batch_size=6, **values)
    return LabelExamples.prepare(section, ImageStore(policy, cache), policy.templates, sampling, seed=0)


def items_equal(a, b) -> bool:
    def flat(item):
        segments = [segment.token_ids.tolist() for segment in item.trajectory.segments]
        return segments, [image.tobytes() for image in item.images], item.credits, item.blank_prompt

    return [flat(item) for item in a] == [flat(item) for item in b]


def test_every_sub_task_trains_its_last_segment_and_can_be_replayed(folder, tiny_policy):
    examples = examples_of(folder, tiny_policy)
    rng = np.random.default_rng(0)
    kinds = {"draw": ("image",), "judge": ("image", "text"), "redraw": ("image", "text", "image")}
    for task, expected in kinds.items():
        items = getattr(examples, task)(rng, 4)
        for item, logprobs in zip(items, segment_logprobs(tiny_policy, items), strict=True):
            assert tuple(segment.kind for segment in item.trajectory.segments) == expected
            assert [credit.ce for credit in item.credits] == [0.0] * (len(expected) - 1) + [1.0]
            assert all(values is None for values in logprobs[:-1]) and np.isfinite(logprobs[-1]).all()


def test_targets_are_the_codes_of_right_images(folder, tiny_policy):
    examples = examples_of(folder, tiny_policy)
    known = {tuple(examples.store.codes([label.path])[0]) for label in examples.labels.targets}
    for item in examples.draw(np.random.default_rng(0), 20):
        assert tuple(item.trajectory.segments[0].token_ids) in known
    for item in examples.redraw(np.random.default_rng(0), 20):
        first, answer, target = item.trajectory.segments
        assert tuple(target.token_ids) in known and tuple(first.token_ids) not in known
        assert examples.templates.text(answer.token_ids).startswith("No, ")


def test_judgements_are_balanced_and_say_what_their_image_is(folder, tiny_policy):
    examples = examples_of(folder, tiny_policy)
    assert len(examples.right) == len(examples.wrong) == 3
    items = examples.judge(np.random.default_rng(0), 10)
    words = [examples.templates.text(item.trajectory.segments[-1].token_ids) for item in items]
    assert [text.startswith("Yes, ") for text in words] == [item.trajectory.verdicts[-1] for item in items]
    assert sum(item.trajectory.verdicts[-1] for item in items) == 5
    pixels = {np.asarray(Image.open(label.path)).tobytes() for label in examples.right + examples.wrong}
    assert all(item.images[0].tobytes() in pixels for item in items)


def test_up_to_three_images_stand_before_the_target_in_the_order_of_their_scores(folder, tiny_policy):
    sampling = Sampling(max_reflection_tokens=20, history="all")
    examples = examples_of(folder, tiny_policy, sampling, max_context_images=3)
    lengths = {}
    for task in ("judge", "redraw"):
        items = getattr(examples, task)(np.random.default_rng(1), 60)
        lengths[task] = {len(item.trajectory.segments) for item in items}
        for item in items:
            trajectory = item.trajectory
            words = [examples.templates.text(trajectory.segments[i].token_ids) for i in trajectory.texts]
            number = int(trajectory.prompt.id.removeprefix("label-"))
            probs = [STATES[number][COLORS.index(text.split()[-2])][1] for text in words]
            assert probs == sorted(probs) and len(set(probs)) == len(probs)
            assert not any(trajectory.verdicts[:-1]) and all(text.startswith("No") for text in words[:-1])
            assert len(item.images) == (len(words) if task == "judge" else 0)
        assert np.isfinite(np.concatenate([row[-1] for row in segment_logprobs(tiny_policy, items[:8])])).all()
    assert lengths == {"judge": {2, 4, 6}, "redraw": {3, 5, 7}}


@pytest.mark.parametrize("tasks", [("draw",), ("judge",), ("draw", "redraw"), ("judge", "redraw")])
def test_any_subset_of_the_sub_tasks_can_be_trained(folder, tiny_policy, tasks):
    section = SftSection(**{task: float(task in tasks) for task in ("draw", "judge", "redraw")}, batch_size=3)
    mixture = SftMixture(section, examples_of(folder, tiny_policy), seed=0)
    assert {mixture.task(step) for step in range(30)} == set(tasks)
    assert all(len(mixture.batch(step)) == 3 for step in range(4))


def test_a_batch_depends_on_seed_and_step_alone(folder, tiny_policy, tmp_path):
    section = SftSection(batch_size=6)
    fresh = SftMixture(section, examples_of(folder, tiny_policy), seed=3)
    used = SftMixture(section, examples_of(folder, tiny_policy, cache=tmp_path / "codes"), seed=3)
    for step in range(5):
        used.batch(step)
    again = SftMixture(section, examples_of(folder, tiny_policy, cache=tmp_path / "codes"), seed=3)
    for step in (4, 1):
        assert items_equal(fresh.batch(step), used.batch(step)) and items_equal(fresh.batch(step), again.batch(step))
    assert not items_equal(fresh.batch(1), fresh.batch(2))


def test_codes_are_encoded_once_until_their_image_changes(folder, tiny_policy, tmp_path):
    paths = sorted(map(str, (folder / "images" / "flux").glob("*.png")))
    first = ImageStore(tiny_policy, tmp_path / "codes")
    codes = first.codes(paths)
    assert first.num_encoded == len(paths) and codes.dtype == np.int64
    assert len(codes) == len(paths) and codes.shape[1] == tiny_policy.num_image_tokens
    with first.path.open("ab") as file:
        file.write(b"half a record")
    second = ImageStore(tiny_policy, tmp_path / "codes")
    assert np.array_equal(second.codes(paths), codes) and second.num_encoded == 0
    Image.new("RGB", (48, 48), (200, 0, 0)).save(paths[0])
    os.utime(paths[0], ns=(1, 1))
    assert not np.array_equal(second.codes(paths[:1]), codes[:1]) and second.num_encoded == 1
    third = ImageStore(tiny_policy, tmp_path / "codes")
    assert np.array_equal(third.codes(paths)[1:], codes[1:]) and third.num_encoded == 0


def test_no_more_pixels_are_kept_than_allowed(folder, tiny_policy):
    paths = sorted(map(str, (folder / "images" / "flux").glob("*.png")))
    store = ImageStore(tiny_policy, None, pixel_cache=2)
    kept = ImageStore(tiny_policy, None, pixel_cache=100)
    assert np.array_equal(store.pixels(paths, "pad"), kept.pixels(paths, "pad"))
    assert len(store._pixels) == 2 and len(kept._pixels) == len(paths)


def test_an_image_that_is_no_square_is_cropped_to_be_drawn_and_padded_to_be_looked_at(tiny_policy, tmp_path):
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, 24:72] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    store = ImageStore(tiny_policy, None)
    crop, pad = (store.pixels([str(tmp_path / "wide.png")], square)[0] for square in ("crop", "pad"))
    assert crop.min() > 250 and pad[24, 0].max() < 5 and (pad[0] == 127).all()


def test_an_answer_over_the_limit_is_cut_and_said_to_be(folder, tiny_policy):
    examples = examples_of(folder, tiny_policy, Sampling(max_reflection_tokens=4))
    for item in examples.judge(np.random.default_rng(0), 4):
        assert len(item.trajectory.segments[1]) == 4 and item.trajectory.truncated == (True,)
    whole = examples_of(folder, tiny_policy).judge(np.random.default_rng(0), 4)
    assert all(item.trajectory.truncated == (False,) for item in whole)


def test_a_prompt_that_is_too_long_is_refused_before_the_first_batch(folder, tiny_policy):
    path = folder / "labels" / "flux_0.7.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["prompt"] = "a photo of two red circles " * 100
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(PromptError, match="^1: .*policy.max_prompt_tokens"):
        examples_of(folder, tiny_policy)


def test_a_ratio_for_which_there_are_no_labels_is_refused(write_set, tiny_policy, tmp_path):
    folder = write_set(tmp_path / "right", flux=[[(4, 0.9)]])
    with pytest.raises(LabelError, match="sft.judge: 0.4, but sft.data has not both"):
        examples_of(folder, tiny_policy)


def test_edits_start_from_the_codes_of_their_source(tiny_policy, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(tmp_path / name)
    row = {"image1": "a.png", "image2": "b.png", "text": "draw the red circle blue"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(row) + "\n")
    store = ImageStore(tiny_policy, None)
    examples = EditExamples(load_edits(tmp_path / "edits.jsonl"), store, WORDS)
    (item,) = examples.edit(rng, 1)
    codes = store.codes([str(tmp_path / "a.png"), str(tmp_path / "b.png")])
    assert np.array_equal(item.trajectory.source_codes, codes[0])
    assert np.array_equal(item.trajectory.segments[0].token_ids, codes[1])
    ((logprobs,),) = segment_logprobs(tiny_policy, [item])
    assert np.isfinite(logprobs).all() and len(logprobs) == tiny_policy.num_image_tokens


def test_a_mixture_takes_labels_and_edits_from_one_configuration(folder, tiny_policy_path, tmp_path):
    row = {"image1": "set/images/flux/0_0.png", "image2": "set/images/flux/0_1.png", "text": "draw it red"}
    (tmp_path / "edits.jsonl").write_text(json.dumps(row) + "\n")
    values = {"sft.data": folder, "sft.edits": tmp_path / "edits.jsonl", "sft.edit": 0.5, "sft.batch_size": 20}
    values |= {"policy.path": tiny_policy_path, "run.dir": tmp_path / "run", "sft.prompt_dropout": 0.5}
    config = load_config("configs/tiny_sft.yaml", [f"{key}={value}" for key, value in values.items()])
    mixture = build_mixture(config, WORDS)
    batches = {mixture.task(step): mixture.batch(step) for step in range(40)}
    assert set(batches) == {"draw", "judge", "redraw", "edit"}
    for task, items in batches.items():
        assert any(item.blank_prompt for item in items) == (task != "judge")
    assert list((tmp_path / "run" / "codes").glob("*.codes"))


def test_supervised_tokens_are_scored_without_guidance_and_truncation():
    rollouts = Sampling(guidance=5.0, image_top_k=4, text_top_p=0.5, text_temperature=0.0, history="all")
    assert supervised_sampling(rollouts) == Sampling(history="all")


def test_plain_roles_change_the_prompt_that_is_replayed(tiny_policy, folder):
    policy = tiny_policy
    laid_out = []
    for roles in ("chat", "plain"):
        item = examples_of(folder, policy, redraw_roles=roles).redraw(np.random.default_rng(0), 1)[0]
        laid_out.append(lay_out([item], policy.templates))
    chat, plain = (replay.text_ids[replay.source[:2]].tolist() for replay in laid_out)
    assert chat == [policy.templates.bos, policy.templates.prompt("")[1]]
    assert plain == [policy.templates.bos, policy.templates.plain.prompt("")[1]]
    assert chat != plain
