"""Images to score, and what is left of their scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rlpipe.config import Config, ScorerSection
from rlpipe.data.scored import (
    ScoredError,
    begin,
    changed_settings,
    is_missing,
    join_shards,
    load_rows,
    read_shard,
    score_problems,
    scores_row,
    settings_of,
    shards_of,
    weighted_sum,
)
from rlpipe.evaluate.judged import calibration_problems, cases_of, read_scores
from rlpipe.schema import CalibrateSection, ScoreSection
from rlpipe.types import Score


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def paint(path: Path, shade: int = 9) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)
    return path.name


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Five images, named by a JSONL, two a shard."""
    rows = [{"image": paint(tmp_path / f"{i}.png", i), "prompt": f"shade {i}", "id": str(i)} for i in range(5)]
    config = Config()
    config.reward = [ScorerSection(name="red", scorer="redness", path=None)]
    config.score.images = str(write(tmp_path / "rows.jsonl", *rows))
    config.score.out, config.score.shard_size = str(tmp_path / "out"), 2
    return config


def fill(config: Config, value: float | None = 0.5) -> list:
    """Write every shard."""
    shards = shards_of(load_rows(config.score), config.score.shard_size)
    for shard in shards:
        rows = [scores_row(row, {"red": Score("", value, error="why")}) for row in shard.rows]
        write(shard.path(config.score.out), *rows)
    return shards


def problems(rows: list[object], folder: Path, **keys: str) -> str:
    with pytest.raises(ScoredError) as error:
        load_rows(ScoreSection(images=str(write(folder / "bad.jsonl", *rows)), **keys))
    return str(error.value)


def test_a_row_has_its_own_prompt_or_that_of_its_id_and_paths_start_at_its_file(tmp_path: Path) -> None:
    metadata = {"tag": "counting", "include": [{"class": "circle", "count": 2}]}
    prompts = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "two circles", **metadata})
    paint(tmp_path / "set" / "x.png")
    paint(tmp_path / "set" / "y.png")
    rows = [
        {"image": "x.png", "id": "a"},
        {"image": "x.png", "prompt": " one square ", "tag": "colors", "verdict": "Yes.", "source_image": "y.png"},
        {"image": str(tmp_path / "set" / "y.png")},
    ]
    path = write(tmp_path / "set" / "rows.jsonl", *rows)
    one, two, three = load_rows(ScoreSection(images=str(path), prompts=str(prompts), caption="a shape"))
    assert (one.prompt.id, one.prompt.text, dict(one.prompt.metadata)) == ("a", "two circles", metadata)
    assert (two.prompt.text, two.prompt.metadata["tag"], two.verdict) == ("one square", "colors", "Yes.")
    assert one.image == str(tmp_path / "set" / "x.png") and two.source_image == three.image
    assert three.prompt.text == "a shape" and two.prompt.id != three.prompt.id


def test_a_folder_of_images_is_read_in_the_order_of_names_with_one_caption(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "deep/c.PNG"):
        Image.new("RGB", (4, 4)).save(_made(tmp_path / "set" / name))
    (tmp_path / "set" / "notes.txt").write_text("no image")
    rows = load_rows(ScoreSection(images=str(tmp_path / "set"), caption="a cat"))
    assert [Path(row.image).name for row in rows] == ["a.jpg", "b.png", "c.PNG"]
    assert {row.prompt.text for row in rows} == {"a cat"}
    assert len(load_rows(ScoreSection(images=str(tmp_path / "set"), limit=2))) == 2


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    ("which", "images"),
    [
        ("first", ["samples/0.png", "samples/1.png"]),
        ("final", ["regen_samples/0.png", "samples/1.png"]),
        ("every", ["samples/0.png", "rounds/0_2.png", "regen_samples/0.png", "samples/1.png"]),
    ],
)
def test_a_results_folder_gives_its_images_with_what_was_said_of_each(tmp_path: Path, which: str, images: list) -> None:
    for name in ("samples/0.png", "rounds/0_2.png", "regen_samples/0.png", "samples/1.png", "regen_samples/1.png"):
        paint(tmp_path / name)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"program": "introspect"}))
    no, yes = {"correct": False, "reason": "No."}, {"correct": True, "reason": "Yes."}
    first = {"prompt": "p", "filename": "0.png", **no, "id": "a", "sample": 0, "images": 3, "rounds": [no, no]}
    second = {"prompt": "p", "filename": "1.png", **yes, "id": "a", "sample": 1, "images": 1}
    write(tmp_path / "reason.jsonl", first, second)
    rows = load_rows(ScoreSection(images=str(tmp_path), which=which))
    assert [str(Path(row.image).relative_to(tmp_path)) for row in rows] == images
    said = {"samples/0.png": "No.", "rounds/0_2.png": "No.", "samples/1.png": "Yes."}
    assert [row.verdict for row in rows] == [said.get(image) for image in images]
    assert [row.fields["sample"] for row in rows] == [int(Path(name).stem[0]) for name in images]


