"""`report/index.html` of a run: the result, curves and a gallery, from what stands in the run folder.

One file that opens from file:// without a network: style, script and charts inline, images relative paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rlpipe.observe.charts import interval_bar, line_chart, stacked_chart
from rlpipe.observe.gallery import GalleryStep, read_rollouts
from rlpipe.observe.metrics import describe
from rlpipe.observe.tracker import METRICS_FILE, STEP, MetricsLog, read_metrics

ASSETS = Path(__file__).with_name("assets")
POLICIES = {"sft": "SFT", "rl": "RL"}
COLUMNS = {"without": "without", "with": "with introspection", "fresh": "fresh draw (control)"}
SEGMENTS = ("first", "reflection", "final")
_MAX_GALLERY_STEPS = 60
_HIDDEN = (STEP, "train/policy_version")


def write_report(run_dir: str | Path) -> Path:
    """Write `run_dir`/report/index.html atomically and return its path. All that it reads may be missing."""
    run_dir = Path(run_dir)
    log, steps = read_metrics(run_dir), read_rollouts(run_dir)
    summary, notes = _read_summary(run_dir)
    notes += _damage_notes(log, steps)
    shown = _spread(steps, _MAX_GALLERY_STEPS)
    if len(shown) < len(steps):
        notes.append(f"The gallery shows {len(shown)} of {len(steps)} saved steps, evenly spread.")
    config = run_dir / "config.yaml"
    body = [
        _header(run_dir, log, summary),
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        _result(summary) if summary else "",
        _curves(log),
        _gallery(shown),
        _details("Configuration", config.read_text(encoding="utf-8")) if config.is_file() else "",
    ]
    page = _page(run_dir.resolve().name, "\n".join(part for part in body if part))
    path = run_dir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(".index.html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _page(title: str, body: str) -> str:
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>\n<style>\n{style}</style></head>\n'
        f"<body><main>\n{body}\n</main>\n<script>\n{script}</script></body></html>\n"
    )


def _read_summary(run_dir: Path) -> tuple[dict | None, list[str]]:
    path = run_dir / "summary.json"
    if not path.is_file():
        return None, []
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return (summary, []) if summary.get("table") else (None, [])
    except (ValueError, AttributeError):
        return None, ["summary.json could not be read; the result table is left out."]


def _damage_notes(log: MetricsLog, steps: Sequence[GalleryStep]) -> list[str]:
    notes = []
    if log.damaged_lines:
        lines = ", ".join(map(str, log.damaged_lines[:8])) + (" ..." if len(log.damaged_lines) > 8 else "")
        notes.append(f"{METRICS_FILE}: {len(log.damaged_lines)} damaged line(s) skipped (line {lines}).")
    notes += [
        f"rollouts/step_{step.step}: {step.damaged_lines} damaged record(s) skipped."
        for step in steps
        if step.damaged_lines
    ]
    return notes


def _spread(steps: Sequence[GalleryStep], most: int) -> list[GalleryStep]:
    """At most `most` of them, evenly spread, with the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


# header and result


def _header(run_dir: Path, log: MetricsLog, summary: dict | None) -> str:
    facts = []
    if log.rows:
        seconds = sum(v for row in log.rows for k, v in row.items() if k == "time/step" and v)
        facts.append(f"{log.rows[-1][STEP]} steps")
        facts += [f"{seconds / 60:.1f} minutes of training"] if seconds else []
    if summary and summary.get("prompts"):
        facts.append(f"{summary['prompts']} held-out prompts")
        facts += [f"{summary['seconds'] / 60:.1f} minutes in all"] if summary.get("seconds") else []
    return f"<header><h1>{escape(run_dir.resolve().name)}</h1><p>{escape(' · '.join(facts))}</p></header>"


