"""The gallery on disk, the picture of a trajectory, and the page that shows a run."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlpipe.config import ObserveSection
from rlpipe.evaluate.editing import EditOutcome, summarise_edits
from rlpipe.evaluate.table import Measured, NearMiss, Outcome, summarise
from rlpipe.observe.gallery import discard_rollouts, read_rollouts, save_rollouts, trajectory_strip
from rlpipe.observe.report import write_report
from rlpipe.observe.tracker import Tracker
from rlpipe.types import Prompt, Rollout, Sampling, Score, Segment, Trajectory


def rollout(said_yes: bool, name: str = "t0", color: int = 0) -> Rollout:
    """One image if it says Yes, else two; every image in its own plain grey."""
    image, text = Segment("image", np.zeros(36, np.int64)), Segment("text", np.zeros(4, np.int64))
    segments = (image, text) if said_yes else (image, text, image)
    prompt = Prompt("p0", "a photo of <two> circles", {"tag": "counting"})
    trajectory = Trajectory(name, prompt, segments, Sampling(seed=3), 5, (said_yes,), (False,))
    pixels = tuple(np.full((48, 48, 3), color + 90 * i, np.uint8) for i in range(len(segments) // 2 + (not said_yes)))
    return Rollout(trajectory, pixels)


def save_step(run_dir: Path, step: int) -> None:
    save_rollouts(
        run_dir,
        step,
        [rollout(True), rollout(False, "t1"), rollout(False, "t2")],
        [[0.9, 1.0], [np.float32(0.1), 1.0, 0.8], [0.7, 0.0, Score("t2", None, error="timeout after 120 s")]],
        [[0.5, 0.1], [-0.5, 0.2, 1.5], [0.0, float("nan"), None]],
        [
            ["Yes, there are two circles."],
            ["No, there is one circle, not two."],
            ["No, there are no circles."],
        ],
    )


class Page(HTMLParser):
    """Every attribute that names a resource, the cards and the text of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references, self.cards, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attributes = dict(attrs)
        self.references += [attributes[key] for key in ("src", "href", "srcset", "data") if attributes.get(key)]
        if attributes.get("class") == "card":
            self.cards.append(attributes)
        if tag not in ("meta", "link", "img", "br", "option") and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.references += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag != "option":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def full_run(run_dir: Path) -> None:
    with Tracker(run_dir, ObserveSection()) as tracker:
        for step in range(1, 41):
            tracker.log(step, {"reward/first/mean": step / 50, "time/learn": 1.0, "time/step": 2.0, "own/x": 1.0})
    save_step(run_dir, 10)
    save_step(run_dir, 20)
    outcomes = [Outcome(str(i), "counting", i % 2 == 0, i % 2 == 0, i % 3 != 0, i % 5 == 0) for i in range(30)]
    near = [NearMiss("0", "counting", True, True), NearMiss("1", "counting", False, True)]
    measured = Measured(outcomes, near)
    (run_dir / "summary.json").write_text(json.dumps(summarise(measured, measured, seconds=60.0)))
    (run_dir / "config.yaml").write_text("seed: <0>\n")


def test_saved_rollouts_read_back_with_their_pixels(tmp_path: Path) -> None:
    save_step(tmp_path, 10)
    (saved,) = read_rollouts(tmp_path)
    assert saved.step == 10 and [row["id"] for row in saved.rows] == ["t0", "t1", "t2"]
    first, verdict, second = saved.rows[1]["segments"]
    assert verdict == {
        "kind": "text",
        "score": 1.0,
        "advantage": 0.2,
        "text": "No, there is one circle, not two.",
        "verdict": False,
        "truncated": False,
    }
    assert first["score"] == pytest.approx(0.1) and second["advantage"] == 1.5
    assert (np.asarray(Image.open(saved.folder / second["file"])) == 90).all()
    failed = saved.rows[2]["segments"]
    assert failed[2]["score"] is None and failed[2]["error"] == "timeout after 120 s"
    assert failed[1]["advantage"] is None


def test_saving_a_step_again_replaces_it_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_step(tmp_path, 10)
    save_rollouts(tmp_path, 10, [rollout(True)], [[0.9, 1.0]], [[0.0, 0.0]], [["Yes."]])
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_10"]
    assert {path.name for path in (tmp_path / "rollouts/step_10").iterdir()} == {"records.jsonl", "000_0.png"}


