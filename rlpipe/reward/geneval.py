"""GenEval's rules: does what a detector found in an image fulfil the prompt's `include` and `exclude`?

The rules are those of the official evaluator, on plain detections, without its detector: at least `count` objects of
a class (only the most confident `count` of them are looked at further), all of the asked colour, each in the asked
relation to each object of the target entry; `exclude` is the only upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

_LEAST_OFFSET = 1e-3
"""Pixels; below it on both axes two objects are in no relation (official)."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: its class, the detector's confidence in [0, 1], its box (x1, y1, x2, y2) in pixels, y downwards.

    color: name of its colour; None where nobody asked for it.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Which detections count; the defaults are official, and calibrated to the official detector.

    score, counting: confidence that an object must exceed; `counting` for prompts of that tag.
    max_objects:     most confident objects of a class that are kept.
    margin:          share of the summed sizes that centres must be apart, per axis, to be in a relation.
    """

    score: float = 0.3
    counting: float = 0.9
    max_objects: int = 16
    margin: float = 0.1


@dataclass(frozen=True, slots=True)
class Clause:
    """One demand of a prompt: kind "count", "color", "position" or "exclude", and the share of it that is fulfilled.

    share:  in [0, 1]; 1 exactly if the official rule holds.
    reason: what is wrong, in words; empty if nothing is.
    """

    kind: str
    share: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the clauses of a prompt say together.

    verdict = judge(prompt.metadata, detections)
    verdict.correct, verdict.reason                    # False, "found 1 dog, not 2"
    verdict.graded                                     # 0.5
    """

    clauses: tuple[Clause, ...]

    @property
    def correct(self) -> bool:
        """The official verdict."""
        return all(clause.share == 1.0 for clause in self.clauses)

    @property
    def reason(self) -> str:
        """What is wrong; empty if nothing is."""
        return "; ".join(clause.reason for clause in self.clauses if clause.reason)

    @property
    def graded(self) -> float:
        """In [0, 1], and 1 exactly if `correct`: the mean of the clauses of `include`, times the share of the objects
        found of the excluded classes that `exclude` leaves free. A product, so that an empty image earns nothing."""
        asked = [clause.share for clause in self.clauses if clause.kind != "exclude"]
        free = [clause.share for clause in self.clauses if clause.kind == "exclude"]
        return sum(asked) / len(asked) * math.prod(free)

    def shares(self) -> dict[str, float]:
        """Mean share of each kind of clause that the prompt has."""
        kinds = dict.fromkeys(clause.kind for clause in self.clauses)
        by_kind = {kind: [c.share for c in self.clauses if c.kind == kind] for kind in kinds}
        return {kind: sum(shares) / len(shares) for kind, shares in by_kind.items()}


def judge(
    metadata: Mapping[str, Any], detections: Sequence[Detection], thresholds: Thresholds | None = None
) -> Verdict:
    """The verdict on one image from all its detections; `metadata` must have passed `metadata_problems`.

    For each entry of `include`, with n = its `count` and the n most confident objects of its class:
        count:    min(found, n) / n.
        color:    share of the n that are there and have the colour.
        position: share of the n x m pairs with the m objects of the target that are there and in the relation.
    All entries of `exclude` are one clause: of the objects found of their classes, the share within the bounds
    (at most `count` - 1 of each).
    """
    thresholds = thresholds or Thresholds()
    found = confident(metadata, detections, thresholds)
    clauses: list[Clause] = []
    groups: list[list[Detection]] = []
    for entry in metadata["include"]:
        label, count = entry["class"], entry["count"]
        present = found.get(label, [])
        chosen = present[:count]
        groups.append(chosen)
        lacking = "" if len(chosen) == count else f"found {len(chosen)} {label}, not {count}"
        clauses.append(Clause("count", len(chosen) / count, lacking))
        if "color" in entry:
            clauses.append(_color_clause(entry, chosen))
        if "position" in entry:
            relation, index = entry["position"]
            target = metadata["include"][index]
            clauses.append(_position_clause(entry, chosen, relation, target, groups[index], thresholds.margin))
    if metadata.get("exclude"):
        clauses.append(_exclude_clause(metadata["exclude"], found))
    return Verdict(tuple(clauses))


def confident(
    metadata: Mapping[str, Any], detections: Sequence[Detection], thresholds: Thresholds
) -> dict[str, list[Detection]]:
    """The detections that count, by class, most confident first."""
    least = thresholds.counting if metadata.get("tag") == "counting" else thresholds.score
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > least:
            found.setdefault(detection.label, []).append(detection)
    return {label: objects[: thresholds.max_objects] for label, objects in found.items()}


