"""The data factory without Ray: states, rows, images made elsewhere, settings, and the judge's reasons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import load_config
from rlpipe.data.factory import (
    FactoryError,
    Shard,
    begin,
    factory_problems,
    images_elsewhere,
    join_shards,
    label_row,
    shards_of,
    state_of,
)
from rlpipe.data.labels import load_labels, write_rows
from rlpipe.paths import resolve_path
from rlpipe.reward.internvl import InternVLJudge
from rlpipe.reward.reason import Explainer, first_sentences
from rlpipe.reward.simple import Brightness
from rlpipe.schema import FactorySection, SftSection
from rlpipe.types import Prompt, Score, ScoreRequest
from rlpipe.world.models import JUDGE_QUESTION

PROMPTS = [Prompt("red", "a photo of a red circle"), Prompt("blue", "a photo of a blue circle")]


@pytest.mark.parametrize(
    ("prob", "verdict", "state"),
    [
        (0.9, True, 4),
        (0.7, True, 4),
        (0.9, False, 1),
        (0.1, False, 0),
        (0.1, True, 3),
        (0.6, False, 2),
        (0.5, True, 2),
        (0.9, None, 2),
    ],
)
def test_score_and_reason_make_the_state(prob, verdict, state):
    assert state_of(prob, verdict, FactorySection(positive_prob=0.7, negative_prob=0.5)) == state


def test_an_image_without_score_or_reason_is_left_out_and_the_others_keep_their_numbers():
    shard = Shard("janus", 0, (7,), (PROMPTS[0],))
    scores = [Score("", 0.91234), Score("", None, error="gone"), Score("", 0.2), Score("", 0.1)]
    reasons = ["yes, it is.", "no, it is not.", None, "no, it is blue."]
    row = label_row(shard, 0, ["a.png", "b.png", "c.png", "d.png"], scores, reasons, FactorySection())
    assert row["promptid"] == 7 and [image["id"] for image in row["data"]] == [0, 3]
    assert row["data"][0] == {"id": 0, "img_path": "a.png", "reason": "Yes, it is.", "prob": 0.9123, "state": 4}
    assert row["data"][1]["state"] == 0


def test_images_made_elsewhere_find_their_prompt_by_id_or_place(tmp_path):
    for name in ("red_2.png", "red_10.png", "1_0.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = images_elsewhere(tmp_path, PROMPTS)
    assert [[Path(file).name for file in found[place]] for place in (0, 1)] == [
        ["red_2.png", "red_10.png"],
        ["1_0.jpg"],
    ]
    path = tmp_path / "images.jsonl"
    path.write_text(json.dumps({"id": "blue", "images": ["red_2.png"]}) + "\n")
    assert images_elsewhere(path, PROMPTS) == {1: (str(tmp_path / "red_2.png"),)}
    path.write_text(json.dumps({"id": "blue", "images": ["gone.png"]}) + "\n" + json.dumps({"id": "green"}) + "\n")
    with pytest.raises(FactoryError, match=r"images.jsonl:1: .*gone.png does not exist(.|\n)*images.jsonl:2: give"):
        images_elsewhere(path, PROMPTS)
    Image.new("RGB", (8, 8)).save(tmp_path / "green_0.png")
    with pytest.raises(FactoryError, match="no prompt 'green'"):
        images_elsewhere(tmp_path, PROMPTS)


def config_of(tmp_path: Path, *overrides: str):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a photo of {i} circles\n" for i in range(5)))
    fixed = [f"data.prompts={prompts}", f"factory.out={tmp_path / 'set'}", "factory.shard_size=2"]
    return load_config("configs/tiny_data.yaml", [*fixed, *overrides])


def test_every_prompt_is_in_one_shard_of_each_source(tmp_path):
    images = tmp_path / "flux"
    images.mkdir()
    for name in ("3_0.png", "1_0.png", "1_1.png"):
        Image.new("RGB", (8, 8)).save(images / name)
    shards = shards_of(config_of(tmp_path, f"factory.images={images}", "factory.limit=4"))
    assert [(s.source, s.promptids) for s in shards] == [("janus", (0, 1)), ("janus", (2, 3)), ("flux", (1, 3))]
    assert [len(files) for files in shards[2].files] == [2, 1]


def test_joined_shards_are_what_fine_tuning_reads(tmp_path):
    config = config_of(tmp_path)
    shards = shards_of(config)
    out = Path(config.factory.out)
    for shard in shards:
        names = [[f"images/{i}.png"] for i in shard.promptids]
        (out / "images").mkdir(parents=True, exist_ok=True)
        for (name,) in names:
            Image.new("RGB", (48, 48)).save(out / name)
        rows = [
            label_row(shard, n, names[n], [Score("", 0.9)], ["yes, so it is."], config.factory)
            for n in range(len(names))
        ]
        write_rows(shard.path(out), rows)
    ((path, counts),) = join_shards(shards, config.factory)
    assert path == out / "labels" / "janus_0.7.jsonl" and counts == {"images": 5, "right": 5, "wrong": 0}
    labels = load_labels(SftSection(data=str(out)))
    assert len(labels.targets) == 5 and labels.prompts["4"] == "a photo of 4 circles"


def test_a_set_made_with_other_settings_is_not_gone_on_with(tmp_path):
    config = config_of(tmp_path)
    begin(config)
    assert not list(factory_problems(config))
    config.factory.max_failed_share = 0.5
    config.policy.path = str(resolve_path(config.policy.path))
    assert not list(factory_problems(config))
    config.factory.images_per_prompt += 1
    (line,) = factory_problems(config)
    assert line.startswith("factory.out: ") and "factory.images_per_prompt (12 -> 13)" in line


def test_what_cannot_be_built_is_told_with_the_key_to_change(tmp_path):
    overrides = ["factory.images_per_prompt=0", "factory.negative_prob=0.9", "factory.source=a/b"]
    lines = list(factory_problems(config_of(tmp_path, *overrides)))
    assert [line.split(":")[0] for line in lines] == [
        "factory.negative_prob",
        "factory.images_per_prompt",
        "factory.source",
    ]


@pytest.fixture(scope="module")
def judge() -> InternVLJudge:
    return InternVLJudge("rlpipe/world/assets/judge", JUDGE_QUESTION, batch_size=3, device="cpu")


def circle(color: tuple[int, int, int]) -> np.ndarray:
    y, x = np.mgrid[:48, :48]
    image = np.full((48, 48, 3), 255, np.uint8)
    image[(x - 24) ** 2 + (y - 24) ** 2 < 64] = color
    return image


def test_the_judge_says_why_whatever_stands_beside_an_image_in_its_batch(judge):
    image = circle((220, 30, 30))
    texts = ["a photo of a circle", "a photo of a blue square left of a red cross", "a photo of three green stars"]
    requests = [ScoreRequest(str(i), Prompt(str(i), text), image) for i, text in enumerate(texts)]
    explainer = Explainer(judge, JUDGE_QUESTION, tokens=20, sentences=1)
    together = explainer.explain(requests)
    assert together == [explainer.explain([request])[0] for request in requests]
    for request, reason in zip(requests, together, strict=True):
        likelier = judge.score([request])[0].value > 0.5
        assert reason.startswith("yes, " if likelier else "no, ") and reason.endswith(".") and len(reason) > 10


def test_a_scorer_that_cannot_speak_is_refused():
    with pytest.raises(ValueError, match="reward.0.scorer: Brightness gives no reasons; take internvl"):
        Explainer(Brightness(), JUDGE_QUESTION)


def test_sentences_end_at_their_mark():
    text = "no, it is 2.5 times too big. not one. not"
    assert first_sentences(text, 1) == "no, it is 2.5 times too big."
    assert first_sentences(text, 2) == "no, it is 2.5 times too big. not one."
    assert first_sentences(text, 5) == first_sentences(text, 0) == text
