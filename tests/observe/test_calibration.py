"""The picture and the tables of a calibration."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console

from rlpipe.evaluate.calibration import Case, calibrate
from rlpipe.observe.calibration import picture, print_calibration


def result_of(spread: float = 1.0, both: bool = True, kind: str = "") -> dict:
    """A calibration of forty cases, scores from 0 to `spread`; all of them right unless `both`."""
    rng = np.random.default_rng(0)
    scores = spread * rng.random(40)
    cases = [Case(s, bool(not both or s > spread / 3), str(i // 2), kind) for i, s in enumerate(scores)]
    numbers = calibrate(cases, resamples=20)
    return {"scorer": "a <judge>", "labels": "rows", "rows": 42, "without_score": 2, "without_label": 0, **numbers}


@pytest.mark.parametrize(
    "result",
    [result_of(), result_of(kind="color_attr"), result_of(spread=9.0), result_of(both=False), result_of(spread=0.0)],
    ids=["plain", "kinds", "no probabilities", "one label", "one score"],
)
def test_a_picture_is_one_svg_with_everything_inside_its_frame(result: dict) -> None:
    svg = ElementTree.fromstring(picture(result))
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for element in svg.iter():
        attributes = {
            key: float(value) for key, value in element.attrib.items() if key in ("x", "y", "width", "height")
        }
        x, y = attributes.get("x", 0), attributes.get("y", 0)
        assert 0 <= x <= width and 0 <= y <= height and attributes.get("width", 0) >= 0, element.attrib
        assert x + attributes.get("width", 0) <= width and y + attributes.get("height", 0) <= height, element.attrib
    told = " ".join(element.text or "" for element in svg.iter())
    assert "a <judge> against the rows' labels" in told and "2 without score" in told
    assert ("color attr" in told) == bool(result["by_kind"])


def test_bars_stand_for_the_counts_of_their_label() -> None:
    result = result_of()
    told = [element.text or "" for element in ElementTree.fromstring(picture(result)).iter()]
    for label in ("right", "wrong"):
        drawn = [int(text.split()[1]) for text in told if text.startswith(f"{label}: ")]
        assert sum(drawn) == sum(result["histogram"][label])


def test_the_tables_leave_out_what_there_is_none_of() -> None:
    def printed(result: dict) -> str:
        stream = io.StringIO()
        print_calibration(result, Console(file=stream))
        return stream.getvalue()

    whole = printed(result_of(kind="counting"))
    assert "AUROC" in whole and "By kind of prompt" in whole and "Calibration" in whole
    one = printed(result_of(both=False))
    assert "AUROC" not in one and "best threshold" not in one and "By kind" not in one
    assert "no Brier score" in printed(result_of(spread=9.0))
