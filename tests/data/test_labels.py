"""Label files and edit pairs: what is read, what is refused, what pairs with what."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import SftSection, load_config, validate
from rlpipe.data.edits import load_edits
from rlpipe.data.labels import (
    Judgements,
    Label,
    load_labels,
    normalised,
    pair,
    says,
    sft_problems,
    summary,
)
from rlpipe.data.prompts import LabelError


def section(folder: Path, **values) -> SftSection:
    return SftSection(data=str(folder), **values)


def names(labels: list[Label]) -> list[str]:
    return [Path(label.path).name for label in labels]


def test_states_say_which_images_are_right_and_which_are_wrong(write_set, tmp_path):
    states = [(4, 0.9), (0, 0.1), (1, 0.8), (3, 0.2), (2, 0.6)]
    labels = load_labels(section(write_set(tmp_path, flux=[states])))
    assert names(labels.targets) == names(labels.right) == ["0_0.png"]
    assert names(labels.wrong) == ["0_1.png", "0_2.png"]
    assert labels.right[0].reason == "Yes, there is a red circle."
    assert labels.wrong[0].reason == "No, there is a orange circle."
    assert labels.prompts == {"0": "a photo of 0 circles"}


def test_official_paths_start_at_a_folder_above_the_labels(write_set, tmp_path):
    folder = write_set(tmp_path / "data" / "t2i", "data/t2i/", flux=[[(4, 0.9)]])
    found = load_labels(section(folder)).targets[0].path
    assert Path(found) == folder / "images" / "flux" / "0_0.png"
    assert load_labels(section(folder, root=str(tmp_path))).targets[0].path == found
    files = [str(folder / "labels" / "flux_0.7.jsonl")]
    assert load_labels(SftSection(labels=files, root=str(tmp_path))).targets[0].path == found


def test_scores_can_decide_with_bounds_of_their_own(write_set, tmp_path):
    states = [(4, 0.85), (4, 0.75), (0, 0.6), (0, 0.4), (3, 0.3)]
    labels = load_labels(section(write_set(tmp_path, flux=[states]), label_by="prob"))
    assert names(labels.targets) == ["0_0.png"]
    assert names(labels.right) == ["0_0.png", "0_1.png"]
    # 0_2 lies between the bounds; the reason of 0_4 says Yes to a low score.
    assert names(labels.wrong) == ["0_3.png"]


def test_wrong_images_of_a_second_source_are_redrawn(write_set, tmp_path):
    folder = write_set(tmp_path, flux=[[(4, 0.9)]], janus=[[(0, 0.2), (4, 0.95)]])
    labels = load_labels(section(folder, target_sources=["flux"], judge_sources=["flux"]))
    assert names(labels.redraws["0"].right) == ["0_0.png"] and len(labels.redraws["0"].wrong) == 1
    assert labels.redraws["0"].wrong[0].source == "janus"
    assert {label.source for label in labels.targets + labels.right} == {"flux"} and not labels.wrong
    everything = load_labels(section(folder))
    assert len(everything.targets) == 2 and len(everything.wrong) == 1


def test_a_prompt_whose_right_images_score_no_higher_is_not_redrawn(write_set, tmp_path):
    folder = write_set(tmp_path, flux=[[(4, 0.71), (1, 0.8)], [(4, 0.9), (1, 0.8)]])
    assert list(load_labels(section(folder)).redraws) == ["1"]


def test_the_larger_class_is_sampled_down_once_by_the_seed(write_set, tmp_path):
    folder = write_set(tmp_path, flux=[[(4, 0.9)] * 9 + [(0, 0.1)] * 4])
    labels = load_labels(section(folder))
    chosen = [[names(side) for side in labels.balanced(seed)] for seed in (0, 0, 1)]
    assert [len(side) for side in chosen[0]] == [4, 4]
    assert chosen[0] == chosen[1] and set(chosen[0][0]) != set(chosen[2][0])


def label(prob: float, verdict: bool) -> Label:
    return Label("0", f"{prob}.png", "", prob, verdict, verdict, "flux")


def test_a_pair_goes_from_a_lower_score_to_a_higher_one():
    wrong = [label(p, False) for p in (0.1, 0.4, 0.75, 0.8)]
    right = [label(p, True) for p in (0.7, 0.72, 0.9)]
    rng = np.random.default_rng(0)
    pairs = [pair(Judgements(right, wrong), rng) for _ in range(300)]
    assert all(high.prob > low.prob for low, high in pairs)
    assert len(Counter((low.prob, high.prob) for low, high in pairs)) == 8
    # Hardly any random pair fits here, so the extremes come most often.
    tight = Judgements([label(0.7, True)] * 20 + [label(0.9, True)], [label(0.1, False)] + [label(0.8, False)] * 20)
    extremes = sum((low.prob, high.prob) == (0.1, 0.9) for low, high in (pair(tight, rng) for _ in range(200)))
    assert extremes > 100


@pytest.mark.parametrize(
    ("reason", "verdict", "spelt"),
    [
        ("yes, two circles.", True, "Yes, two circles."),
        ("YES.\n\nAll there.", True, "Yes.\n\nAll there."),
        ("no, one circle.", False, "No, one circle."),
        ("Nothing matches.", None, "Nothing matches."),
        ("", None, ""),
    ],
)
def test_a_reason_says_yes_or_no_in_one_spelling(reason, verdict, spelt):
    assert says(reason) is verdict and normalised(reason) == spelt


def test_bad_rows_are_named_by_file_and_line(write_set, tmp_path):
    folder = write_set(tmp_path, flux=[[(4, 0.9)], [(4, 0.9)]])
    path = folder / "labels" / "flux_0.7.jsonl"
    good = json.loads(path.read_text().splitlines()[0])
    image = good["data"][0]
    bad = [
        "{",
        json.dumps(good | {"prompt": ""}),
        json.dumps(good | {"data": [image | {"prob": 1.5}]}),
        json.dumps(good | {"data": [image | {"state": 7}]}),
        json.dumps(good | {"data": [image | {"img_path": "images/gone.png"}]}),
        json.dumps(good | {"data": [image | {"reason": "No, it is not."}]}),
        json.dumps(good | {"prompt": "another"}),
        json.dumps(good | {"data": None}),
    ]
    path.write_text("\n".join([json.dumps(good), *bad]) + "\n")
    with pytest.raises(LabelError) as error:
        load_labels(section(folder))
    text = str(error.value)
    assert all(f"flux_0.7.jsonl:{line}: " in text for line in range(2, 10)), text
    for words in (
        "not JSON",
        "prompt is ''",
        ".prob is 1.5",
        ".state is 7",
        "gone.png",
        "state 4 is a Yes",
        "promptid 0",
    ):
        assert words in text
    assert "flux_0.7.jsonl:1:" not in text


def test_a_source_that_is_not_there_is_refused_with_those_that_are(write_set, tmp_path):
    folder = write_set(tmp_path, flux=[[(4, 0.9)]])
    with pytest.raises(LabelError, match="sft.target_sources: 'sdxl' has no labels; the sources are flux"):
        load_labels(section(folder, target_sources=["sdxl"]))


def test_a_sub_task_without_examples_is_refused_before_anything_starts(write_set, tmp_path):
    folder = write_set(tmp_path, flux=[[(4, 0.9)]])
    config = load_config("configs/tiny_sft.yaml", [f"sft.data={folder}"])
    assert [line.split(":")[0] for line in sft_problems(config)] == ["sft.judge", "sft.redraw"]
    config.sft.judge = config.sft.redraw = 0.0
    assert not list(sft_problems(config))
    config.sft.max_context_images = 3
    assert "rollout.history" in next(sft_problems(config))


def test_edit_pairs_are_read_with_the_keys_of_either_format(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 48)).save(tmp_path / name)
    rows = [
        {"image1": "a.png", "image2": "b.png", "text": "draw it red"},
        {"sample_id": 3, "input": "b.png", "output": "a.png", "text": "draw it blue"},
    ]
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load_edits(path)
    assert (first.source, first.target, first.instruction) == (
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
        "draw it red",
    )
    assert (second.source, second.target) == (first.target, first.source) and first.id != second.id
    path.write_text(json.dumps(rows[0] | {"image2": "c.png"}) + "\n" + json.dumps(rows[0] | {"text": 3}) + "\n")
    with pytest.raises(LabelError, match=r"edits.jsonl:1: image2 is 'c.png'(.|\n)*edits.jsonl:2: text is 3"):
        load_edits(path)


def test_the_configuration_of_the_7b_can_be_run_on_the_official_layout(write_set, tmp_path):
    folder = write_set(tmp_path / "set", flux=[[(4, 0.9), (0, 0.2)]], janus=[[(0, 0.3)]])
    overrides = [f"sft.data={folder}", f"run.dir={tmp_path / 'run'}", "policy.path=rlpipe/world/assets/policy"]
    config = validate(load_config("configs/janus_pro_7b_sft.yaml", overrides), job="sft")
    assert (config.sft.draw, config.sft.judge, config.sft.redraw) == (0.2, 0.3, 0.5)
    assert summary(config.sft) == (
        "sft.data: 1 prompts, 1 images to draw, 1 right and 1 wrong ones to judge, 1 prompts to redraw"
    )
