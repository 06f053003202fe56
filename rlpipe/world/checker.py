"""Judges an image against a prompt by GenEval's rules, with the reason in words."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlpipe.world.detection import Detection, detect, scene_from_detections
from rlpipe.world.prompts import counted, number_word, with_article
from rlpipe.world.scenes import SHAPES, relations_between

__all__ = ["REASONS", "Detection", "Verdict", "check", "check_detections", "detect", "scene_from_detections"]

REASONS = {
    "right_one": "Yes, there is {what}.",
    "right_many": "Yes, there are {what}.",
    "unclear_one": "No, one shape is unclear.",
    "unclear_many": "No, {number} shapes are unclear.",
    "missing": "No, there is no {name}.",
    "none_of_many": "No, there are {what}.",
    "count_one": "No, there is {what}, not {number}.",
    "count_many": "No, there are {what}, not {number}.",
    "color_the": "No, the {name} is {found}, not {color}.",
    "color_one": "No, one {name} is {found}, not {color}.",
    "color_many": "No, {what} are {found}, not {color}.",
    "position": "No, the {name} is {found} the {target}, not {side}.",
    "position_unclear": "No, the {name} is not {relation} the {target}.",
    "extra_one": "No, there is also {what}.",
    "extra_many": "No, there are also {what}.",
}
AND = "and"

_MAX_MATCHED = 6
_SHAPE_CREDIT = 0.6
_POSITION_CREDIT = 0.4
_MAX_WRONG_PARTIAL = 0.95


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one image; `partial` is 1 exactly when `correct`.

    >>> check(spec.metadata, render(sample_scene(rng, spec))).reason
    'Yes, there is a red circle above a blue square.'
    """

    correct: bool
    partial: float
    detections: tuple[Detection, ...]
    reason: str


def check(metadata: dict[str, Any], image: np.ndarray) -> Verdict:
    """Judge a uint8 image [48, 48, 3] by GenEval's `include` and `exclude`; an unclear blob is wrong."""
    return check_detections(metadata, detect(image))


def check_detections(metadata: dict[str, Any], detections: tuple[Detection, ...]) -> Verdict:
    """`check` for an image whose objects are known already."""
    include = metadata["include"]
    for entry in (*include, *metadata.get("exclude", ())):
        if entry["class"] not in SHAPES:
            raise ValueError(f"metadata: class must be one of {SHAPES}, got {entry['class']!r}")
    complaint, positions_hold = _first_complaint(metadata, detections)
    if complaint is None:
        return Verdict(True, 1.0, detections, _approval(include))
    partial = _match_share(include, detections)
    if any("position" in entry for entry in include):
        partial = (1 - _POSITION_CREDIT) * partial + _POSITION_CREDIT * positions_hold
    return Verdict(False, min(partial, _MAX_WRONG_PARTIAL), detections, complaint)


def _first_complaint(metadata: dict[str, Any], detections: tuple[Detection, ...]) -> tuple[str | None, bool]:
    """The first thing wrong, in words, or None; and whether every required relation holds.

    Unclear blobs come first, then each required object (number, colour, relation), then what is too much.
    """
    found: dict[str, list[Detection]] = {shape: [] for shape in SHAPES}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.shape is not None:
            found[detection.shape].append(detection)
    num_unclear = sum(detection.shape is None for detection in detections)
    limits: dict[str, int] = {}
    for entry in metadata.get("exclude", ()):
        limits[entry["class"]] = min(entry["count"], limits.get(entry["class"], entry["count"]))
    complaints: list[str] = []
    if num_unclear:
        key = "unclear_one" if num_unclear == 1 else "unclear_many"
        complaints.append(REASONS[key].format(number=number_word(num_unclear)))
    matched: list[list[Detection] | None] = []
    positions_hold = True
    for entry in metadata["include"]:
        shape, count = entry["class"], entry["count"]
        present = found[shape]
        chosen = present[:count]
        problem = None
        if not count <= len(present) < limits.get(shape, len(present) + 1):
            complaints.append(_count_complaint(entry, present))
        if len(present) < count:
            problem = ""
        elif "color" in entry and any(d.color != entry["color"] for d in chosen):
            problem = _color_complaint(entry, chosen)
        if "position" in entry:
            relation, index = entry["position"]
            target = matched[index]
            if problem is None and target is not None:
                problem = _position_complaint(relation, chosen, target)
            positions_hold &= problem is None and target is not None
        if problem:
            complaints.append(problem)
        matched.append(chosen if problem is None else None)
    required = {entry["class"] for entry in metadata["include"]}
    for shape, limit in limits.items():
        if shape not in required and len(found[shape]) >= limit:
            complaints.append(_extra_complaint(shape, found[shape]))
    return (complaints[0] if complaints else None), positions_hold