def test_edited_images_have_their_source_and_images_that_were_looked_at_are_where_they_were(tmp_path: Path) -> None:
    paint(tmp_path / "given.png")
    paint(tmp_path / "edit" / "samples" / "0.png")
    common = {"prompt": "p", "id": "a", "sample": 0, "images": 1, "source_image": str(tmp_path / "given.png")}
    write(tmp_path / "edit" / "samples.jsonl", {"filename": "0.png", **common})
    write(tmp_path / "look" / "reason.jsonl", {"filename": "given.png", "correct": True, "reason": "Yes.", **common})
    for program in ("edit", "look"):
        (tmp_path / program / "settings.yaml").write_text(f"program: {program}\n")
    (edited,), (looked,) = (load_rows(ScoreSection(images=str(tmp_path / name))) for name in ("edit", "look"))
    assert edited.image.endswith("samples/0.png") and edited.source_image == str(tmp_path / "given.png")
    assert looked.image == str(tmp_path / "given.png") and looked.source_image is None and looked.verdict == "Yes."


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "p"}, "image is missing"),
        ({"image": "none.png", "prompt": "p"}, "image is 'none.png'; no such file"),
        ({"image": "a.png", "id": "nobody"}, "no prompt, and id 'nobody' is none of score.prompts"),
        ({"image": "a.png", "prompt": 3}, "prompt is 3; give a text"),
        ({"image": "a.png", "prompt": "p", "label": "yes"}, "label is 'yes'; give true, false or a number"),
        ({"image": "a.png", "prompt": "p", "metadata": [1]}, "metadata is [1]; give an object"),
        ({"image": "a.png", "prompt": "p", "include": "circle"}, "include is 'circle'; give a list"),
        ({"image": "a.png", "prompt": "p", "verdict": True}, "verdict is True; give a text"),
        ({"image": "a.png", "prompt": "p", "source_image": "b.png"}, "source_image is 'b.png'; no such file"),
        ([1], "a list; give an object"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, told: str) -> None:
    good = {"image": paint(tmp_path / "a.png"), "prompt": "p"}
    assert problems([good, row], tmp_path).startswith(f"{tmp_path / 'bad.jsonl'}:2: {told}")


def test_a_prompt_that_is_not_that_of_its_id_is_refused(tmp_path: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "two circles"})
    row = {"image": paint(tmp_path / "a.png"), "id": "a", "prompt": "three circles"}
    assert "is not that of id 'a'" in problems([row], tmp_path, prompts=str(prompts))


