"""From rows of scores.jsonl to cases of a calibration: what the judge said, and what is true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlpipe.data.prompts import read_jsonl
from rlpipe.data.scored import SCORES, ScoredError, load_rows, score_problems
from rlpipe.evaluate.calibration import Case
from rlpipe.paths import resolve_path
from rlpipe.schema import CalibrateSection, Config
from rlpipe.world.checker import check

Rows = list[tuple[str, Mapping[str, Any]]]


def read_scores(path: str | Path) -> Rows:
    """Rows of a scores.jsonl, each with where it stands. Raises ScoredError naming file and line of each bad row."""
    rows, problems = [], []
    for where, row in read_jsonl(resolve_path(path)):
        if isinstance(row, ValueError):
            problems.append(f"{where}: {row}")
        elif not isinstance(row, Mapping) or not isinstance(row.get("scores"), Mapping) or "image" not in row:
            problems.append(f"{where}: no image with scores; give a scores.jsonl of launch/score.py")
        else:
            rows.append((where, row))
    if problems or not rows:
        raise ScoredError(problems or [f"calibrate.scores: no rows in {path}"])
    return rows


def cases_of(rows: Rows, section: CalibrateSection) -> tuple[list[Case], dict[str, int]]:
    """Cases, and counts: of all rows, of those without a score of calibrate.scorer, of the others without a label.

    Raises ScoredError naming rows that were not scored by this scorer, or that cannot be labelled as asked.
    """
    name, _, part = section.scorer.partition("/")
    label = {"rows": _label, "checker": _checked}[section.labels]
    counts = {"rows": len(rows), "without_score": 0, "without_label": 0}
    cases, problems = [], []
    for where, row in rows:
        answer = row["scores"].get(name)
        if not isinstance(answer, Mapping):
            problems.append(f"{where}: no scores of {name!r}; there are {', '.join(row['scores'])}")
            continue
        parts = answer.get("parts") or {}
        value = parts.get(part) if part else answer.get("value")
        if value is None:
            counts["without_score"] += 1
            continue
        try:
            right = label(row, section)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        if right is None:
            counts["without_label"] += 1
        else:
            prompt, kind = row.get("prompt") or str(row.get("id")), (row.get("metadata") or {}).get("tag", "")
            cases.append(Case(value, right, prompt, kind, parts.get("mass")))
    if not cases and not problems:
        problems.append(f"calibrate: none of {len(rows)} rows has both a score of {name} and a label; see their errors")
    if problems:
        raise ScoredError(problems)
    return cases, counts


def _label(row: Mapping[str, Any], section: CalibrateSection) -> bool | None:
    label = row.get("label")
    if not isinstance(label, bool | int | float | None):
        raise ValueError(f"label is {label!r}; give true, false or a number")
    return label if isinstance(label, bool | None) else label >= section.positive_label


def _checked(row: Mapping[str, Any], section: CalibrateSection) -> bool:
    """What the tiny world's exact checker says of the row's image."""
    metadata = row.get("metadata") or {}
    if "include" not in metadata:
        raise ValueError("no metadata for the checker; give score.prompts, or calibrate.labels=rows")
    try:
        with Image.open(row["image"]) as image:
            return check(metadata, np.asarray(image.convert("RGB"))).correct
    except OSError as error:
        raise ValueError(f"image {row['image']} cannot be read: {error}") from error
    except KeyError as error:
        raise ValueError(f"an entry of metadata.include has no {error}; give GenEval's schema") from error


def calibration_problems(config: Config) -> Iterator[str]:
    """What keeps a judge from being held against labels, one line each."""
    section = config.calibrate
    names = [scorer.name for scorer in config.reward]
    if section.scores:
        path = resolve_path(section.scores)
        if not path.is_file():
            yield f"calibrate.scores: {path} is no file; give a {SCORES} of launch/score.py"
            return
        try:
            rows = [row for _, row in read_scores(path)]
        except ScoredError as error:
            yield from error.problems
            return
    else:
        problems = list(score_problems(config))
        yield from problems
        if section.scorer and section.scorer.partition("/")[0] not in names:
            yield f"calibrate.scorer: {section.scorer!r} is none of reward: {', '.join(names)}"
        if problems or not resolve_path(config.score.images).exists():
            return
        rows = [row.fields for row in load_rows(config.score)]
    if section.labels == "rows" and all(row.get("label") is None for row in rows):
        yield "calibrate.labels: 'rows', and no row has a label; add `label`, or set calibrate.labels=checker"