def _count_complaint(entry: dict[str, Any], present: list[Detection]) -> str:
    shape, count, color = entry["class"], entry["count"], entry.get("color")
    if not present:
        key = "missing" if count == 1 else "none_of_many"
        return REASONS[key].format(name=shape, what=counted(0, None, shape))
    same = color is not None and all(d.color == color for d in present)
    key = "count_one" if len(present) == 1 else "count_many"
    what = counted(len(present), color if same else None, shape)
    return REASONS[key].format(what=what, number=number_word(count))


def _color_complaint(entry: dict[str, Any], chosen: list[Detection]) -> str:
    shape, color = entry["class"], entry["color"]
    wrong = next(d.color for d in chosen if d.color != color)
    number = sum(d.color == wrong for d in chosen)
    key = "color_the" if len(chosen) == 1 else "color_one" if number == 1 else "color_many"
    return REASONS[key].format(name=shape, what=counted(number, None, shape), found=wrong, color=color)


def _position_complaint(relation: str, chosen: list[Detection], targets: list[Detection]) -> str | None:
    for subject, target in itertools.product(chosen, targets):
        actual = relations_between(subject.box, target.box)
        if relation not in actual:
            names = {"name": f"{subject.color} {subject.shape}", "target": f"{target.color} {target.shape}"}
            if not actual:
                return REASONS["position_unclear"].format(relation=relation, **names)
            side = relation.removesuffix(" of")
            return REASONS["position"].format(found=min(actual), side=side, **names)
    return None


def _extra_complaint(shape: str, present: list[Detection]) -> str:
    color = present[0].color
    number = sum(d.color == color for d in present)
    if number == 1:
        return REASONS["extra_one"].format(what=with_article(color, shape))
    return REASONS["extra_many"].format(what=counted(number, color, shape))


def _approval(include: list[dict[str, Any]]) -> str:
    if include[0]["count"] > 1:
        entry = include[0]
        return REASONS["right_many"].format(what=counted(entry["count"], entry.get("color"), entry["class"]))
    names = [with_article(entry.get("color"), entry["class"]) for entry in include]
    joint = f" {AND} "
    if len(include) == 2 and "position" in include[1]:
        names.reverse()
        joint = f" {include[1]['position'][0]} "
    return REASONS["right_one"].format(what=joint.join(names))


def _match_share(include: list[dict[str, Any]], detections: tuple[Detection, ...]) -> float:
    """Credit of the best match of required to detected objects, over the larger of their two numbers."""
    required = [(e.get("color"), e["class"]) for e in include for _ in range(e["count"])]
    best_first = sorted(detections, key=lambda d: -d.score)[:_MAX_MATCHED]
    num_matched = min(len(required), len(best_first))
    table = [[_credit(color, shape, d) for d in best_first] for color, shape in required]
    best = 0.0
    for rows in itertools.combinations(range(len(required)), num_matched):
        for columns in itertools.permutations(range(len(best_first)), num_matched):
            best = max(best, sum(table[row][column] for row, column in zip(rows, columns, strict=True)))
    return best / max(len(required), len(detections))


def _credit(color: str | None, shape: str, detection: Detection) -> float:
    if color is None:
        return float(detection.shape == shape)
    return _SHAPE_CREDIT * (detection.shape == shape) + (1 - _SHAPE_CREDIT) * (detection.color == color)
