"""The terminal view, rendered to a string."""

from __future__ import annotations

import io
from itertools import count

import pytest
from rich.console import Console

from rlpipe.observe.console import RunView, duration, number, sparkline

METRICS = {
    "reward/first/mean": 0.5123,
    "reward/first/std": 0.2,
    "reward/reflection/mean": 0.9,
    "reward/final/mean": 0.625,
    "rollout/share_yes": 0.45,
    "rollout/images_per_s": 91.25,
    "kl/image": 0.0125,
    "mismatch/max_abs": 3.1e-6,
    "train/lr": 2e-4,
    "time/rollout": 1.06,
    "time/learn": 1.52,
    "idle/rollout": 0.4,
    "failures/scores": 0.0,
}
SHOWN = ("0.512", "0.900", "0.625", "0.450", "91.2", "0.013", "3.1e-06", "1.060", "1.520", "0.400")


def view_of(mode: str, terminal: bool) -> tuple[RunView, io.StringIO]:
    out, seconds = io.StringIO(), count(step=3)
    console = Console(file=out, force_terminal=terminal, width=120, highlight=False)
    return RunView(mode, 10, "runs/x", console=console, clock=lambda: float(next(seconds))), out


def test_plain_lines_show_every_number_under_its_name() -> None:
    view, out = view_of("auto", terminal=False)
    with view:
        view.step(1, METRICS)
        view.step(2, METRICS)
    above, names, first, second = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert first.split()[:2] == ["1/10", "27"] and second.split()[:2] == ["2/10", "24"]
    columns = (
        "first",
        "reflection",
        "final",
        "share_yes",
        "images_per_s",
        "image",
        "max_abs",
        "rollout",
        "learn",
    )
    assert set(columns) <= set(names.split())
    assert {"reward", "kl", "mismatch", "time", "idle"} <= set(above.split())
    assert all(value in first for value in SHOWN)
    assert names.index("first") + len("first") == first.index("0.512") + len("0.512")


def test_plain_lines_repeat_their_header_and_widen_it_for_a_new_metric() -> None:
    view, out = view_of("plain", terminal=True)
    with view:
        for step in range(1, 22):
            view.step(step, METRICS)
        view.step(22, {**METRICS, "failures/scores": 2.0})
    headers = [line for line in out.getvalue().splitlines() if line.split()[:2] == ["step", "left"]]
    assert len(headers) == 3
    assert "scores" not in headers[1] and headers[2].endswith("scores")


def test_the_live_view_shows_the_same_numbers_with_progress_and_a_sparkline() -> None:
    view, _ = view_of("auto", terminal=True)
    assert view.mode == "live"
    for step in range(1, 5):
        view.step(step, {**METRICS, "reward/first/mean": step / 8})
    view.step(5, METRICS)
    page = Console(file=io.StringIO(), width=120)
    page.print(view.render())
    text = page.file.getvalue()
    assert "runs/x" in text and "step 5/10" in text and "15 s left" in text
    assert all(value in text for value in SHOWN)
    for name in (
        "reward/first",
        "rollout/share_yes",
        "kl/image",
        "mismatch/max_abs",
        "time/learn",
        "idle/rollout",
    ):
        assert name in text
    assert sparkline([0.125, 0.25, 0.375, 0.5, 0.5123]) in text
    assert "failures" not in text


def test_off_prints_nothing() -> None:
    view, out = view_of("off", terminal=True)
    with view:
        view.say("hello")
        view.step(1, METRICS)
        view.progress("evaluating", 600, 600)
    assert out.getvalue() == ""


def test_progress_in_plain_lines_is_said_at_each_quarter() -> None:
    view, out = view_of("plain", terminal=False)
    for done in range(1, 101):
        view.progress("evaluating SFT", done, 100)
    assert out.getvalue().splitlines() == [f"evaluating SFT: {done}/100" for done in (25, 50, 75, 100)]


def test_an_unknown_mode_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="observe.terminal: 'loud' is none of auto, plain, off"):
        RunView("loud")


def test_losses_stand_in_for_rewards_in_supervised_training() -> None:
    view, out = view_of("plain", terminal=False)
    view.step(1, {"loss/ce": 1.25, "loss/total": 2.5})
    assert out.getvalue().splitlines()[-1].split()[-2:] == ["2.500", "1.250"]


def test_small_words() -> None:
    assert sparkline([0, 7]) == "▁█" and sparkline([1, 1]) == "▁▁" and sparkline([]) == ""
    assert [duration(s) for s in (42, 187, 3765)] == ["42 s", "3:07", "1:02:45"]
    assert [number(v) for v in (None, 0.0, 3.0, 0.51234, 85.26, 2.06e-6)] == [
        "-",
        "0",
        "3",
        "0.512",
        "85.3",
        "2.1e-06",
    ]
