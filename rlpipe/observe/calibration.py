"""Calibration of a judge as a person reads it: tables in a terminal, and one self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.console import Console

from rlpipe.evaluate.terminal import results_table
from rlpipe.observe.charts import Axis, tick_label

LABELS = {
    "accuracy": "accuracy",
    "always_yes": "  of always saying yes",
    "balanced_accuracy": "balanced accuracy",
    "yes_of_right": "  yes of the right ones",
    "no_of_wrong": "  no of the wrong ones",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "kappa": "Cohen's kappa",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
}
WIDTH, PLAIN_WIDTH = 960, 110
STYLE = """
svg {
  --paper: #ffffff; --ink: #1d2025; --quiet: #666c75; --line: #e3e4e7;
  --right: #17936a; --wrong: #cf3f5d; --bar: #2f6fdb;
  font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
@media (prefers-color-scheme: dark) {
  svg {
    --paper: #1b1e24; --ink: #e8eaed; --quiet: #989fa9; --line: #2d323a;
    --right: #45cf9f; --wrong: #f27d96; --bar: #6ea3ff;
  }
}
text { fill: var(--ink); }
.quiet { fill: var(--quiet); font-size: 12px; }
.title { font-size: 19px; font-weight: 650; }
.head { font-size: 14px; font-weight: 650; }
.big { font-size: 22px; font-weight: 650; }
.paper { fill: var(--paper); }
.track { fill: var(--line); opacity: .55; }
.right { fill: var(--right); }
.wrong { fill: var(--wrong); }
.bar { fill: var(--bar); }
.soft { opacity: .62; }
.dot { fill: var(--bar); stroke: var(--paper); stroke-width: 1.5; }
.curve { stroke: var(--bar); stroke-width: 2; fill: none; opacity: .45; }
.whisker { stroke: var(--ink); stroke-width: 1.5; opacity: .7; }
.grid { stroke: var(--line); }
.axis { stroke: var(--quiet); }
.ideal { stroke: var(--quiet); stroke-dasharray: 5 4; }
.cut { stroke: var(--ink); stroke-dasharray: 2 3; }
"""


def print_calibration(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print calibration.json's structure: what was compared, the numbers with intervals, the curve, the kinds."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH, highlight=False)
    console.print(f"{result['scorer']} against {_truth(result)}: {_what(result)}")
    table = results_table("All images", "value", "95 % interval")
    for key, name in LABELS.items():
        cell = result["numbers"][key]
        if cell["value"] is not None:
            table.add_row(name, f"{cell['value']:.3f}", _range(cell["ci95"]))
    console.print(table)
    if result["curve"]:
        table = results_table("Calibration", "images", "mean score", "share right", "95 % interval")
        for row in (row for row in result["curve"] if row["count"]):
            bounds = f"{row['low']:.2f} to {row['high']:.2f}"
            cells = (f"{row['mean_score']:.3f}", f"{row['share_right']:.3f}", _range(row["ci95"]))
            table.add_row(bounds, str(row["count"]), *cells)
        console.print(table)
    if result["by_kind"]:
        table = results_table("By kind of prompt", "images", "right", "accuracy", "balanced", "95 % interval", "AUROC")
        for kind, row in result["by_kind"].items():
            accuracy, balanced, area = (row["numbers"][key] for key in ("accuracy", "balanced_accuracy", "auroc"))
            cells = (_number(row["base_rate"]), _number(accuracy["value"]), _number(balanced["value"]))
            table.add_row(_spaced(kind), str(row["cases"]), *cells, _range(balanced["ci95"]), _number(area["value"]))
        console.print(table)
    for line in _notes(result):
        console.print(line)


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    if best := result["best_threshold"]:
        notes.append(
            f"best threshold {best['threshold']:.3f}: balanced accuracy {best['balanced_accuracy']:.3f} on these very "
            f"images; said yes above {result['threshold']:g} here"
        )
    if mass := result["mass"]:
        notes.append(
            f"P(yes) + P(no) in the whole vocabulary: mean {mass['mean']:.3f}, lowest 5 % below {mass['p05']:.3f}"
        )
    if not result["is_probability"]:
        notes.append("scores outside of 0 to 1: no Brier score, no calibration")
    return notes


def picture(result: Mapping[str, Any]) -> str:
    """The calibration as one SVG: reliability diagram, histograms by label, balanced accuracy by kind of prompt."""
    height = 692 + 30 * (len(result["by_kind"]) + 1)
    parts = [
        f'<rect class="paper" width="{WIDTH}" height="{height}" rx="10"/>',
        _text(30, 38, f"{result['scorer']} against {_truth(result)}", "title"),
        _text(30, 60, _what(result), "quiet"),
        _headline(result, 96),
        _reliability(result, 60, 186) if result["curve"] else _text(60, 200, "Scores are no probabilities.", "quiet"),
        _histogram(result, 530, 186),
        _bars(result, 60, 662),
    ]
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        f"<title>{escape(result['scorer'])}: calibration</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def _headline(result: Mapping[str, Any], y: float) -> str:
    names = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "kappa": "Cohen's kappa"}
    names |= {"brier": "Brier score", "ece": "calibration error"}
    parts = []
    for place, (key, name) in enumerate(names.items()):
        cell, x = result["numbers"][key], 30 + 182 * place
        parts += [_text(x, y, name, "quiet"), _text(x, y + 25, _number(cell["value"]), "big")]
        parts.append(_text(x, y + 44, _range(cell["ci95"]), "quiet"))
    return "".join(parts)


def _reliability(result: Mapping[str, Any], left: float, top: float) -> str:
    """Share right against mean score, a bar of counts below; above the diagonal the judge is too strict."""
    size, strip = 310, 44
    x, y = Axis(0, 1, left, left + size), Axis(0, 1, top + 20 + size, top + 20)
    parts = [_text(left - 30, top, "Reliability: share of right images by score", "head")]
    parts.append(_grid(x, y, (0, 0.25, 0.5, 0.75, 1), (0, 0.25, 0.5, 0.75, 1), labels_below=False))
    parts.append(_line(x(0), y(0), x(1), y(1), "ideal"))
    filled = [row for row in result["curve"] if row["count"]]
    most = max(row["count"] for row in filled)
    points = [(x(row["mean_score"]), y(row["share_right"])) for row in filled]
    parts.append(f'<polyline class="curve" points="{" ".join(f"{px},{py}" for px, py in points)}"/>')
    for row, (px, py) in zip(filled, points, strict=True):
        low, high = row["ci95"]
        parts.append(_line(px, y(low), px, y(high), "whisker"))
        told = f"{row['count']} images, mean score {row['mean_score']:.3f}, right {row['share_right']:.3f}"
        radius = 3 + 3 * math.sqrt(row["count"] / most)
        parts.append(f'<circle class="dot" cx="{px}" cy="{py}" r="{radius:.1f}"><title>{told}</title></circle>')
    base = y(0) + 20 + strip
    for row in filled:
        height = max(strip * row["count"] / most, 1)
        width = x(row["high"]) - x(row["low"])
        parts.append(_rect(x(row["low"]) + 1, base - height, width - 2, height, "bar soft"))
        if width >= 24:
            parts.append(_text(x(row["low"]) + width / 2, base - height - 4, str(row["count"]), "quiet", "middle"))
    parts += [_line(x(0), base, x(1), base, "axis")]
    parts += [_text(x(tick), base + 16, tick_label(tick), "quiet", "middle") for tick in (0, 0.25, 0.5, 0.75, 1)]
    parts.append(_text(x(1), base + 32, "score (bars: images in each bin)", "quiet", "end"))
    return "".join(parts)


def _histogram(result: Mapping[str, Any], left: float, top: float) -> str:
    """Scores of right images upwards, of wrong ones downwards, both as shares of their label.

    The scale is that of square roots: a judge that is sure of nearly every image is interesting where it is not.
    """
    width, half = 390, 178
    edges, counts = result["histogram"]["edges"], {key: result["histogram"][key] for key in ("right", "wrong")}
    shares = {key: [count / max(sum(values), 1) for count in values] for key, values in counts.items()}
    most = max(max(values) for values in shares.values()) or 1
    x, middle = Axis(edges[0], edges[-1], left, left + width), top + 24 + half
    parts = [_text(left, top, "Scores by label", "head")]
    for key, direction in (("right", -1), ("wrong", 1)):
        for place, share in enumerate(shares[key]):
            x0, height = x(edges[place]), (half - 12) * math.sqrt(share / most)
            bar = (x0 + 1, middle if direction > 0 else middle - height, x(edges[place + 1]) - x0 - 2, height)
            parts.append(_rect(*bar, key, f"{key}: {counts[key][place]} images") if share else "")
    parts.append(_line(x(edges[0]), middle, x(edges[-1]), middle, "axis"))
    if edges[0] <= result["threshold"] <= edges[-1]:
        cut = x(result["threshold"])
        parts += [_line(cut, top + 18, cut, middle + half, "cut")]
        parts += [_text(cut - 6, top + 28, "no", "quiet", "end"), _text(cut + 6, top + 28, "yes", "quiet")]
    for key, place in (("right", left + width - 190), ("wrong", left + width - 90)):
        parts += [_rect(place, top - 10, 10, 10, key), _text(place + 16, top, f"{key} {sum(counts[key])}", "quiet")]
    parts += [_text(x(tick), middle + half + 24, tick_label(tick), "quiet", "middle") for tick in x.ticks]
    parts.append(
        _text(x(edges[-1]), middle + half + 42, "score (bars: share of a label's images, square root)", "quiet", "end")
    )
    return "".join(parts)


def _bars(result: Mapping[str, Any], left: float, top: float) -> str:
    """Balanced accuracy of all images and of each kind of prompt, with intervals; one half is chance."""
    rows = {"all": {"cases": result["cases"], "numbers": result["numbers"]}, **result["by_kind"]}
    x = Axis(0, 1, left + 110, WIDTH - 250)
    bottom = top + 18 + 30 * len(rows)
    parts = [_text(left - 30, top, "Balanced accuracy by kind of prompt; one half is chance", "head")]
    for place, (kind, row) in enumerate(rows.items()):
        cell, y = row["numbers"]["balanced_accuracy"], top + 18 + 30 * place
        parts.append(_text(left + 98, y + 14, _spaced(kind), "", "end"))
        parts.append(_rect(x(0), y + 3, x(1) - x(0), 14, "track"))
        if cell["value"] is not None:
            parts.append(_rect(x(0), y + 3, x(cell["value"]) - x(0), 14, "bar" if kind == "all" else "bar soft"))
            if cell["ci95"]:
                parts.append(_line(x(cell["ci95"][0]), y + 10, x(cell["ci95"][1]), y + 10, "whisker"))
        parts += [
            _text(x(1) + 12, y + 14, _number(cell["value"])),
            _text(x(1) + 56, y + 14, _range(cell["ci95"]), "quiet"),
        ]
        parts.append(_text(WIDTH - 30, y + 14, str(row["cases"]), "quiet", "end"))
    parts.append(_text(WIDTH - 30, top, "images", "quiet", "end"))
    parts.append(_line(x(0.5), top + 14, x(0.5), bottom - 6, "ideal"))
    return "".join(parts)


def _grid(x: Axis, y: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float], labels_below: bool) -> str:
    parts = [_line(x(tick), y.start, x(tick), y.end, "grid") for tick in x_ticks]
    for tick in y_ticks:
        parts.append(_line(x.start, y(tick), x.end, y(tick), "grid"))
        parts.append(_text(x.start - 8, y(tick) + 4, tick_label(tick), "quiet", "end"))
    if labels_below:
        parts += [_text(x(tick), y.start + 16, tick_label(tick), "quiet", "middle") for tick in x_ticks]
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="1.5">{told}</rect>'
    )


def _truth(result: Mapping[str, Any]) -> str:
    return "the exact checker" if result["labels"] == "checker" else "the rows' labels"


def _what(result: Mapping[str, Any]) -> str:
    left_out = [f"{result[f'without_{key}']} without {key}" for key in ("score", "label") if result[f"without_{key}"]]
    base = f"{100 * result['base_rate']:.1f} % right"
    return ", ".join([f"{result['cases']} images of {result['prompts']} prompts", base, *left_out])


def _spaced(kind: str) -> str:
    return kind.replace("_", " ")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
