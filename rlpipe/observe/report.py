"""`report/index.html` of a run: the result, curves and a gallery, from what stands in the run folder.

One file that opens from file:// without a network: style, script and charts inline, images relative paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rlpipe.observe.cards import gallery_section
from rlpipe.observe.charts import line_chart, stacked_chart
from rlpipe.observe.gallery import GalleryStep, read_rollouts
from rlpipe.observe.metrics import describe
from rlpipe.observe.results import result_section
from rlpipe.observe.tracker import METRICS_FILE, STEP, MetricsLog, read_metrics

ASSETS = Path(__file__).with_name("assets")
SEGMENTS = ("first", "reflection", "final")
_MAX_GALLERY_STEPS = 60
_TRAINED_ON = ("reward/final/mean", "reward/first/mean")
"""What a canary is drawn beside: while they rise and it does not, the policy is learning to please its judge."""
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
        result_section(summary) if summary else "",
        _curves(log),
        gallery_section(shown),
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
        return (summary, []) if summary.get("table") or summary.get("edits") else (None, [])
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
    canary = take(prefix="canary/", ending="/mean")
    if canary:
        beside = {name: [row.get(name) for row in log.rows] for name in _TRAINED_ON if name in names}
        canary = {**beside, **canary}
    charts = [
        line("Reward by segment", take(*(f"reward/{segment}/mean" for segment in SEGMENTS))),
        line("Reward beside canary", canary),
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


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
