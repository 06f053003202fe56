"""Images per second over the batch as one SVG file: a panel per set of lines, logarithmic axes, limits dashed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from rlpipe.observe.charts import Axis, tick_label

WIDTH, HEIGHT = 620, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 40, 46
COLORS = ("#0b6e99", "#c2571a", "#4c8c2b", "#7a4fa3", "#555555")
STYLE = "text{font:12px system-ui,sans-serif;fill:#444}.t{font-weight:600;fill:#111}.g{stroke:#ddd}"


@dataclass(frozen=True)
class Line:
    """values: images per second by batch size. limit: drawn dashed, in grey."""

    name: str
    values: Mapping[int, float]
    limit: bool = False


def panels(title: str, charts: Mapping[str, Sequence[Line]]) -> str:
    """The SVG document: one panel per entry of `charts` that has a value, below each other."""
    drawn = [_panel(name, lines, number) for number, (name, lines) in enumerate(_with_values(charts).items())]
    height = HEIGHT * len(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _with_values(charts: Mapping[str, Sequence[Line]]) -> dict[str, list[Line]]:
    kept = {name: [line for line in lines if line.values] for name, lines in charts.items()}
    return {name: lines for name, lines in kept.items() if lines}


def _panel(name: str, lines: Sequence[Line], number: int) -> str:
    batches = sorted({batch for line in lines for batch in line.values})
    known = [value for line in lines for value in line.values.values()]
    x = Axis(batches[0] * 0.9, batches[-1] * 1.1, LEFT, WIDTH - RIGHT, log=True)
    y = Axis(min(known) * 0.8, max(known) * 1.25, HEIGHT - BOTTOM, TOP, log=True)
    parts = [f'<text class="t" x="{LEFT}" y="22">{escape(name)}: images per second over the batch</text>']
    for tick in _ticks(y):
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4}" text-anchor="end">{tick_label(tick)}</text>')
    for batch in batches:
        parts.append(f'<text x="{x(batch)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{batch}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">batch</text>')
    placed: list[float] = []
    for index, line in enumerate(sorted(lines, key=lambda line: -line.values[max(line.values)])):
        parts.append(_line(line, "#888888" if line.limit else COLORS[index % len(COLORS)], x, y, placed))
    return f'<g transform="translate(0 {HEIGHT * number})">{"".join(parts)}</g>'


def _line(line: Line, color: str, x: Axis, y: Axis, placed: list[float]) -> str:
    """The line, its points, and its name at the right, pushed down where another name stands."""
    points = [(x(batch), y(value)) for batch, value in sorted(line.values.items())]
    path = " ".join(f"{a},{b}" for a, b in points)
    dashes = ' stroke-dasharray="6 4"' if line.limit else ""
    dots = "".join(f'<circle cx="{a}" cy="{b}" r="3" fill="{color}"/>' for a, b in points)
    at = max([points[-1][1] + 4, *(other + 15 for other in placed)])
    placed.append(at)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>{dots}'
        f'<text x="{WIDTH - RIGHT + 10}" y="{at}" style="fill:{color}">{escape(line.name)}</text>'
    )


def _ticks(axis: Axis) -> list[float]:
    """1, 2 and 5 times the powers of ten that the axis shows."""
    ticks = [mantissa * 10.0**power for power in range(-6, 7) for mantissa in (1, 2, 5)]
    return [tick for tick in ticks if axis.low <= tick <= axis.high]