def _result(summary: dict) -> str:
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
    tiles = [(f"{POLICIES[name]} with introspection", _percent(row["with"]["accuracy"]), "of held-out prompts")]
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
        lines.append(f"<tr><th>{POLICIES.get(name, name)}</th>{''.join(cells)}</tr>")
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
        lines.append(f"<tr><th>{POLICIES.get(name, name)}</th>{cells}</tr>")
    return (
        '<div class="scroll"><table><caption>Verdict of the policy, repair and damage, agreement of the '
        f"learned judge with the checker, percent</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kinds_table(rows: dict) -> str:
    tags = list(next(iter(rows.values()))["without"].get("by_tag", {}))
    if not tags:
        return ""
    head = "".join(f"<th>{escape(tag.replace('_', ' '))}</th>" for tag in tags)
    lines = []
    for name, row in rows.items():
        for column in ("without", "with"):
            shares = [row[column]["by_tag"].get(tag) for tag in tags]
            cells = "".join(
                f'<td class="heat" style="--share:{round(share or 0, 3)}">{_percent(share)}</td>' for share in shares
            )
            lines.append(f"<tr><th>{POLICIES.get(name, name)} {column}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table><caption>By kind of prompt, percent</caption><thead><tr><th></th>{head}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


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


# curves


def _curves(log: MetricsLog) -> str:
    """The charts that matter first, then one per remaining prefix."""
    if not log.rows:
        return ""
    names = list(dict.fromkeys(name for row in log.rows for name in row if name not in _HIDDEN))
    steps = [int(row[STEP]) for row in log.rows]
    left = dict.fromkeys(names)

    def take(*wanted: str, prefix: str | None = None, ending: str = "") -> dict[str, list]:
        chosen = [name for name in wanted if name in left]
        if prefix:
            chosen += [name for name in left if name.startswith(prefix) and name.endswith(ending)]
        for name in chosen:
            left.pop(name)
        return {name: [row.get(name) for row in log.rows] for name in chosen}

    def line(title: str, series: dict[str, list], log_axis: bool = False) -> str:
        note = describe(next(iter(series))) if len(series) == 1 else ""
        return line_chart(title, steps, series, note, log_axis)

    total = take("time/step")
    charts = [
        line("Reward by segment", take(*(f"reward/{segment}/mean" for segment in SEGMENTS))),
        line("Share of Yes", take("rollout/share_yes")),
        line("KL to the reference", take(prefix="kl/")),
        line("Sampler against learner", take(prefix="mismatch/"), log_axis=True),
        stacked_chart("Seconds by phase", steps, take(prefix="time/")),
        line("Idle share by role", take(prefix="idle/")),
        line("Gradient norm", take("train/grad_norm")),
        line("Learning rate", take("train/lr")),
        line("Loss", take("loss/total", "loss/policy", "loss/kl", "loss/ce")),
        line("Images per second", take("rollout/images_per_s")),
        line("Reward by scorer", take(prefix="reward/", ending="/mean")),
        line("Seconds per step", total),
    ]
    for prefix in dict.fromkeys(name.split("/")[0] for name in list(left)):
        charts.append(line(f"Other: {prefix}", take(prefix=f"{prefix}/") or take(prefix)))
    return f'<section><h2>Curves</h2><div class="charts">{"".join(charts)}</div></section>'


# gallery


def _gallery(steps: Sequence[GalleryStep]) -> str:
    steps = [step for step in steps if step.rows]
    if not steps:
        return ""
    options = "".join(f'<option value="{step.step}">step {step.step}</option>' for step in steps)
    filters = "".join(
        f'<button type="button" data-filter="{value}" aria-pressed="{"true" if value == "all" else "false"}">'
        f"{label}</button>"
        for value, label in (
            ("all", "All"),
            ("yes", "Said Yes"),
            ("no", "Said No"),
            ("repaired", "Repaired"),
            ("damaged", "Damaged"),
        )
    )
    cards = "".join(_card(step, row) for step in steps for row in step.rows)
    return (
        '<section id="gallery"><h2>Gallery</h2><p class="lead">First image, verdict with its reason, next '
        "image, and what each segment scored. Repaired and damaged are by the score that trained the policy: "
        "below one half at first and above at the end, or the reverse.</p>"
        '<div class="controls"><select aria-label="step">'
        f'<option value="all">all steps</option>{options}</select>{filters}<span id="count"></span></div>'
        f'<div class="cards">{cards}</div></section>'
    )


def _card(step: GalleryStep, row: dict) -> str:
    images = [s for s in row["segments"] if s["kind"] == "image"]
    texts = [s for s in row["segments"] if s["kind"] == "text"]
    said = "yes" if texts and texts[0].get("verdict") else "no" if texts else ""
    picture = [_picture(step, row, image) for image in images]
    words = [_words(text) for text in texts]
    middle = [part for pair in zip(picture, words, strict=False) for part in pair]
    middle += picture[len(words) :] or ['<div class="kept">accepted</div>']
    tag = f"<i>{escape(str(row['tag']).replace('_', ' '))}</i>" if row.get("tag") else ""
    return (
        f'<article class="card" data-step="{step.step}" data-said="{said}" data-change="{_change(images)}">'
        f"<h3>{escape(str(row.get('prompt', '')))} {tag}<small>step {step.step}</small></h3>"
        f'<div class="flow">{"".join(middle)}</div>{_scores(row["segments"])}</article>'
    )


def _change(images: Sequence[dict]) -> str:
    first, last = images[0].get("score"), images[-1].get("score")
    if first is None or last is None or (first > 0.5) == (last > 0.5):
        return ""
    return "repaired" if last > 0.5 else "damaged"


def _picture(step: GalleryStep, row: dict, image: dict) -> str:
    name = str(image.get("file", ""))
    if not (step.folder / name).is_file():
        return '<div class="kept">image missing</div>'
    source = escape(f"../rollouts/{step.folder.name}/{name}", quote=True)
    prompt = escape(str(row.get("prompt", "")), quote=True)
    return f'<img loading="lazy" width="144" height="144" src="{source}" alt="{prompt}">'


def _words(text: dict) -> str:
    said, _, reason = str(text.get("text", "")).partition(",")
    kind = "yes" if text.get("verdict") else "no"
    cut = " <small>(cut at the length limit)</small>" if text.get("truncated") else ""
    return f'<p class="says {kind}"><b>{escape(said)}</b>{escape(reason)}{cut}</p>'


def _scores(segments: Sequence[dict]) -> str:
    names, num_images = [], 0
    segments = [*segments, *[{"kind": "image"}] * (3 - len(segments))]  # one width for all cards
    for segment in segments:
        num_images += segment["kind"] == "image"
        names.append(("first image" if num_images == 1 else "next image") if segment["kind"] == "image" else "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    score = "".join(f"<td{_why(s)}>{_number(s.get('score'))}</td>" for s in segments)
    advantage = "".join(f'<td class="{_sign(s)}">{_number(s.get("advantage"), "+")}</td>' for s in segments)
    return (
        f'<table class="scores"><thead><tr><th></th>{head}</tr></thead><tbody><tr><th>score</th>{score}</tr>'
        f"<tr><th>advantage</th>{advantage}</tr></tbody></table>"
    )


def _why(segment: dict) -> str:
    parts = "; ".join(f"{name} {_number(value)}" for name, value in (segment.get("parts") or {}).items())
    words = segment.get("error") or parts
    return f' title="{escape(str(words), quote=True)}"' if words else ""


def _sign(segment: dict) -> str:
    advantage = segment.get("advantage") or 0.0
    return "up" if advantage > 0 else "down" if advantage < 0 else ""


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
