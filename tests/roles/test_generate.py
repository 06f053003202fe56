"""Generation in bulk: what it writes does not depend on batches, workers, interruptions or losses."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from rlpipe.config import Config
from rlpipe.data.outputs import Results, generation_prompts, program_of, requests_of, settings_of
from rlpipe.paths import ROOT
from roles.generate import (
    COLUMNS,
    GenerationError,
    Interrupted,
    SampleWorker,
    batches,
    deadline,
    generate,
    interruptible,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Three prompts, four samples each, on the shipped policy."""
    prompts = ("a photo of two red circles", "a photo of a blue square", "a photo of a cross above a triangle")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    config = Config()
    config.data.prompts, config.generate.dir = str(tmp_path / "prompts.txt"), str(tmp_path / "results")
    config.policy.path = str(ROOT / config.policy.path)
    config.rollout.threads, config.rollout.max_images = 1, 3
    config.observe.terminal = "off"
    return config


def elsewhere(config: Config, name: str, **generate: object) -> Config:
    """The same generation into another folder."""
    folder = str(Path(config.generate.dir).with_name(name))
    return replace(config, generate=replace(config.generate, dir=folder, **generate))


def in_process(config: Config, order: slice = slice(None)) -> dict:
    """Draw everything by one worker without Ray, the batches in the given order; the rows by key."""
    prompts = generation_prompts(config)
    requests = requests_of(config, prompts)
    results = Results(config.generate.dir, program_of(config))
    results.begin(settings_of(config, prompts))
    worker = SampleWorker(config)
    for call in batches(config, requests)[order]:
        worker(pa.Table.from_pylist([asdict(request) for request in call], COLUMNS))
    rows = results.gather(requests)
    results.end()
    return rows


def pixels_below(folder: str | Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): np.asarray(Image.open(path)).tobytes()
        for path in sorted(Path(folder).rglob("*.png"))
    }


def without_scores(row: dict) -> tuple[dict, list[float]]:
    parts = [dict(part) for part in (row, *row.get("rounds", ()))]
    scores = [part.pop("yes_score") for part in parts if "yes_score" in part]
    return parts[0] | {"rounds": parts[1:]}, scores


def same_rows(one: dict, other: dict) -> None:
    """Equal but for the last digits of the scores."""
    assert list(one) == list(other)
    for mine, theirs in zip(one.values(), other.values(), strict=True):
        (mine, my_scores), (theirs, their_scores) = without_scores(mine), without_scores(theirs)
        assert mine == theirs
        assert my_scores == pytest.approx(their_scores, abs=1e-5)


def test_batches_of_1_and_of_8_in_any_order_give_identical_images_and_rows(config):
    one, eight = elsewhere(config, "one", batch_size=1), elsewhere(config, "eight", batch_size=8)
    rows = in_process(one, slice(None, None, -1))
    same_rows(rows, in_process(eight))
    images = pixels_below(one.generate.dir)
    assert images == pixels_below(eight.generate.dir)
    assert len(set(images[name] for name in images if name.startswith("samples/"))) == 12


def test_the_folder_has_the_official_layout_and_its_rows_match_the_images(config):
    config.generate.samples = 8
    rows = list(in_process(config).values())
    folder = Path(config.generate.dir)
    names = [f"{i:04d}.png" for i in range(24)]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == names
    assert sorted(path.name for path in (folder / "regen_samples").iterdir()) == names
    lines = [json.loads(line) for line in (folder / "reason.jsonl").read_text().splitlines()]
    assert lines == rows and [row["filename"] for row in rows] == names
    assert {row["images"] for row in rows} == {1, 2, 3}
    images = pixels_below(folder)
    for row in rows:
        assert row["reason"].startswith("Yes" if row["correct"] else "No")
        assert row["correct"] == (row["images"] == 1)
        first, last = images[f"samples/{row['filename']}"], images[f"regen_samples/{row['filename']}"]
        assert (first == last) == (row["images"] == 1)
        between = folder / "rounds" / f"{row['filename'][:-4]}_2.png"
        assert between.exists() == (row["images"] == 3)
        assert len(row.get("rounds", [0])) == min(row["images"], 2)


def test_a_threshold_decides_the_verdict_by_the_score(config):
    config.generate.verdict_threshold, config.rollout.max_images = 0.57, 2
    for row in in_process(config).values():
        assert row["correct"] == (row["yes_score"] > 0.57)
    config.generate.verdict_threshold = 0.0
    assert all(row["images"] == 1 for row in in_process(elsewhere(config, "always")).values())


def test_drawing_alone_gives_the_first_images_and_no_remarks(config):
    with_looks = in_process(config)
    drawing = elsewhere(config, "drawn")
    drawing.rollout = replace(config.rollout, program="draw")
    rows = in_process(drawing)
    first = {name: image for name, image in pixels_below(config.generate.dir).items() if name.startswith("samples/")}
    assert pixels_below(drawing.generate.dir) == first and rows.keys() == with_looks.keys()
    assert all("correct" not in row for row in rows.values())
    assert not (Path(drawing.generate.dir) / "reason.jsonl").exists()


