"""Charts: ticks, gaps, thinning."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from rlpipe.observe.charts import (
    interval_bar,
    is_noisy,
    line_chart,
    nice_ticks,
    smooth,
    stacked_chart,
    thin,
    tick_label,
)


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(-0.03, 0.02) == [-0.03, -0.02, -0.01, 0.0, 0.01, 0.02]
    assert nice_ticks(1, 120) == [20, 40, 60, 80, 100, 120]
    assert [tick_label(v) for v in (0.0, 0.25, 2e-4, 1e-5, 12000)] == ["0", "0.25", "2e-4", "1e-5", "12k"]


def svg_of(figure: str) -> ElementTree.Element:
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", figure)[0].replace(" hidden/>", "/>"))


def test_a_line_maps_its_extremes_and_breaks_at_a_missing_value() -> None:
    figure = line_chart("KL", [1, 2, 3, 4], {"kl/image": [1.0, None, 3.0, 2.0]})
    path = next(p for p in svg_of(figure).iter("path") if p.get("class") == "line c0").get("d")
    pens = re.findall(r"([ML])([\d.]+) ([\d.]+)", path)
    assert [pen for pen, _, _ in pens] == ["M", "M", "L"]
    x, y = zip(*[(float(a), float(b)) for _, a, b in pens], strict=True)
    assert x[1] - x[0] == pytest.approx(2 * (x[2] - x[1]), abs=0.05)
    assert y[0] - y[2] == pytest.approx(y[2] - y[1], abs=0.05) and y[1] < y[2] < y[0]
    data = json.loads(re.search(r'json">(.*?)</script>', figure)[1])
    assert data["series"] == [["kl/image", [1.0, None, 3.0, 2.0]]]


def test_a_logarithmic_axis_spaces_decades_evenly_and_leaves_zeros_out() -> None:
    figure = line_chart("gap", [1, 2, 3, 4], {"max": [1e-6, 1e-5, 0.0, 1e-4]}, log=True)
    path = next(svg_of(figure).iter("path")).get("d")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.05)


def test_stacked_areas_reach_the_sum() -> None:
    figure = stacked_chart("time", [1, 2], {"a": [1.0, 1.0], "b": [1.0, None]})
    lower, upper = [
        [float(point.split(",")[1]) for point in polygon.get("points").split()[:2]]
        for polygon in svg_of(figure).iter("polygon")
    ]
    floor = next(line for line in svg_of(figure).iter("line") if line.get("class") == "axis").get("y1")
    assert float(floor) - upper[0] == pytest.approx(2 * (float(floor) - lower[0]), abs=0.05)
    assert upper[1] == lower[1]


def test_names_cannot_break_out_of_the_page() -> None:
    figure = line_chart("t", [1], {"</script><b>": [1.0]})
    assert "</script><b>" not in figure


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", [1, 2], {"a": [None, None]}) == ""
    assert line_chart("t", [1, 2], {}) == ""


def test_long_series_are_thinned_to_the_means_of_buckets() -> None:
    steps, series = thin(range(1, 1001), {"a": [float(i) for i in range(1, 1001)], "b": [None] * 1000})
    assert len(steps) == 334 and steps[0] == 3 and steps[-1] == 1000
    assert series["a"][:2] == [2.0, 5.0] and series["a"][-1] == 1000.0
    assert series["b"][0] is None


def test_only_restless_lines_are_smoothed_and_gaps_stay_gaps() -> None:
    assert is_noisy([i % 2 for i in range(40)]) and not is_noisy([float(i) for i in range(40)])
    assert smooth([1.0] * 30) == pytest.approx([1.0] * 30)
    averaged = smooth([0.0, 1.0] * 25 + [None])
    assert averaged[-1] is None and abs(averaged[-2] - 0.5) < 0.34


def test_an_interval_bar_has_its_share_and_whisker() -> None:
    _, bar, whisker = ElementTree.fromstring(interval_bar(0.5, (0.4, 0.65), "c0"))
    assert bar.get("width") == "50.0" and (whisker.get("x"), whisker.get("width")) == ("40.0", "25.0")