def test_a_shard_counts_only_as_a_whole(config: Config) -> None:
    shard = fill(config)[0]
    path, out = shard.path(config.score.out), config.score.out
    whole = path.read_text()
    assert len(read_shard(shard, out, ["red"])) == 2
    lines = whole.splitlines(keepends=True)
    other = lines[0].replace("0.png", "4.png")
    unscored = json.dumps({**json.loads(lines[0]), "scores": {"blue": {"value": 1}}}) + "\n"
    for torn in ("", lines[0], whole[:-9], lines[1] + lines[0], other + lines[1], unscored + lines[1], "\x00" * 80):
        path.write_text(torn)
        assert read_shard(shard, out, ["red"]) is None, torn
    path.write_bytes(b"\xff\xfe")
    assert read_shard(shard, out, ["red"]) is None
    path.unlink()
    assert read_shard(shard, out, ["red"]) is None


def test_scores_are_joined_in_order_under_the_rows_and_missing_ones_stay_missing(config: Config) -> None:
    shards = fill(config)
    rows = [scores_row(shards[1].rows[0], {"red": Score("", None, error="timeout")})]
    rows.append(scores_row(shards[1].rows[1], {"red": Score("", 0.123456789, {"mass": 0.9})}))
    write(shards[1].path(config.score.out), *rows)
    joined = [
        json.loads(line) for line in join_shards(shards, config.reward, config.score.out).read_text().splitlines()
    ]
    assert [row["id"] for row in joined] == ["0", "1", "2", "3", "4"]
    assert joined[2]["scores"]["red"] == {"value": None, "parts": {}, "error": "timeout"}
    assert joined[2]["reward"] is None and joined[0]["reward"] == 0.5
    assert joined[3]["scores"]["red"] == {"value": 0.123457, "parts": {"mass": 0.9}, "error": None}
    assert [is_missing(row) for row in joined] == [False, False, True, False, False]


def test_a_second_scorer_adds_to_the_scores_that_are_there(config: Config) -> None:
    first = join_shards(fill(config), config.reward, config.score.out)
    config.score.images, config.score.out = str(first), str(first.parent / "second")
    config.reward[0].name = "again"
    shards = shards_of(load_rows(config.score), 2)
    for shard in shards:
        write(shard.path(config.score.out), *(scores_row(row, {"again": Score("", 1.0)}) for row in shard.rows))
    row = json.loads(join_shards(shards, config.reward, config.score.out).read_text().splitlines()[0])
    assert {name: score["value"] for name, score in row["scores"].items()} == {"red": 0.5, "again": 1.0}
    assert row["reward"] == 1.0


def test_the_sum_takes_weights_and_leaves_out_who_is_only_watched() -> None:
    sections = [ScorerSection(name="a", weight=0.5), ScorerSection(name="b", weight=2.0)]
    sections += [ScorerSection(name="c", weight=0.0), ScorerSection(name="d", rewards=["comprehension"])]
    scores = {"a": {"value": 1.0}, "b": {"value": 0.25}, "c": {"value": None}, "d": {"value": None}}
    assert weighted_sum(sections, scores) == 1.0
    assert weighted_sum(sections, {**scores, "b": {"value": None}}) is None
    assert weighted_sum(sections[2:], scores) is None


def test_scores_go_on_only_with_what_they_depend_on(config: Config) -> None:
    def told() -> str | None:
        return changed_settings(config.score.out, settings_of(config, load_rows(config.score)))

    begin(config.score.out, settings_of(config, load_rows(config.score)))
    config.reward[0].replicas, config.reward[0].timeout_s, config.reward[0].weight = 3, 5.0, 0.5
    config.reward[0].options = {}
    assert told() is None
    config.reward[0].options = {"step": 2}
    assert "reward[red].options ({} -> {'step': 2}); give another folder" in told()
    config.reward[0].options = {}
    paint(Path(config.score.images).parent / "3.png", 200)
    assert told().startswith(f"score.out: {config.score.out} holds scores of other settings: images (")
    assert "prompts (" not in told()
    assert list(score_problems(config)) == [told()]
    with pytest.raises(ScoredError, match="other settings"):
        begin(config.score.out, settings_of(config, load_rows(config.score)))


