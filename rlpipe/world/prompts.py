"""Prompts of the tiny world in GenEval's six kinds and in GenEval's metadata schema.

`python -m rlpipe.world.prompts --split train --out FILE --per-tag N --seed S` writes a prompt file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlpipe.world.scenes import COLORS, MAX_OBJECTS, RELATIONS, SHAPES, Wanted

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "test", "all")
PROMPT_TEMPLATE = "a photo of {what}"
ARTICLES = ("a", "an")
NUMBERS = ("no", "one", "two", "three", "four", "five")
MANY = "many"
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}

_HELD_OUT_ONE_IN = 5
_SPLIT_SALT = 205


def number_word(count: int) -> str:
    """ "no", "one", ... "five", then "many"."""
    return NUMBERS[count] if count < len(NUMBERS) else MANY


def counted(count: int, color: str | None, shape: str) -> str:
    """ "one red circle", "two crosses"."""
    words = (number_word(count), color, shape if count == 1 else PLURALS[shape])
    return " ".join(word for word in words if word)


def with_article(color: str | None, shape: str) -> str:
    """ "a red circle", "an orange cross"."""
    name = f"{color} {shape}" if color else shape
    return f"{ARTICLES[name[0] in 'aeiou']} {name}"


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """What a prompt asks for: the objects in reading order, and the relation of the first to the second.

    >>> PromptSpec("position", (("red", "circle"), ("blue", "square")), "above").text
    'a photo of a red circle above a blue square'
    """

    tag: str
    objects: tuple[Wanted, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ValueError(f"PromptSpec: {problem}")

    @property
    def text(self) -> str:
        if self.tag == "counting":
            what = counted(len(self.objects), *self.objects[0])
        else:
            what = f" {self.relation or 'and'} ".join(with_article(*wanted) for wanted in self.objects)
        return PROMPT_TEMPLATE.format(what=what)

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval's schema; `exclude` forbids every object that the prompt does not name.

        As in GenEval the object that carries `position` comes after its target, so the order of a position
        prompt is reversed.
        """
        counts = Counter(shape for _, shape in self.objects)
        include: list[dict[str, Any]] = []
        for color, shape in dict.fromkeys(reversed(self.objects) if self.relation else self.objects):
            entry: dict[str, Any] = {"class": shape, "count": counts[shape]}
            include.append(entry | ({"color": color} if color else {}))
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        exclude = [{"class": shape, "count": counts[shape] + 1} for shape in SHAPES]
        return {"tag": self.tag, "include": include, "exclude": exclude, "prompt": self.text}


def spec_from_metadata(metadata: dict[str, Any]) -> PromptSpec:
    """The inverse of `PromptSpec.metadata`; other keys such as `id` are ignored.

    Raises ValueError naming the field and its value for anything `PromptSpec.metadata` cannot produce.
    """
    for field in ("tag", "include", "exclude", "prompt"):
        if field not in metadata:
            raise ValueError(f"metadata: field {field!r} is missing, got only {sorted(metadata)}")
    objects: list[Wanted] = []
    relation = None
    for index, entry in enumerate(metadata["include"]):
        where = f"metadata: include[{index}]"
        if not isinstance(entry, dict) or not {"class", "count"} <= set(entry):
            raise ValueError(f"{where} needs 'class' and 'count', got {entry!r}")
        if type(entry["count"]) is not int or not 1 <= entry["count"] <= MAX_OBJECTS:
            raise ValueError(f"{where}.count must be an integer in 1..{MAX_OBJECTS}, got {entry['count']!r}")
        objects += [(entry.get("color"), entry["class"])] * entry["count"]
        if "position" in entry:
            position = entry["position"]
            if index != 1 or not isinstance(position, list | tuple) or list(position[1:]) != [0]:
                raise ValueError(f"{where}.position must be [relation, 0] on include[1], got {position!r}")
            relation = position[0]
    if relation is not None:
        objects.reverse()
    try:
        spec = PromptSpec(metadata["tag"], tuple(objects), relation)
    except ValueError as error:
        raise ValueError(f"metadata: {error}") from None
    for field, value in spec.metadata.items():
        if metadata[field] != value:
            raise ValueError(f"metadata: {field} must be {value!r}, got {metadata[field]!r}")
    return spec


