"""The result table, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from rlpipe.evaluate.table import Measured, NearMiss, Outcome, policy_row, summarise
from rlpipe.evaluate.terminal import print_table


def outcome(name: str, tag: str, kind: str, **fields) -> Outcome:
    """`kind`: first correct, said yes, final correct, fresh correct as 1 and 0."""
    return Outcome(name, tag, *(digit == "1" for digit in kind), **fields)


# Four prompts of one kind, two of the other: the mean over kinds differs from the mean over prompts.
ROWS = [
    outcome("a", "colors", "1111"),
    outcome("b", "colors", "0010"),  # repaired by the redraw, not by the fresh draw
    outcome("c", "colors", "0001"),  # the other way round
    outcome("d", "colors", "1000"),  # damaged by both
    outcome("e", "position", "0100"),  # wrong and accepted
    outcome("f", "position", "0011"),  # repaired by both
]


def test_accuracy_is_the_mean_over_kinds() -> None:
    row = policy_row(Measured(ROWS))
    assert row["without"]["by_tag"] == {"colors": 0.5, "position": 0.0}
    assert row["without"]["accuracy"] == pytest.approx(0.25)
    assert row["with"]["accuracy"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert row["fresh"]["accuracy"] == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert row["gain"]["value"] == pytest.approx(0.25)
    assert row["gain_over_fresh"]["value"] == pytest.approx(0.0)


def test_repair_is_of_wrong_first_images_and_damage_of_right_ones() -> None:
    row = policy_row(Measured(ROWS))
    assert row["repaired"] == pytest.approx(2 / 4)
    assert row["repaired_by_fresh"] == pytest.approx(2 / 4)
    assert row["repaired_of_redrawn"] == pytest.approx(2 / 3)
    assert row["damaged"] == row["damaged_by_fresh"] == pytest.approx(1 / 2)
    assert row["damaged_of_redrawn"] == 1.0


def test_the_verdict_is_compared_with_the_first_image() -> None:
    near = [
        NearMiss("a", "colors", True, True),
        NearMiss("b", "colors", False, True),
        NearMiss("c", "x", False, False),
    ]
    verdict = policy_row(Measured(ROWS, near))["verdict"]
    assert verdict["accuracy"] == pytest.approx(4 / 6)
    assert verdict["balanced_accuracy"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert (verdict["yes_of_right"], verdict["no_of_wrong"]) == (0.5, 0.75)
    assert verdict["share_yes"] == pytest.approx(2 / 6)
    assert verdict["near_miss_balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def test_the_judge_is_compared_on_every_drawn_image_and_missing_scores_are_left_out() -> None:
    rows = [
        outcome("a", "colors", "1111", first_score=0.9),
        outcome("b", "colors", "0010", first_score=0.8, redraw_score=0.7, fresh_score=None),
        outcome("c", "colors", "0001", first_score=0.2, redraw_score=0.1, fresh_score=0.4),
    ]
    judge = policy_row(Measured(rows))["judge"]
    # right images: a .9, b's redraw .7, c's fresh draw .4; wrong ones: b .8, c .2, c's redraw .1
    assert judge["images"] == 6
    assert judge["agreement"] == pytest.approx(4 / 6)
    assert judge["balanced"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert judge["auroc"] == pytest.approx((3 + 2 + 2) / 9)
    assert policy_row(Measured(ROWS))["judge"]["agreement"] is None


def test_the_interval_is_about_that_of_a_binomial_and_the_same_for_the_same_seed() -> None:
    rows = [outcome(str(i), "colors" if i % 2 else "position", f"{int(i % 4 < 2)}000") for i in range(400)]
    low, high = policy_row(Measured(rows), seed=1)["without"]["ci95"]
    half = 1.96 * (0.25 / 400) ** 0.5
    assert low == pytest.approx(0.5 - half, abs=0.01) and high == pytest.approx(0.5 + half, abs=0.01)
    assert policy_row(Measured(rows), seed=1)["without"]["ci95"] == [low, high]
    assert policy_row(Measured(rows), seed=2)["without"]["ci95"] != [low, high]


def test_a_paired_gain_is_known_more_exactly_than_its_two_sides() -> None:
    rows = [outcome(str(i), "colors", ("1111", "0100", "0011", "1111")[i % 4]) for i in range(200)]
    row = policy_row(Measured(rows))
    width = row["with"]["ci95"][1] - row["without"]["ci95"][0]
    assert row["gain"]["value"] == pytest.approx(0.25)
    assert row["gain"]["ci95"][1] - row["gain"]["ci95"][0] < width - 0.2


def test_the_summary_has_the_documented_keys_and_is_json() -> None:
    better = [replace(row, first_correct=True, said_yes=True, final_correct=True) for row in ROWS]
    sweep = {1.5: better, 2.0: ROWS}
    summary = json.loads(json.dumps(summarise(Measured(ROWS), Measured(better), sweep, seconds=12.0)))
    for policy in ("sft", "rl"):
        for column in ("without", "with", "fresh"):
            assert set(summary["table"][policy][column]) == {"accuracy", "ci95", "by_tag"}
    assert summary["table"]["sft"]["repaired"] == 0.5 and summary["repaired"] is None and summary["damaged"] == 0.0
    assert summary["verdict"]["accuracy"] == 1.0 and summary["verdict"]["balanced_accuracy"] is None
    assert summary["prompts"] == 6 and summary["prompts_by_tag"] == {"colors": 4, "position": 2}
    assert summary["rl_gain"]["without"]["value"] == 0.75 and summary["seconds"] == 12.0
    best = summary["best_guidance"]["sft"]
    assert (best["guidance"], best["with"]) == (1.5, 1.0) and [row["guidance"] for row in best["sweep"]] == [
        1.0,
        1.5,
        2.0,
    ]
    assert summary["rl_gain"]["with_over_best_sft"] == 0.0


def test_one_policy_alone_is_a_summary_too() -> None:
    summary = summarise(Measured(ROWS), None)
    assert list(summary["table"]) == ["sft"] and summary["repaired"] == 0.5
    assert "rl_gain" not in summary
    with pytest.raises(ValueError, match="at least one policy"):
        summarise(None, None)


def test_policies_measured_on_different_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        summarise(Measured(ROWS), Measured(ROWS[:5]))


def test_the_printed_table_has_every_number() -> None:
    near = [NearMiss("a", "colors", True, True), NearMiss("b", "colors", False, True)]
    out = io.StringIO()
    print_table(summarise(Measured(ROWS, near), Measured(ROWS, near), {2.0: ROWS[:5]}, 90.0), Console(file=out))
    text = out.getvalue()
    rows = [line.split() for line in text.splitlines()]
    sft = next(row for row in rows if row[:1] == ["SFT"])
    assert sft[1] == "25.0" and sft[4] == "50.0" and sft[7] == "50.0" and sft[10] == "+25.0"
    assert ["RL", "with", "50.0", "50.0"] in rows
    assert "62.5" in text and "66.7" in text and "1.5 minutes in all" in text
    assert "\x1b" not in text


def test_a_summary_without_judge_or_near_misses_prints_dashes() -> None:
    out = io.StringIO()
    print_table(summarise(None, Measured(ROWS)), Console(file=out))
    assert "-" in next(line for line in out.getvalue().splitlines() if "62.5" in line).split()