@pytest.mark.parametrize(("key", "kind"), [("prompt", "prompts"), ("verdict", "verdicts")])
def test_what_has_changed_of_the_rows_is_named(config: Config, key: str, kind: str) -> None:
    begin(config.score.out, settings_of(config, load_rows(config.score)))
    rows = [json.loads(line) for line in Path(config.score.images).read_text().splitlines()]
    write(Path(config.score.images), *rows[:-1], rows[-1] | {key: "another"})
    told = changed_settings(config.score.out, settings_of(config, load_rows(config.score)))
    assert f"other settings: {kind} (" in told and told.count("->") == 1


def test_where_a_served_judge_lives_changes_no_score(config: Config) -> None:
    config.reward[0].options = {"engine": {"url": "http://127.0.0.1:1/v1", "model": "judge"}}
    before = settings_of(config, load_rows(config.score))
    config.reward[0].options["engine"] |= {"url": "http://127.0.0.1:2/v1", "concurrency": 3}
    assert settings_of(config, load_rows(config.score)) == before
    config.reward[0].options["engine"]["model"] = "other"
    assert settings_of(config, load_rows(config.score)) != before


def scored(value: float | None, **more: object) -> tuple[str, dict]:
    answer = {"value": value, "parts": {"mass": 0.8, "style": 0.1}, "error": None}
    return "row", {"image": "i.png", "prompt": "p", "scores": {"judge": answer}, **more}


def test_cases_have_a_score_and_a_label_and_the_others_are_counted() -> None:
    rows = [scored(0.9, label=True), scored(0.2, label=0.4), scored(0.7), scored(None)]
    cases, counts = cases_of(rows, CalibrateSection(scorer="judge"))
    assert [(case.score, case.right, case.mass) for case in cases] == [(0.9, True, 0.8), (0.2, False, 0.8)]
    assert counts == {"rows": 4, "without_score": 1, "without_label": 1}
    assert cases_of(rows, CalibrateSection(scorer="judge", positive_label=0.3))[0][1].right
    assert cases_of(rows[:1], CalibrateSection(scorer="judge/style"))[0][0].score == 0.1
    with pytest.raises(ScoredError, match="row: no scores of 'other'; there are judge"):
        cases_of(rows, CalibrateSection(scorer="other"))
    with pytest.raises(ScoredError, match="none of 1 rows has both a score of judge and a label"):
        cases_of(rows[2:3], CalibrateSection(scorer="judge"))


def test_the_exact_checker_labels_images_by_their_metadata(tmp_path: Path) -> None:
    import random

    from rlpipe.world.prompts import sample_spec
    from rlpipe.world.render import render
    from rlpipe.world.scenes import near_miss, sample_scene

    rng, rows = random.Random(0), []
    for i in range(6):
        spec = sample_spec(rng, "test", ("colors", "counting")[i % 2])
        scene = near_miss(rng, spec) if i % 3 == 0 else sample_scene(rng, spec)
        Image.fromarray(np.asarray(render(scene))).save(tmp_path / f"{i}.png")
        rows.append(scored(0.5, metadata=spec.metadata, image=str(tmp_path / f"{i}.png")))
    cases, _ = cases_of(rows, CalibrateSection(scorer="judge", labels="checker"))
    assert [case.right for case in cases] == [False, True, True, False, True, True]
    assert [case.kind for case in cases] == ["colors", "counting"] * 3
    with pytest.raises(ScoredError, match="no metadata for the checker"):
        cases_of([scored(0.5)], CalibrateSection(scorer="judge", labels="checker"))


def test_scores_without_labels_are_refused_before_anything_is_scored(config: Config, tmp_path: Path) -> None:
    assert [line.split(":")[0] for line in calibration_problems(config)] == ["calibrate.labels"]
    config.calibrate.labels = "checker"
    assert list(calibration_problems(config)) == []
    config.calibrate.scores = str(write(tmp_path / "scores.jsonl", {"image": "a.png"}))
    assert "no image with scores" in next(calibration_problems(config))
    with pytest.raises(ScoredError, match=r"scores\.jsonl:1"):
        read_scores(config.calibrate.scores)
