"""Edits of the tiny world: instructions in its words, what they make of a scene, and an exact checker.

    recolor  draw the red circle blue        move  draw the red circle left
    remove   draw not the red circle         add   draw also a red circle

Every instruction has five words. A policy that copies what stays finds it at one distance then, as it does in a
redraw, where the reflection takes a fixed room.

`python -m rlpipe.world.edits --out DIR` writes prompt files, source images and supervised pairs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rlpipe.world.detection import Detection, detect
from rlpipe.world.prompts import counted, with_article
from rlpipe.world.render import render
from rlpipe.world.scenes import CENTERS, COLORS, GAP, GRID, RADIUS, SHAPES, Box, Scene, SceneObject, layouts

KINDS = ("recolor", "move", "remove", "add")
TEMPLATES = {
    "recolor": "draw the {name} {to}",
    "move": "draw the {name} {to}",
    "remove": "draw not the {name}",
    "add": "draw also {article} {name}",
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
SPLITS = ("train", "test", "all")
LEAST_MOVE = 8
"""Pixels along the named direction from which on an object counts as moved: one VQ block."""
TOLERANCE = GRID
"""A centre that is off by less than this (pixels, per axis) has not moved: the smallest move of a scene is one grid
step, and a round trip through the VQ tokenizer stays below it."""
SIZE_TOLERANCE = 8
"""The same for width and height: one VQ block that is drawn wrong at an object's edge."""

_HELD_OUT_ONE_IN = 5
_SPLIT_SALT = 311


@dataclass(frozen=True, slots=True)
class Edit:
    """One instruction. `to` is the new colour, the direction, or None.

    >>> Edit("recolor", "red", "circle", "blue").text
    'draw the red circle blue'
    """

    kind: str
    color: str
    shape: str
    to: str | None = None

    def __post_init__(self) -> None:
        allowed = {"recolor": tuple(COLORS), "move": tuple(DIRECTIONS)}.get(self.kind, (None,))
        for name, value, choices in (
            ("kind", self.kind, KINDS),
            ("color", self.color, tuple(COLORS)),
            ("shape", self.shape, SHAPES),
            ("to", self.to, allowed),
        ):
            if value not in choices:
                raise ValueError(f"edit.{name}: {value!r} is none of {', '.join(map(str, choices))}")
        if self.to == self.color:
            raise ValueError(f"edit.to: {self.to!r} is the colour that it has already; give another")

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def text(self) -> str:
        article = with_article(self.color, self.shape).split()[0]
        return TEMPLATES[self.kind].format(name=self.name, to=self.to, article=article)

    @property
    def metadata(self) -> dict[str, Any]:
        return {"tag": self.kind, "edit": asdict(self)}