def test_scores_that_do_not_fit_the_segments_name_the_trajectory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trajectory 't9': 2 segments with 1 scores"):
        save_rollouts(tmp_path, 1, [rollout(True, "t9")], [[0.9]], [[0.0, 0.0]], [["Yes."]])
    assert not (tmp_path / "rollouts").exists()


def test_a_resumed_run_discards_later_samples(tmp_path: Path) -> None:
    for step in (9, 10, 20):
        save_step(tmp_path, step)
    discard_rollouts(tmp_path, after_step=10)
    assert [saved.step for saved in read_rollouts(tmp_path)] == [9, 10]


def test_the_page_needs_no_network_and_every_image_is_there(tmp_path: Path) -> None:
    full_run(tmp_path)
    path = write_report(tmp_path)
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert "http://" not in text and "https://" not in text and "@import" not in text and "url(" not in text
    images = [reference for reference in page.references if not reference.startswith("data:")]
    assert len(images) == 10
    assert all((path.parent / reference).is_file() for reference in images)


def test_the_page_shows_results_curves_and_cards(tmp_path: Path) -> None:
    full_run(tmp_path)
    text = write_report(tmp_path).read_text()
    page = Page(text)
    kinds = [(card["data-step"], card["data-said"], card["data-change"]) for card in page.cards]
    assert kinds[:3] == [("10", "yes", ""), ("10", "no", "repaired"), ("10", "no", "")]
    words = " ".join(page.words)
    shown = (
        "a photo of <two> circles",
        "Reward by segment",
        "Seconds by phase",
        "Other: own",
        "seed: <0>",
        "50.0",
    )
    assert all(piece in words for piece in shown)
    assert "40 steps · 1.3 minutes of training · 30 held-out prompts · 1.0 minutes in all" in words
    assert "damaged line" not in words


def test_a_run_of_edits_shows_its_table_and_what_each_edit_started_from(tmp_path: Path) -> None:
    before = [EditOutcome(str(i), "recolor", i % 2 == 0, i % 5 != 0, 0.9, 0.9) for i in range(20)]
    after = [EditOutcome(str(i), "recolor", i % 4 != 0, True, 0.9, 0.9) for i in range(20)]
    (tmp_path / "summary.json").write_text(json.dumps(summarise_edits({"sft": before, "rl": after})))
    edited = rollout(True, "edit", 200)
    edited = replace(
        edited,
        trajectory=replace(edited.trajectory, segments=edited.trajectory.segments[:1], verdicts=(), truncated=()),
        source=np.full((48, 48, 3), 7, np.uint8),
    )
    save_rollouts(tmp_path, 5, [edited], [[0.7]], [[0.5]], [[]])
    path = write_report(tmp_path)
    page = Page(path.read_text())
    words = " ".join(page.words)
    assert all(piece in words for piece in ("RL: following", "75.0", "+25.0", "judge on preserving", "By kind of edit"))
    images = [reference for reference in page.references if reference.endswith(".png")]
    assert len(images) == 2 and (np.asarray(Image.open(path.parent / images[0])) == 7).all()


def test_damaged_lines_and_missing_files_are_said_and_survived(tmp_path: Path) -> None:
    full_run(tmp_path)
    for name in ("metrics.jsonl", "rollouts/step_10/records.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"train/step": 41, "rewa')
    (tmp_path / "summary.json").write_text("{")
    (tmp_path / "rollouts/step_20/000_0.png").unlink()
    page = Page(write_report(tmp_path).read_text())
    words = " ".join(page.words)
    assert "metrics.jsonl: 1 damaged line(s) skipped (line 41)." in words
    assert "rollouts/step_10: 1 damaged record(s) skipped." in words
    assert "summary.json could not be read" in words and "image missing" in words
    assert len(page.cards) == 6


def test_an_empty_run_folder_gives_an_empty_page(tmp_path: Path) -> None:
    assert Page(write_report(tmp_path).read_text()).cards == []


def test_the_strip_shows_both_images_enlarged_from_left_to_right() -> None:
    strip = np.asarray(trajectory_strip(rollout(False), ["No, there is one circle, not two."], image_px=96))
    first, second = ((strip == value).all(-1).nonzero() for value in (0, 90))
    assert len(first[0]) == len(second[0]) == 96 * 96
    assert first[1].max() < second[1].min()
    assert trajectory_strip(rollout(True), ["Yes, two."], image_px=96).width < strip.shape[1]
