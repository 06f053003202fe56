"""Scoring images in bulk by reward actors, and holding them against labels."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from PIL import Image

from rlpipe.config import Config, ConfigError, ScorerSection
from rlpipe.data.prompts import PromptError
from rlpipe.data.scored import ScoredError, score_problems
from roles.batch import ScoresMissing
from roles.scoring import calibrate_judge, score_images

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
RED = {"scorer": "role_scorers:Red", "path": None, "retries": 0, "backoff_s": 0.0, "threads": 1, "num_cpus": 0.1}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Ten images of growing red, three a shard; the upper half is labelled right."""
    rows = []
    for i in range(10):
        Image.new("RGB", (8, 8), (25 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": f"red {i}", "label": i >= 5, "note": i})
    config = Config()
    config.reward = [ScorerSection(name="red", **RED)]
    config.score.images, config.score.out = str(write(tmp_path, rows)), str(tmp_path / "out")
    config.score.shard_size = 3
    return config


def write(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(config: Config) -> list[dict]:
    return [json.loads(line) for line in Path(config.score.images).read_text().splitlines()]


def scored(config: Config) -> list[dict]:
    path = asyncio.run(score_images(config))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_row_has_the_scores_of_every_scorer_and_their_sum(config: Config) -> None:
    config.reward[0].weight, config.reward[0].replicas = 0.5, 2
    config.reward.append(ScorerSection(name="bright", weight=1.0, **{**RED, "scorer": "brightness"}))
    for i, row in enumerate(scored(config)):
        red, bright = (row["scores"][name]["value"] for name in ("red", "bright"))
        assert red == pytest.approx(25 * i / 255, abs=1e-6) and bright == pytest.approx(red / 3, abs=1e-6)
        assert row["reward"] == pytest.approx(0.5 * red + bright)
        assert row["note"] == i and row["prompt"] == f"red {i}" and Path(row["image"]).name == f"{i}.png"


@pytest.mark.slow
def test_what_has_no_score_is_missing_with_the_reason_and_is_asked_again_on_demand(config: Config, capfd) -> None:
    rows, folder = rows_of(config), Path(config.score.images).parent
    rows[4]["prompt"] = "nan"
    (folder / "7.png").write_bytes(b"no image")
    write(folder, rows)
    config.score.max_failed_share = 1.0
    answers = scored(config)
    assert [i for i, row in enumerate(answers) if row["scores"]["red"]["value"] is None] == [4, 7]
    assert answers[4]["scores"]["red"]["error"] == "value is nan, not a finite number" and answers[4]["reward"] is None
    assert answers[7]["scores"]["red"]["error"].startswith("image cannot be read")
    assert "red: 8 scores" in capfd.readouterr().out
    shards = sorted((Path(config.score.out) / "shards").iterdir())
    before = [shard.stat().st_mtime_ns for shard in shards]
    config.score.retry_missing = True
    assert scored(config) == answers
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, True, True, False]


def test_prompts_that_a_scorer_cannot_score_are_named_before_any_is_scored(config: Config) -> None:
    rows = rows_of(config)
    rows[4] |= {"prompt": "unscorable", "id": "four"}
    write(Path(config.score.images).parent, rows)
    with pytest.raises(PromptError, match=r"reward\[red\]: prompt four: no red in this world"):
        scored(config)
    assert not list(Path(config.score.out).glob("shards/*"))


def test_every_prompt_is_shown_to_the_scorers_though_several_have_one_id(config: Config) -> None:
    rows = rows_of(config)
    rows[3] |= {"prompt": "unscorable", "id": "same"}
    rows[4] |= {"id": "same"}
    write(Path(config.score.images).parent, rows)
    with pytest.raises(PromptError, match="prompt same: no red in this world"):
        scored(config)


def test_images_that_are_not_read_in_time_are_named(config: Config, monkeypatch) -> None:
    monkeypatch.setattr("roles.scoring.READ_TIMEOUT_S", 0.0)
    with pytest.raises(ScoredError, match=r"score\.images: .*png and .* more were not read within 0 s"):
        scored(config)


@pytest.mark.slow
def test_scores_by_a_scorer_with_relative_paths_in_its_options_are_gone_on_with(config: Config) -> None:
    circle = {"include": [{"class": "circle", "count": 1}]}
    write(Path(config.score.images).parent, [row | {"metadata": circle} for row in rows_of(config)])
    options = {"detector": "tiny", "clip": "relative/clip"}
    config.reward[0] = ScorerSection(name="found", **{**RED, "scorer": "detector", "options": options})
    config.score.max_failed_share = 1.0  # the images are none of the tiny world's
    found = scored(config)
    assert list(score_problems(config)) == [] and scored(config) == found


@pytest.mark.slow
def test_a_torn_shard_is_scored_again_and_finished_ones_are_not(config: Config, capfd) -> None:
    whole = scored(config)
    shards = sorted((Path(config.score.out) / "shards").iterdir())
    shards[2].write_text(shards[2].read_text()[:-20])
    before = [shard.stat().st_mtime_ns for shard in shards]
    capfd.readouterr()
    assert scored(config) == whole
    assert "resume: 3 of 4 shards are there" in capfd.readouterr().out
    after = [shard.stat().st_mtime_ns for shard in shards]
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, False, True, False]


def test_too_many_missing_scores_stop_the_job_with_the_scorer_and_the_reason(config: Config) -> None:
    config.reward[0].scorer = "role_scorers:Raises"
    with pytest.raises(ScoresMissing, match=r"reward/red: 3 of 3 .*score\.max_failed_share=0\.25.*the service is down"):
        scored(config)
    assert not list(Path(config.score.out).glob("shards/*"))


def test_a_judge_that_asks_about_the_prompt_is_not_asked_about_none(config: Config) -> None:
    config.score.images = str(Path(config.score.images).parent)
    config.reward[0] = ScorerSection()
    with pytest.raises(ScoredError, match=r"score\.caption: empty, .*0\.png has no prompt, and judge asks about it"):
        scored(config)
    config.reward[0].options = {"depth": 3}
    with pytest.raises(ConfigError, match=r"reward\[judge\].* 'depth'"):
        scored(config)


def test_a_judge_is_held_against_labels_in_numbers_and_a_picture(config: Config, capfd) -> None:
    config.calibrate.resamples = 50
    asyncio.run(calibrate_judge(config))
    out = Path(config.score.out)
    result = json.loads((out / "calibration.json").read_text())
    # Images are labelled right from the one of 125 / 255 on, and said to be from the next one.
    assert result["numbers"]["auroc"]["value"] == 1.0 and result["numbers"]["accuracy"]["value"] == 0.9
    assert result["best_threshold"]["threshold"] == pytest.approx(112.5 / 255, abs=1e-6)
    assert (result["rows"], result["cases"], result["without_label"]) == (10, 10, 0)
    assert (out / "calibration.svg").read_text().startswith("<svg ")
    assert "balanced accuracy" in capfd.readouterr().out
    config.calibrate.scores, config.calibrate.out = str(out / "scores.jsonl"), str(out / "again")
    asyncio.run(calibrate_judge(config))
    assert json.loads((out / "again" / "calibration.json").read_text()) == result