@cache
def all_specs(tag: str) -> tuple[PromptSpec, ...]:
    """Every prompt of one kind, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if tag == "single_object":
        return tuple(PromptSpec(tag, ((None, shape),)) for shape in SHAPES)
    if tag == "two_object":
        return tuple(PromptSpec(tag, ((None, a), (None, b))) for a, b in pairs)
    if tag == "counting":
        kinds = itertools.product((None, *COLORS), SHAPES, range(2, MAX_OBJECTS + 1))
        return tuple(PromptSpec(tag, ((color, shape),) * count) for color, shape, count in kinds)
    if tag == "colors":
        return tuple(PromptSpec(tag, ((color, shape),)) for color in COLORS for shape in SHAPES)
    if tag == "position":
        colors = list(itertools.product(COLORS, repeat=2))
        kinds = itertools.product(pairs, colors, RELATIONS)
        return tuple(PromptSpec(tag, ((c, a), (d, b)), rel) for (a, b), (c, d), rel in kinds)
    if tag == "color_attr":
        colors = list(itertools.permutations(COLORS, 2))
        return tuple(PromptSpec(tag, ((c, a), (d, b))) for a, b in pairs for c, d in colors)
    raise ValueError(f"tag must be one of {TAGS}, got {tag!r}")


@cache
def is_held_out(spec: PromptSpec) -> bool:
    """Whether the prompt belongs to the test split: about 1 in 5, by a hash that never changes.

    A prompt and the same request in the other order ("a above b", "b below a") share one side. Prompts for a
    single object are never held out: they are too few to learn the shapes without them.
    """
    if spec.tag == "single_object":
        return False
    text = spec.text
    if spec.tag in ("two_object", "position", "color_attr"):
        flipped = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
        mirror = PromptSpec(spec.tag, spec.objects[::-1], spec.relation and flipped[spec.relation])
        text = min(text, mirror.text)
    return zlib.crc32(f"{_SPLIT_SALT}:{text}".encode()) % _HELD_OUT_ONE_IN == 0


@cache
def split_specs(split: str, tag: str) -> tuple[PromptSpec, ...]:
    """The prompts of one kind in a split; the few single-object prompts serve both splits."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    specs = all_specs(tag)
    if split == "all" or tag == "single_object":
        return specs
    return tuple(spec for spec in specs if is_held_out(spec) == (split == "test"))


def sample_spec(rng: random.Random, split: str = "train", tag: str | None = None) -> PromptSpec:
    """A random prompt: the kind uniformly over the six (unless given), then uniformly within the kind."""
    return rng.choice(split_specs(split, tag or rng.choice(TAGS)))


def write_prompts(path: str | Path, split: str, counts: int | Mapping[str, int], seed: int) -> int:
    """Write a JSONL prompt file with rows {id, prompt, tag, include, exclude}; return the number of rows.

    `counts` is the number of rows of every kind, or of each by tag; small kinds repeat their prompts in turn under
    new ids. The kinds take turns, so that any first part of the file has all of them.
    """
    rng = random.Random(seed)
    columns = []
    for tag in TAGS:
        specs = list(split_specs(split, tag))
        rng.shuffle(specs)
        count = counts if isinstance(counts, int) else counts[tag]
        columns.append([(tag, i, specs[i % len(specs)].metadata) for i in range(count)])
    rows = [row for turn in itertools.zip_longest(*columns) for row in turn if row is not None]
    with open(path, "w", encoding="utf-8") as file:
        for tag, index, meta in rows:
            row = {"id": f"{split}-{tag}-{index:05d}", **meta}
            file.write(json.dumps(row) + "\n")
    return len(rows)


def _problem(spec: PromptSpec) -> str | None:
    """What makes a spec illegal for its kind, in words, or None."""
    tag, objects, relation = spec.tag, spec.objects, spec.relation
    if tag not in TAGS:
        return f"tag must be one of {TAGS}, got {tag!r}"
    for color, shape in objects:
        if shape not in SHAPES:
            return f"class must be one of {SHAPES}, got {shape!r}"
        if color is not None and color not in COLORS:
            return f"color must be one of {tuple(COLORS)}, got {color!r}"
    low, high = {"single_object": (1, 1), "colors": (1, 1), "counting": (2, MAX_OBJECTS)}.get(tag, (2, 2))
    if not low <= len(objects) <= high:
        return f"objects: {tag} needs {low} to {high}, got {objects!r}"
    if (relation in RELATIONS) != (tag == "position") or (relation is not None and tag != "position"):
        return f"relation: {tag} allows {RELATIONS if tag == 'position' else None}, got {relation!r}"
    num_colors = sum(color is not None for color, _ in objects)
    if tag in ("colors", "position", "color_attr") and num_colors < len(objects):
        return f"color: {tag} needs a colour for every object, got {objects!r}"
    if tag in ("single_object", "two_object") and num_colors:
        return f"color: {tag} takes none, got {objects!r}"
    if tag == "counting" and len(set(objects)) > 1:
        return f"objects: counting needs equal ones, got {objects!r}"
    if tag in ("two_object", "position", "color_attr") and objects[0][1] == objects[1][1]:
        return f"class: the two of {tag} must differ, got {objects!r}"
    if tag == "color_attr" and objects[0][0] == objects[1][0]:
        return f"color: the two of color_attr must differ, got {objects!r}"
    return None


def main() -> None:
    """Write a prompt file from the command line."""
    parser = argparse.ArgumentParser(description="Write a JSONL prompt file of the tiny world.")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-tag", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_rows = write_prompts(args.out, args.split, args.per_tag, args.seed)
    print(f"wrote {num_rows} prompts to {args.out}")


if __name__ == "__main__":
    main()