def edit_from_metadata(metadata: Mapping[str, Any]) -> Edit:
    """The inverse of `Edit.metadata`; other keys are ignored. Raises ValueError naming what is wrong."""
    row = metadata.get("edit")
    if not isinstance(row, Mapping) or set(row) - {"to"} != {"kind", "color", "shape"}:
        raise ValueError(f"metadata.edit: {row!r}; give an object with kind, color, shape and to")
    return Edit(**row)


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction, the scene it is about, and one scene that realises it with nothing else changed."""

    edit: Edit
    source: Scene
    target: Scene


@cache
def all_edits(kind: str) -> tuple[Edit, ...]:
    """Every instruction of one kind, in a fixed order."""
    looks = itertools.product(COLORS, SHAPES)
    if kind == "recolor":
        return tuple(Edit(kind, color, shape, to) for color, shape in looks for to in COLORS if to != color)
    if kind == "move":
        return tuple(Edit(kind, color, shape, to) for color, shape in looks for to in DIRECTIONS)
    return tuple(Edit(kind, color, shape) for color, shape in looks)


def is_held_out(edit: Edit) -> bool:
    """Whether the instruction belongs to the test split: about 1 in 5, by a hash that never changes."""
    return zlib.crc32(f"{_SPLIT_SALT}:{edit.text}".encode()) % _HELD_OUT_ONE_IN == 0


@cache
def split_edits(split: str, kind: str) -> tuple[Edit, ...]:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return tuple(e for e in all_edits(kind) if split == "all" or is_held_out(e) == (split == "test"))


def sample_task(rng: random.Random, split: str = "train", kind: str | None = None) -> Task:
    """A random task: the kind uniformly (unless given), then the instruction, then a scene that it fits.

    Two or three objects before or after the edit, no two alike, so that every instruction names one of them.
    """
    edit = rng.choice(split_edits(split, kind or rng.choice(KINDS)))
    while True:
        count = rng.randint(2, 3) - (edit.kind == "add")
        looks = {(rng.choice(list(COLORS)), rng.choice(SHAPES)) for _ in range(count)}
        looks -= {(edit.color, edit.shape), (edit.to, edit.shape)}
        if edit.kind != "add":
            looks = set(rng.sample(sorted(looks), min(len(looks), count - 1))) | {(edit.color, edit.shape)}
        if len(looks) != count:
            continue
        rows = layouts(count)
        places = rows[rng.randrange(len(rows))].tolist()
        source = tuple(SceneObject(*look, *place) for look, place in zip(sorted(looks), places, strict=True))
        target = apply_edit(rng, edit, source)
        if target is not None:
            return Task(edit, source, target)


def apply_edit(rng: random.Random, edit: Edit, scene: Scene) -> Scene | None:
    """The scene after the edit; None where it does not fit: nothing to edit, or no free place."""
    if edit.kind == "add":
        cells = _free_cells(scene, [(x, y) for x in CENTERS for y in CENTERS])
        return (*scene, SceneObject(edit.color, edit.shape, *rng.choice(cells))) if cells else None
    index = next((i for i, o in enumerate(scene) if (o.color, o.shape) == (edit.color, edit.shape)), None)
    if index is None:
        return None
    subject, others = scene[index], scene[:index] + scene[index + 1 :]
    if edit.kind == "remove":
        return others
    if edit.kind == "recolor":
        changed = replace(subject, color=edit.to)
    else:
        dx, dy = DIRECTIONS[edit.to]
        steps = range(LEAST_MOVE, CENTERS[-1] - CENTERS[0] + 1, GRID)
        cells = [(subject.x + dx * step, subject.y + dy * step) for step in steps]
        cells = _free_cells(others, [cell for cell in cells if set(cell) <= set(CENTERS)])
        if not cells:
            return None
        x, y = rng.choice(cells)
        changed = replace(subject, x=x, y=y)
    return scene[:index] + (changed,) + scene[index + 1 :]


def _free_cells(scene: Scene, cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(x, y) for x, y in cells if all(max(abs(o.x - x), abs(o.y - y)) >= 2 * RADIUS + GAP for o in scene)]


@dataclass(frozen=True, slots=True)
class EditVerdict:
    """The judgement of one edited image, with a reason for each half.

    following:  the instruction is realised.
    preserving: every other object has its colour, shape and box, and nothing else appeared.
    """

    following: bool
    preserving: bool
    following_reason: str
    preserving_reason: str


def check_edit(metadata: Mapping[str, Any], source: np.ndarray, image: np.ndarray) -> EditVerdict:
    """Judge an edited image against its source, both uint8 [48, 48, 3], by the prompt's metadata.

    Raises ValueError where the source does not show what the instruction is about.
    """
    return check_edited(edit_from_metadata(metadata), detect(source), detect(image))


def check_edited(edit: Edit, source: Sequence[Detection], edited: Sequence[Detection]) -> EditVerdict:
    """`check_edit` for images whose objects are known already."""
    subject = next((d for d in source if _looks(d, edit.color, edit.shape)), None)
    if (subject is None) != (edit.kind == "add"):
        raise ValueError(f"edit: {edit.text!r} on a source image {'with' if subject else 'without'} a {edit.name}")
    rest = list(edited)
    missing = []
    for other in (d for d in source if d is not subject):
        kept = next((d for d in rest if _looks(d, other.color, other.shape) and _same_place(d.box, other.box)), None)
        if kept is None:
            missing.append(other)
        else:
            rest.remove(kept)
    following, complaint = _following(edit, subject, rest)
    others = [d for d in source if d is not subject]
    preserving, difference = _preserving(others, missing, _strangers(edit, subject, rest))
    return EditVerdict(following, preserving, complaint, difference)


def _looks(detection: Detection, color: str, shape: str) -> bool:
    return detection.color == color and detection.shape == shape


def _same_place(a: Box, b: Box) -> bool:
    centre = max(abs(a[0] - b[0]), abs(a[1] - b[1])) < TOLERANCE
    return centre and max(abs(a[2] - b[2]), abs(a[3] - b[3])) < SIZE_TOLERANCE


def _inside(a: Box, b: Box) -> bool:
    """Whether the centre of `a` lies in `b`."""
    return abs(a[0] - b[0]) <= b[2] / 2 and abs(a[1] - b[1]) <= b[3] / 2


def _name(detection: Detection) -> str:
    return f"{detection.color} {detection.shape}"


def _is(detection: Detection) -> str:
    return with_article(detection.color, detection.shape) if detection.shape else "one shape unclear"


def _following(edit: Edit, subject: Detection | None, rest: Sequence[Detection]) -> tuple[bool, str]:
    """Whether the instruction is realised, and the reason; `rest` are the detections that are no kept object."""
    alike = [d for d in rest if _looks(d, edit.color, edit.shape)]
    here = next((d for d in rest if subject is not None and _inside(d.box, subject.box)), None)
    if edit.kind == "recolor":
        if here is not None and _looks(here, edit.to, edit.shape) and _same_place(here.box, subject.box):
            return True, f"Yes, the {edit.shape} is {edit.to}."
        return False, f"No, there is {_is(here) if here else f'no {edit.shape}'}."
    if edit.kind == "remove":
        left = here or next(iter(alike), None)
        return (False, f"No, there is {_is(left)}.") if left else (True, f"Yes, there is no {edit.name}.")
    if len(alike) != 1:
        found = f"are {counted(len(alike), edit.color, edit.shape)}" if alike else f"is no {edit.name}"
        return False, f"No, there {found}."
    if edit.kind == "add":
        return True, f"Yes, there is {with_article(edit.color, edit.shape)}."
    dx, dy = DIRECTIONS[edit.to]
    x, y = alike[0].box[0] - subject.box[0], alike[0].box[1] - subject.box[1]
    # A moved blob's box wobbles by a pixel through the VQ tokenizer, on either side.
    moved = x * dx + y * dy > LEAST_MOVE - TOLERANCE / 2 and abs(x * dy) + abs(y * dx) < TOLERANCE
    return moved, f"Yes, the {edit.name} is {edit.to}." if moved else f"No, the {edit.name} is not {edit.to}."


def _strangers(edit: Edit, subject: Detection | None, rest: Sequence[Detection]) -> list[Detection]:
    """What appeared besides the kept objects and the one object that the edit is about, well drawn or not."""
    if edit.kind in ("recolor", "remove"):
        own = next((d for d in rest if _inside(d.box, subject.box)), None)
    else:
        own = min(rest, key=lambda d: not _looks(d, edit.color, edit.shape), default=None)
    return [d for d in rest if d is not own]


def _preserving(
    others: Sequence[Detection], missing: Sequence[Detection], strangers: Sequence[Detection]
) -> tuple[bool, str]:
    if missing:
        lost = missing[0]
        here = next((d for d in strangers if _inside(d.box, lost.box)), None)
        if here is not None and here.shape == lost.shape and here.color != lost.color:
            return False, f"No, the {lost.shape} is {here.color}, not {lost.color}."
        if any(_looks(d, lost.color, lost.shape) for d in strangers):
            return False, f"No, the {_name(lost)} is not there."
        return False, f"No, there is no {_name(lost)}."
    if strangers:
        return False, f"No, there is also {_is(strangers[0])}."
    return True, f"Yes, there is {' and '.join(_is(d) for d in others)}." if others else "Yes, there is no new shape."


def write_edits(folder: str | Path, train: int = 1600, test: int = 480, pairs: int = 16_000, seed: int = 0) -> None:
    """Write prompts_train.jsonl, prompts_test.jsonl (rows {id, prompt, tag, source_image, metadata}) and sft.jsonl
    (rows {image1, image2, text}: source, target, instruction) with their PNGs; the kinds take turns."""
    folder = Path(folder)
    for number, (split, count) in enumerate((("train", train), ("test", test))):
        rng, rows = random.Random(f"{seed}/{number}"), []
        for i in range(count):
            task = sample_task(rng, split, KINDS[i % len(KINDS)])
            image = _save(folder, f"sources/{split}-{i:05d}.png", task.source)
            row = {"id": f"{split}-{task.edit.kind}-{i:05d}", "prompt": task.edit.text, "source_image": image}
            rows.append(row | {"tag": task.edit.kind, "metadata": {"edit": asdict(task.edit)}})
        _write(folder / f"prompts_{split}.jsonl", rows)
    rng, rows = random.Random(f"{seed}/2"), []
    for i in range(pairs):
        task = sample_task(rng, "train", KINDS[i % len(KINDS)])
        names = [f"pairs/{i // 1000:02d}/{i:05d}-{part}.png" for part in (1, 2)]
        images = [_save(folder, n, s) for n, s in zip(names, (task.source, task.target), strict=True)]
        rows.append({"image1": images[0], "image2": images[1], "text": task.edit.text})
    _write(folder / "sft.jsonl", rows)


def _save(folder: Path, name: str, scene: Scene) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene)).save(path)
    return name


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Write an edit data set from the command line."""
    parser = argparse.ArgumentParser(description="Write the tiny world's edit prompts, images and supervised pairs.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--train", type=int, default=1600, help="training prompts")
    parser.add_argument("--test", type=int, default=480, help="prompts of held-out instructions")
    parser.add_argument("--pairs", type=int, default=16_000, help="supervised pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_edits(args.out, args.train, args.test, args.pairs, args.seed)
    print(f"wrote {args.train} + {args.test} prompts and {args.pairs} pairs to {args.out}")


if __name__ == "__main__":
    main()
