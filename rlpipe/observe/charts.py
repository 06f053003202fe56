"""Charts as inline SVG: axes, a legend, and the values for the page's script to show under the pointer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
NUM_COLORS = 8
_MAX_POINTS = 400
_SMOOTH_FROM = 30
_NOISY = 4.0

Values = Sequence[float | None]


@dataclass(frozen=True)
class Axis:
    """Maps values to SVG coordinates; `log` in decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            stride = max(1, math.ceil((last - first) / 5))
            return [10.0**power for power in range(first, last + 1, stride)]
        return nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten within low..high."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [round(i * stride, 12) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """0, 0.25, 40, 2e-4, 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    return f"{value / 1000:g}k" if size >= 10_000 else f"{value:g}"


def smooth(values: Values) -> list[float | None]:
    """Exponential moving average over about a 25th of the points; a missing value leaves it where it was."""
    keep = 1.0 - 2.0 / (len(values) / 25 + 1)
    averages: list[float | None] = []
    average: float | None = None
    for value in values:
        if value is not None:
            average = value if average is None else keep * average + (1 - keep) * value
        averages.append(average if value is not None else None)
    return averages


def is_noisy(values: Values) -> bool:
    """Whether a line of many points goes up and down so much that a moving average reads better."""
    known = [value for value in values if value is not None]
    if len(known) < _SMOOTH_FROM:
        return False
    travelled = sum(abs(b - a) for a, b in zip(known, known[1:], strict=False))
    return travelled > _NOISY * (max(known) - min(known))


def thin(steps: Sequence[int], series: Mapping[str, Values]) -> tuple[list[int], dict[str, list[float | None]]]:
    """At most 400 points: each is the mean of its bucket, at the bucket's last step."""
    size = math.ceil(len(steps) / _MAX_POINTS) or 1
    starts = range(0, len(steps), size)
    thinned = {name: [_mean(values[i : i + size]) for i in starts] for name, values in series.items()}
    return [steps[min(i + size, len(steps)) - 1] for i in starts], thinned


def line_chart(
    title: str, steps: Sequence[int], series: Mapping[str, Values], note: str = "", log: bool = False
) -> str:
    """A figure with one line per series over the steps; long noisy ones get a moving average on top.

    `log` asks for a logarithmic axis; values at or below zero are left out of it.
    """
    steps, series = thin(steps, series)
    if log:
        series = {name: [v if v is not None and v > 0 else None for v in values] for name, values in series.items()}
    known = [v for values in series.values() for v in values if v is not None]
    if not known:
        return ""
    x, y = _step_axis(steps), _value_axis(known, log)
    paths = []
    for index, values in enumerate(series.values()):
        color = f"c{index % NUM_COLORS}"
        noisy = is_noisy(values)
        if noisy:
            paths.append(f'<path class="raw {color}" d="{_path(steps, values, x, y)}"/>')
        drawn = smooth(values) if noisy else values
        paths.append(f'<path class="line {color}" d="{_path(steps, drawn, x, y)}"/>')
    return _figure(title, note, steps, series, x, y, "".join(paths))


def stacked_chart(title: str, steps: Sequence[int], series: Mapping[str, Values], note: str = "") -> str:
    """A figure with the series as areas on top of each other; a missing value counts as nothing."""
    steps, series = thin(steps, series)
    if not steps or not series:
        return ""
    tops = [[0.0] * len(steps)]
    for values in series.values():
        tops.append([below + (value or 0.0) for below, value in zip(tops[-1], values, strict=True)])
    x, y = _step_axis(steps), _value_axis([0.0, *tops[-1]], log=False)
    areas = []
    for index, (lower, upper) in enumerate(zip(tops, tops[1:], strict=False)):
        there = [f"{x(step)},{y(value)}" for step, value in zip(steps, upper, strict=True)]
        back = [f"{x(step)},{y(value)}" for step, value in zip(steps, lower, strict=True)]
        points = " ".join(there + back[::-1])
        areas.append(f'<polygon class="area c{index % NUM_COLORS}" points="{points}"/>')
    return _figure(title, note, steps, series, x, y, "".join(areas))


def interval_bar(share: float, interval: Sequence[float], color: str) -> str:
    """A small bar of a share in 0..1 with its interval as a whisker."""
    width, low, high = (round(100 * value, 2) for value in (share, *interval))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="track" width="100" height="10"/><rect class="{color}" width="{width}" height="10"/>'
        f'<rect class="whisker" x="{low}" y="4" width="{round(high - low, 2)}" height="2"/></svg>'
    )


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _step_axis(steps: Sequence[int]) -> Axis:
    low, high = steps[0], steps[-1]
    return Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _value_axis(known: Sequence[float], log: bool) -> Axis:
    low, high = min(known), max(known)
    if log:
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
        return Axis(low, high if high > low else low * 10, HEIGHT - BOTTOM, TOP, log=True)
    # Lines that stay above zero are shown from zero unless that would flatten them.
    if 0 < low < 0.6 * high:
        low = 0.0
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Axis(low - margin if low != 0 else 0.0, high + margin, HEIGHT - BOTTOM, TOP)


def _path(steps: Sequence[int], values: Values, x: Axis, y: Axis) -> str:
    """An SVG path with a gap at each missing value."""
    parts, pen = [], "M"
    for step, value in zip(steps, values, strict=True):
        if value is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x(step)} {y(value)}")
        pen = "L"
    # A single point between two gaps needs a line of no length to be seen.
    return "".join(parts) + ("h0.01" if len(parts) == 1 else "")


def _figure(
    title: str,
    note: str,
    steps: Sequence[int],
    series: Mapping[str, Values],
    x: Axis,
    y: Axis,
    marks: str,
) -> str:
    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick_label(tick)}</text>'
        for tick in y.ticks
    ]
    bottom = HEIGHT - BOTTOM
    grid += [
        f'<text class="tick" x="{x(tick)}" y="{bottom + 17}" text-anchor="middle">{tick_label(tick)}</text>'
        for tick in x.ticks
        if tick == int(tick)
    ]
    legend = "".join(
        f'<span><i class="c{index % NUM_COLORS}"></i>{escape(name)}</span>' for index, name in enumerate(series)
    )
    data = {
        "steps": list(steps),
        "x": [x(step) for step in steps],
        "series": [[name, [None if v is None else float(f"{v:.4g}") for v in vs]] for name, vs in series.items()],
    }
    packed = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> <small>{escape(note)}</small>'
        f'<div class="legend">{legend}</div></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(grid)}'
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>'
        f'{marks}<line class="cursor" y1="{TOP}" y2="{bottom}" hidden/></svg>'
        f'<div class="tip" hidden></div><script type="application/json">{packed}</script></figure>'
    )