def relations_between(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float], margin: float = 0.1
) -> frozenset[str]:
    """All relations of box `a` to box `b`, both (x1, y1, x2, y2); up to two hold on a diagonal.

    Per axis, the offset of the centres shrinks by `margin` of the summed sizes; what remains is divided by the length
    of the whole offset, and a relation holds above one half.
    """
    offsets = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    clear = [math.copysign(max(abs(o) - margin * s, 0.0), o) for o, s in zip(offsets, sizes, strict=True)]
    if all(abs(value) < _LEAST_OFFSET for value in clear):
        return frozenset()
    dx, dy = (value / math.hypot(*offsets) for value in clear)
    held = zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return frozenset(name for name, holds in held if holds)


def metadata_problems(
    metadata: Mapping[str, Any], labels: Sequence[str] | None = None, colors: Sequence[str] = COLORS
) -> list[str]:
    """One line for each thing in a prompt's metadata that the rules cannot be applied to; empty if there is none.

    labels, colors: what the detector can name; None allows any class.
    """
    include, exclude = metadata.get("include"), metadata.get("exclude") or []
    if not isinstance(include, list | tuple) or not include:
        return ["no include, GenEval's list of what must be there"]
    if not isinstance(exclude, list | tuple):
        return [f"exclude: {exclude!r}; give a list of objects"]
    strange = [
        f"{where}[{i}]: {entry!r}; give an object such as {{'class': 'dog', 'count': 1}}"
        for where, entries in (("include", include), ("exclude", exclude))
        for i, entry in enumerate(entries)
        if not isinstance(entry, Mapping)
    ]
    if strange:
        return strange
    problems = []
    for where, entries in (("include", include), ("exclude", exclude)):
        for i, entry in enumerate(entries):
            problems += [f"{where}[{i}].{line}" for line in _entry_problems(entry, labels)]
    for i, entry in enumerate(include):
        if "color" in entry and entry["color"] not in colors:
            known = f"is none of {', '.join(colors)}" if colors else "and the detector names no colours"
            problems.append(f"include[{i}].color: {entry['color']!r} {known}")
        if "position" in entry and not _is_position(entry["position"], i):
            problems.append(
                f"include[{i}].position: {entry['position']!r}; give [relation, index of an earlier entry], with a "
                f"relation of {', '.join(RELATIONS)}"
            )
    return problems


def _entry_problems(entry: Mapping[str, Any], labels: Sequence[str] | None) -> list[str]:
    problems = []
    label, count = entry.get("class"), entry.get("count")
    if not isinstance(label, str) or (labels is not None and label not in labels):
        problems.append(f"class: {label!r} is nothing that the detector can find")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        problems.append(f"count: {count!r}; give a whole number from 1")
    return problems


def _is_position(position: Any, index: int) -> bool:
    if not isinstance(position, list | tuple) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and isinstance(target, int) and 0 <= target < index


def _color_clause(entry: Mapping[str, Any], chosen: Sequence[Detection]) -> Clause:
    others = sorted({str(d.color) for d in chosen if d.color != entry["color"]})
    right = sum(d.color == entry["color"] for d in chosen)
    reason = f"{entry['class']} is {' and '.join(others)}, not {entry['color']}" if others else ""
    return Clause("color", right / entry["count"], reason)


def _position_clause(
    entry: Mapping[str, Any],
    chosen: Sequence[Detection],
    relation: str,
    target: Mapping[str, Any],
    targets: Sequence[Detection],
    margin: float,
) -> Clause:
    held = [relation in relations_between(a.box, b.box, margin) for a in chosen for b in targets]
    reason = "" if all(held) else f"{entry['class']} is not {relation} {target['class']}"
    return Clause("position", sum(held) / (entry["count"] * target["count"]), reason)


def _exclude_clause(exclude: Sequence[Mapping[str, Any]], found: Mapping[str, Sequence[Detection]]) -> Clause:
    bounds: dict[str, int] = {}
    for entry in exclude:
        bounds[entry["class"]] = min(entry["count"] - 1, bounds.get(entry["class"], entry["count"] - 1))
    numbers = {label: len(found.get(label, ())) for label in bounds}
    total = sum(numbers.values())
    free = sum(min(number, bounds[label]) for label, number in numbers.items())
    excess = [
        f"found {number} {label}, at most {bounds[label]} allowed"
        for label, number in numbers.items()
        if number > bounds[label]
    ]
    return Clause("exclude", free / total if total else 1.0, ", ".join(excess))
