"""Held-out edits before and after reinforcement: following, preserving and both, by the exact checker.

Pure functions from records to the structure of summary.json, and the table that a person reads. Shares lie in 0..1;
a share is the plain mean over the kinds of edit, its interval a 95 % bootstrap over prompts within each kind, and
differences are paired by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from rlpipe.evaluate.agreement import accuracy, balanced_accuracy
from rlpipe.evaluate.outcomes import Judge, Progress, row_seed
from rlpipe.evaluate.terminal import NAMES, results_table
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import edit
from rlpipe.types import Prompt, Sampling, ScoreRequest

PARTS = ("following", "preserving", "both")
RESAMPLES = 4000
_PLAIN_WIDTH = 120


class Checked(Protocol):
    """What a checker says of one edit (`rlpipe.world.edits.EditVerdict` is one)."""

    @property
    def following(self) -> bool: ...

    @property
    def preserving(self) -> bool: ...


Check = Callable[[Mapping[str, Any], np.ndarray, np.ndarray], Checked]
"""`check(metadata, source, edited)` with uint8 [H, W, 3] images."""


@dataclass(frozen=True, slots=True)
class EditOutcome:
    """What became of one held-out edit, by the exact checker; `*_score` are the learned judge's P(yes), if asked.

    EditOutcome("7", "recolor", following=True, preserving=False)
    """

    prompt_id: str
    tag: str
    following: bool
    preserving: bool
    following_score: float | None = None
    preserving_score: float | None = None

    @property
    def both(self) -> bool:
        return self.following and self.preserving


def evaluate_edits(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    sources: Sequence[np.ndarray],
    check: Check,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 200,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> list[EditOutcome]:
    """One outcome per prompt and source image (uint8 [H, W, 3]), in order; every prompt is drawn once.

    With `judge` every edited image gets the learned scores too. `progress(done, total)` is called after each batch.
    """
    outcomes: list[EditOutcome] = []
    for start in range(0, len(prompts), batch_size):
        rows, before = prompts[start : start + batch_size], sources[start : start + batch_size]
        samplings = [replace(sampling, seed=row_seed(seed, prompt.id, "edit")) for prompt in rows]
        rollouts = edit(decoder, rows, before, samplings, [prompt.id for prompt in rows])
        images = [rollout.images[0] for rollout in rollouts]
        scores = [{}] * len(rows)
        if judge is not None:
            columns = enumerate(zip(rows, images, before, strict=True))
            requests = [ScoreRequest(str(i), prompt, image, source) for i, (prompt, image, source) in columns]
            scores = [score.parts for score in judge(requests)]
        for prompt, image, source, parts in zip(rows, images, before, scores, strict=True):
            verdict = check(prompt.metadata, source, image)
            scored = (parts.get("following"), parts.get("preserving"))
            tag = prompt.metadata.get("tag", "edit")
            outcomes.append(EditOutcome(prompt.id, tag, bool(verdict.following), bool(verdict.preserving), *scored))
        if progress is not None:
            progress(len(outcomes), len(prompts))
    return outcomes


def summarise_edits(
    measured: Mapping[str, Sequence[EditOutcome]], guidance: float = 1.0, seconds: float = 0.0, seed: int = 0
) -> dict:
    """The structure of summary.json from the records of "sft", "rl", or both."""
    main = list(measured.values())[-1] if measured else []
    if not main:
        raise ValueError("edit table: no outcomes; evaluate.prompts gave no rows")
    summary = {
        "program": "edit",
        "edits": {name: _row(outcomes, seed) for name, outcomes in measured.items()},
        "guidance": guidance,
        "prompts": len(main),
        "prompts_by_tag": {tag: len(rows) for tag, rows in _by_tag(main).items()},
        "seconds": seconds,
    }
    if len(measured) == 2:
        before = {outcome.prompt_id: outcome for outcome in measured["sft"]}
        if set(before) != {outcome.prompt_id for outcome in main}:
            raise ValueError("edit table: sft and rl were measured on different prompts; measure both on the same")
        summary["rl_gain"] = {
            part: _cell(main, lambda o, p=part: float(getattr(o, p)) - getattr(before[o.prompt_id], p), seed)
            for part in PARTS
        }
    return summary


def _row(outcomes: Sequence[EditOutcome], seed: int) -> dict:
    row: dict[str, Any] = {part: _cell(outcomes, lambda o, p=part: float(getattr(o, p)), seed) for part in PARTS}
    row["judge"] = {}
    for part in ("following", "preserving"):
        scored = [(getattr(o, f"{part}_score"), getattr(o, part)) for o in outcomes]
        said = [score > 0.5 for score, _ in scored if score is not None]
        truth = [true for score, true in scored if score is not None]
        agreement = {"agreement": accuracy(said, truth), "balanced": balanced_accuracy(said, truth)}
        row["judge"][part] = agreement | {"images": len(said)}
    return row


def _cell(outcomes: Sequence[EditOutcome], value: Callable[[EditOutcome], float], seed: int) -> dict:
    """Mean over the kinds of edit, its 95 % interval, and the mean of every kind."""
    rng = np.random.default_rng(seed)
    kinds = {tag: np.array([value(o) for o in rows]) for tag, rows in _by_tag(outcomes).items()}
    drawn = [values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1) for values in kinds.values()]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    by_tag = {tag: float(values.mean()) for tag, values in kinds.items()}
    return {"value": float(np.mean(list(by_tag.values()))), "ci95": [float(low), float(high)], "by_tag": by_tag}


def _by_tag(outcomes: Sequence[EditOutcome]) -> dict[str, list[EditOutcome]]:
    groups: dict[str, list[EditOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.tag, []).append(outcome)
    return groups


def print_edit_table(summary: dict, console: Console | None = None) -> None:
    """Print the structure of `summarise_edits`: the table, then the kinds of edit and the learned judge."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_PLAIN_WIDTH, highlight=False)
    console.print(
        f"Held-out edits by the exact checker, percent with 95 % intervals: {summary['prompts']} prompts, "
        f"guidance {summary['guidance']:g}"
    )
    rows = summary["edits"]
    table = results_table("Edits", *PARTS)
    for name, row in rows.items():
        table.add_row(NAMES[name], *(_share(row[part]) for part in PARTS))
    if "rl_gain" in summary:
        table.add_row("RL - SFT", *(_share(summary["rl_gain"][part], "+") for part in PARTS))
    console.print(table)
    table = results_table("By kind of edit", *summary["prompts_by_tag"])
    for name, row in rows.items():
        for part in PARTS:
            kinds = (f"{100 * row[part]['by_tag'][tag]:.1f}" for tag in summary["prompts_by_tag"])
            table.add_row(f"{NAMES[name]} {part}", *kinds)
    console.print(table)
    for name, row in rows.items():
        for part, judge in row["judge"].items():
            if judge["balanced"] is not None:
                shares = f"{100 * judge['agreement']:.1f} %, balanced {100 * judge['balanced']:.1f} %"
                console.print(f"the judge agrees on {part} after {NAMES[name]}: {shares} of {judge['images']} images")
    if summary["seconds"]:
        console.print(f"{summary['seconds'] / 60:.1f} minutes in all")


def _share(cell: dict, sign: str = "") -> str:
    low, high = cell["ci95"]
    return f"{100 * cell['value']:{sign}.1f} ± {50 * (high - low):.1f}"