def test_given_images_are_looked_at_under_their_own_names_and_stay_where_they_are(config, tmp_path):
    config.rollout.max_images = 1
    drawn = in_process(elsewhere(config, "drawn", caption="a photo of two red circles"))
    looking = elsewhere(config, "looked", caption="a photo of two red circles", images=str(tmp_path / "drawn/samples"))
    rows = list(in_process(looking).values())
    assert [row["filename"] for row in rows] == [row["filename"] for row in drawn.values()]
    scores = [row["yes_score"] for row in drawn.values()]
    assert [row["yes_score"] for row in rows] == pytest.approx(scores, abs=1e-5)
    assert all(row["reason"].startswith("Yes" if row["correct"] else "No") for row in rows)
    assert not pixels_below(looking.generate.dir)


def test_an_edit_starts_from_its_own_image(config, tmp_path):
    for name, shade in (("dark.png", 20), ("bright.png", 230)):
        Image.fromarray(np.full((60, 48, 3), shade, np.uint8)).save(tmp_path / name)
    rows = [{"prompt": "make the circle red", "source_image": name} for name in ("dark.png", "bright.png")]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.prompts, config.rollout.program = str(tmp_path / "edits.jsonl"), "edit"
    records = list(in_process(elsewhere(config, "a", batch_size=1)).values())
    assert [Path(row["source_image"]).name for row in records] == ["dark.png"] * 4 + ["bright.png"] * 4
    in_process(elsewhere(config, "b", batch_size=8))
    assert pixels_below(tmp_path / "a") == pixels_below(tmp_path / "b")
    rows[1]["source_image"] = "dark.png"
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    in_process(elsewhere(config, "c"))
    before, after = pixels_below(tmp_path / "a"), pixels_below(tmp_path / "c")
    assert [before[name] == after[name] for name in before] == [True] * 4 + [False] * 4


def test_samples_that_share_a_room_are_drawn_in_one_call(config):
    config.rollout.reflection_room, config.generate.batch_size = "group", 1
    requests = requests_of(config, generation_prompts(config))
    assert [len(call) for call in batches(config, requests)] == [4, 4, 4]
    config.rollout.reflection_room, config.rollout.workers = "fixed", 2
    config.generate.batch_size = 16
    assert [len(call) for call in batches(config, requests)] == [6, 6]


def test_a_wait_ends_at_its_deadline_with_its_error_and_at_a_signal_as_interrupted():
    with interruptible():
        with pytest.raises(GenerationError, match="too late"):
            with deadline(0.05, GenerationError("too late")):
                threading.Event().wait(30)
        with pytest.raises(Interrupted) as stopped, deadline(30, GenerationError("too late")):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(30)
        assert stopped.value.signum == signal.SIGTERM
        with deadline(0.05, GenerationError("too late")):
            pass
        time.sleep(0.1)


def kill_a_worker(folder: Path) -> None:
    """End one worker's process in the middle of the work."""
    import psutil  # The one that comes with Ray, and is found once Ray is imported.

    while len(list(folder.glob("parts/*.jsonl"))) < 2:
        time.sleep(0.02)
    children = psutil.Process().children(recursive=True)
    next(child for child in children if "MapWorker" in "".join(child.cmdline())).kill()


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_of_which_one_dies_give_the_images_of_one(config, cluster, capsys):
    alone, beside = elsewhere(config, "alone", batch_size=8), elsewhere(config, "beside", batch_size=1)
    rows = in_process(alone)
    beside.rollout, beside.observe = replace(config.rollout, workers=2, num_cpus=0.1), replace(config.observe)
    beside.observe.terminal = "plain"
    killer = threading.Thread(target=kill_a_worker, args=[Path(beside.generate.dir)], daemon=True)
    killer.start()
    found = generate(beside)
    killer.join()
    assert "a worker was lost" in capsys.readouterr().out
    same_rows(rows, dict(zip(rows, found, strict=True)))
    assert pixels_below(alone.generate.dir) == pixels_below(beside.generate.dir)
    assert generate(beside) == found


@pytest.mark.slow
@pytest.mark.ray
def test_what_a_worker_cannot_do_is_told_in_one_line_and_the_rest_goes_on_later(config, cluster, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((48, 48, 3), 50 * i, np.uint8)).save(folder / f"{i}.png")
    cut = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(cut[:-40])
    config = elsewhere(config, "looked", images=str(folder), caption="a photo of a cross", batch_size=1)
    config.rollout = replace(config.rollout, num_cpus=0.1)
    with pytest.raises(GenerationError) as caught:
        generate(config)
    assert "1.png" in str(caught.value) and "\n" not in str(caught.value)
    (folder / "1.png").write_bytes(cut)
    assert [row["filename"] for row in generate(config)] == ["0.png", "1.png", "2.png"]
