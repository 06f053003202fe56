"""The result of a run as HTML: tiles and tables of summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from rlpipe.evaluate.terminal import COLUMNS, NAMES
from rlpipe.observe.charts import interval_bar


def result_section(summary: dict) -> str:
    """The section of summary.json: of introspection, or of edits."""
    if "edits" in summary:
        return _edit_section(summary)
    rows = summary["table"]
    guidance = f", guidance {summary['guidance']:g}" if "guidance" in summary else ""
    return (
        f"<section><h2>Result</h2>{_tiles(summary, rows)}"
        '<div class="scroll"><table class="result"><caption>Accuracy on held-out prompts by the exact checker'
        f"{guidance}, percent with 95&nbsp;% intervals. Control: a fresh draw in place of the redraw, so the "
        f"same number of images.</caption>{_accuracy_rows(rows)}</table></div>"
        f"{_verdict_table(rows)}{_kinds_table(rows)}</section>"
    )


def _tiles(summary: dict, rows: dict) -> str:
    name = "rl" if "rl" in rows else "sft"
    row = rows[name]
    tiles = [(f"{NAMES[name]} with introspection", _percent(row["with"]["accuracy"]), "of held-out prompts")]
    if "rl_gain" in summary:
        gain = summary["rl_gain"]["with"]
        tiles.append(("RL over SFT", _points(gain["value"]), f"points, {_points_range(gain['ci95'])}"))
    if "gain" in row:
        gain = row["gain"]
        tiles.append(("Introspection", _points(gain["value"]), f"points, {_points_range(gain['ci95'])}"))
    tiles.append(("Repaired", _percent(row.get("repaired")), "of wrong first images"))
    tiles.append(("Damaged", _percent(row.get("damaged")), "of right first images"))
    tiles.append(("Verdict", _percent(row.get("verdict", {}).get("balanced_accuracy")), "balanced accuracy"))
    cells = (f"<div><span>{escape(a)}</span><b>{b}</b><small>{escape(c)}</small></div>" for a, b, c in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _accuracy_rows(rows: dict) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in COLUMNS.values())
    lines = [f"<thead><tr><th></th>{head}<th>gain</th><th>over control</th></tr></thead><tbody>"]
    for name, row in rows.items():
        cells = []
        for index, column in enumerate(COLUMNS):
            cell = row.get(column)
            if cell is None:
                cells.append("<td>-</td>")
                continue
            half = 50 * (cell["ci95"][1] - cell["ci95"][0])
            bar = interval_bar(cell["accuracy"], cell["ci95"], f"c{index}")
            cells.append(f"<td><b>{_percent(cell['accuracy'])}</b> <small>± {half:.1f}</small>{bar}</td>")
        for key in ("gain", "gain_over_fresh"):
            gain = row.get(key)
            text = f"{_points(gain['value'])}<br><small>{_points_range(gain['ci95'])}</small>" if gain else "-"
            cells.append(f"<td>{text}</td>")
        lines.append(f"<tr><th>{NAMES.get(name, name)}</th>{''.join(cells)}</tr>")
    return "".join(lines) + "</tbody>"


def _verdict_table(rows: dict) -> str:
    columns = {
        "verdict": lambda r: r["verdict"]["accuracy"],
        "balanced": lambda r: r["verdict"]["balanced_accuracy"],
        "on near misses": lambda r: r["verdict"]["near_miss_balanced_accuracy"],
        "said Yes": lambda r: r["verdict"]["share_yes"],
        "repaired": lambda r: r["repaired"],
        "by fresh draw": lambda r: r["repaired_by_fresh"],
        "damaged": lambda r: r["damaged"],
        "by fresh draw ": lambda r: r["damaged_by_fresh"],
        "judge agrees": lambda r: r["judge"]["agreement"],
    }
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    lines = []
    for name, row in rows.items():
        cells = "".join(f"<td>{_percent(_get(row, read))}</td>" for read in columns.values())
        lines.append(f"<tr><th>{NAMES.get(name, name)}</th>{cells}</tr>")
    return (
        '<div class="scroll"><table><caption>Verdict of the policy, repair and damage, agreement of the '
        f"learned judge with the checker, percent</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kinds_table(rows: dict) -> str:
    tags = list(next(iter(rows.values()))["without"].get("by_tag", {}))
    if not tags:
        return ""
    lines = []
    for name, row in rows.items():
        for column in ("without", "with"):
            shares = [row[column]["by_tag"].get(tag) for tag in tags]
            lines.append(f"<tr><th>{NAMES.get(name, name)} {column}</th>{_heat(shares)}</tr>")
    return _heat_table("By kind of prompt, percent", tags, lines)


def _get(row: dict, read) -> float | None:
    try:
        return read(row)
    except KeyError:
        return None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _points_range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _edit_section(summary: dict) -> str:
    rows, gains = summary["edits"], summary.get("rl_gain", {})
    parts = list(next(iter(rows.values())))[:-1]  # the last entry is the judge
    name = list(rows)[-1]
    tiles = [(f"{NAMES.get(name, name)}: {part}", _percent(rows[name][part]["value"]), "of edits") for part in parts]
    tiles += [
        (f"RL over SFT: {part}", _points(gain["value"]), f"points, {_points_range(gain['ci95'])}")
        for part, gain in gains.items()
    ]
    cells = (f"<div><span>{escape(a)}</span><b>{b}</b><small>{escape(c)}</small></div>" for a, b, c in tiles)
    lines = []
    for name, row in rows.items():
        shares = []
        for index, part in enumerate(parts):
            cell = row[part]
            half, bar = 50 * (cell["ci95"][1] - cell["ci95"][0]), interval_bar(cell["value"], cell["ci95"], f"c{index}")
            shares.append(f"<td><b>{_percent(cell['value'])}</b> <small>± {half:.1f}</small>{bar}</td>")
        shares += [f"<td>{_percent(judge['balanced'])}</td>" for judge in row["judge"].values()]
        lines.append(f"<tr><th>{NAMES.get(name, name)}</th>{''.join(shares)}</tr>")
    titles = [*parts, *(f"judge on {part}" for part in next(iter(rows.values()))["judge"])]
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return (
        f'<section><h2>Result</h2><div class="tiles">{"".join(cells)}</div><div class="scroll"><table class="result">'
        f"<caption>Held-out edits by the exact checker, guidance {summary['guidance']:g}, percent with 95&nbsp;% "
        "intervals; balanced agreement of the learned judge with the checker.</caption><thead><tr><th></th>"
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f"</div>{_edit_kinds(rows, parts)}</section>"
    )


def _edit_kinds(rows: dict, parts: Sequence[str]) -> str:
    tags = list(next(iter(rows.values()))[parts[0]]["by_tag"])
    lines = []
    for name, row in rows.items():
        for part in parts:
            shares = [row[part]["by_tag"][tag] for tag in tags]
            lines.append(f"<tr><th>{NAMES.get(name, name)} {escape(part)}</th>{_heat(shares)}</tr>")
    return _heat_table("By kind of edit, percent", tags, lines)


def _heat(shares: Sequence[float | None]) -> str:
    return "".join(
        f'<td class="heat" style="--share:{round(share or 0, 3)}">{_percent(share)}</td>' for share in shares
    )


def _heat_table(caption: str, tags: Sequence[str], lines: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(tag.replace('_', ' '))}</th>" for tag in tags)
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr><th></th>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
