"""The result table as a person reads it in a terminal: percent, plus or minus half the 95 % interval."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

NAMES = {"sft": "SFT", "rl": "RL"}
COLUMNS = {"without": "without", "with": "with introspection", "fresh": "fresh draw (control)"}
_PLAIN_WIDTH = 132


def print_table(summary: dict, console: Console | None = None) -> None:
    """Print summary.json's structure: the table, the verdict, repair and damage, then the kinds of prompt."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PLAIN_WIDTH, highlight=False)
    rows = summary["table"]
    console.print(
        f"Held-out accuracy by the exact checker, percent with 95 % intervals: {summary['prompts']} prompts, "
        f"guidance {summary['guidance']:g}"
    )
    console.print(_main_table(summary, rows))
    console.print(_rates_table(rows))
    console.print(_kinds_table(rows))
    for line in _notes(summary):
        console.print(line)


def results_table(title: str, *columns: str) -> Table:
    """An empty table: a first column of row names, then columns of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _main_table(summary: dict, rows: dict) -> Table:
    table = results_table("Accuracy", *COLUMNS.values(), "gain", "gain over fresh draw")
    for name, row in rows.items():
        cells = [_with_interval(row[column]["accuracy"], row[column]["ci95"]) for column in COLUMNS]
        gains = [_gain(row[key]) for key in ("gain", "gain_over_fresh")]
        table.add_row(NAMES[name], *cells, *gains)
    if "rl_gain" in summary:
        gain = summary["rl_gain"]
        table.add_row("RL - SFT", _gain(gain["without"]), _gain(gain["with"]), "", "", "")
    return table


def _rates_table(rows: dict) -> Table:
    columns = (
        "verdict",
        "balanced",
        "near miss, balanced",
        "said Yes",
        "repaired",
        "by fresh draw",
        "damaged",
    )
    table = results_table("Verdict, repair and damage", *columns, "judge agrees", "balanced")
    for name, row in rows.items():
        verdict, judge = row["verdict"], row["judge"]
        values = (
            verdict["accuracy"],
            verdict["balanced_accuracy"],
            verdict["near_miss_balanced_accuracy"],
            verdict["share_yes"],
            row["repaired"],
            row["repaired_by_fresh"],
            row["damaged"],
            judge["agreement"],
            judge["balanced"],
        )
        table.add_row(NAMES[name], *map(_percent, values))
    return table


def _kinds_table(rows: dict) -> Table:
    tags = list(next(iter(rows.values()))["without"]["by_tag"])
    table = results_table("By kind of prompt", *(tag.replace("_", " ") for tag in tags))
    for name, row in rows.items():
        for column in ("without", "with"):
            values = (_percent(row[column]["by_tag"].get(tag)) for tag in tags)
            table.add_row(f"{NAMES[name]} {column}", *values)
    return table


def _notes(summary: dict) -> list[str]:
    notes = []
    if "best_guidance" in summary:
        best = summary["best_guidance"]["sft"]
        line = f"SFT at its best guidance {best['guidance']:g}: {_percent(best['without'])} without, "
        line += f"{_percent(best['with'])} with introspection"
        if "rl_gain" in summary:
            line += f"; RL is {100 * summary['rl_gain']['with_over_best_sft']:+.1f} points over it"
        notes.append(line)
    notes.append("repaired: of the wrong first images. damaged: of the right ones. Gains are paired by prompt.")
    if summary["seconds"]:
        notes.append(f"{summary['seconds'] / 60:.1f} minutes in all")
    return notes


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _with_interval(share: float, interval: list[float]) -> str:
    return f"{100 * share:.1f} ± {50 * (interval[1] - interval[0]):.1f}"


def _gain(difference: dict) -> str:
    low, high = difference["ci95"]
    return f"{100 * difference['value']:+.1f} ± {50 * (high - low):.1f}"
