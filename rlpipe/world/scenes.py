"""Scenes of the tiny world: what is where, sampled right, nearly right, or put right.

A scene is a tuple of objects on a 4-pixel grid. All objects have one size and keep a clear gap, so every
scene of this module can be read back from its rendering without doubt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rlpipe.world.prompts import PromptSpec

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 180),
    "orange": (245, 130, 30),
}
BACKGROUND = (240, 240, 240)
RELATIONS = ("left of", "right of", "above", "below")
IMAGE_SIZE = 48
RADIUS = 8
GRID = 4
GAP = 4
"""Least free distance in pixels between two objects."""
CENTERS = tuple(range(12, 37, GRID))
"""Coordinates a centre may have, in pixels; the margin to the image edge is at least 4."""
MAX_OBJECTS = 4
"""No layout holds more objects of this size."""

_CLEAR_SIDE_OFFSET = 12
_MAX_CORRECTED = 8

Box = tuple[float, float, float, float]
"""(centre x, centre y, width, height) in pixels; y grows downwards."""
Wanted = tuple[str | None, str]
"""(colour or None for any, shape)."""


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One shape; `x` and `y` are the centre in pixels, y growing downwards.

    >>> SceneObject("red", "circle", x=12, y=36)
    """

    color: str
    shape: str
    x: int
    y: int

    @property
    def box(self) -> Box:
        return (float(self.x), float(self.y), 2.0 * RADIUS, 2.0 * RADIUS)


Scene = tuple[SceneObject, ...]


def relations_between(a: Box, b: Box, threshold: float = 0.1) -> frozenset[str]:
    """All relations of box `a` to box `b` by GenEval's rule; up to two hold on a diagonal.

    The offset of the centres shrinks by `threshold` of the summed sizes per axis; an axis counts when more
    than half of the offset's length remains along it.
    """
    offset_x, offset_y = a[0] - b[0], a[1] - b[1]
    length = math.hypot(offset_x, offset_y)
    if length == 0:
        return frozenset()
    dx = math.copysign(max(abs(offset_x) - threshold * (a[2] + b[2]), 0.0), offset_x) / length
    dy = math.copysign(max(abs(offset_y) - threshold * (a[3] + b[3]), 0.0), offset_y) / length
    held = zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return frozenset(name for name, holds in held if holds)


@cache
def layouts(num_objects: int) -> np.ndarray:
    """Every ordered choice of centres with clear gaps, int array [num_layouts, num_objects, 2] of (x, y)."""
    cells = np.array(list(itertools.product(CENTERS, CENTERS)))  # [C, 2]
    rows = np.zeros((1, 0, 2), dtype=int)
    for _ in range(num_objects):
        distance = np.abs(rows[:, None] - cells[None, :, None]).max(-1)  # [L, C, k]
        row, cell = np.nonzero((distance >= 2 * RADIUS + GAP).all(-1))
        rows = np.concatenate([rows[row], cells[cell][:, None]], axis=1)
    return rows


@cache
def related_layouts(num_objects: int, relation: str | None) -> np.ndarray:
    """The layouts whose first two centres hold `relation` clearly, and no other relation."""
    rows = layouts(num_objects)
    if relation is None:
        return rows
    offset = rows[:, 0] - rows[:, 1]
    axis = 0 if relation in ("left of", "right of") else 1
    sign = -1 if relation in ("left of", "above") else 1
    main, side = sign * offset[:, axis], np.abs(offset[:, 1 - axis])
    return rows[(main >= 2 * RADIUS + GAP) & (side <= _CLEAR_SIDE_OFFSET)]


def satisfies(scene: Scene, spec: PromptSpec) -> bool:
    """Whether the scene shows exactly what the prompt asks for."""
    if len(scene) != len(spec.objects):
        return False
    for order in itertools.permutations(scene):
        if all(_edits(want, have) == 0 for want, have in zip(spec.objects, order, strict=True)):
            if spec.relation is None or spec.relation in relations_between(order[0].box, order[1].box):
                return True
    return False


def sample_scene(rng: random.Random, spec: PromptSpec) -> Scene:
    """A random scene that satisfies the prompt with a clear margin."""
    return _arrange(rng, _choose_colors(rng, spec), spec.relation)


def near_miss(rng: random.Random, spec: PromptSpec) -> Scene:
    """A random scene that is wrong for the prompt in exactly one way, each way being equally likely."""
    wanted, relation = _choose_colors(rng, spec), spec.relation
    ways = ["shape"]
    if len(wanted) < MAX_OBJECTS:
        ways.append("more")
    if len(wanted) > 1:
        ways.append("fewer")
    if spec.objects[0][0] is not None:
        ways.append("color")
        if wanted[0][0] != wanted[-1][0]:
            ways.append("swap")
    if relation is not None:
        ways.append("relation")
    way = rng.choice(ways)
    index = rng.randrange(len(wanted))
    color, shape = wanted[index]
    if way == "shape":
        wanted[index] = (color, _another(rng, SHAPES, shape))
    elif way == "more":
        stranger = (rng.choice(list(COLORS)), rng.choice(SHAPES))
        wanted.append(rng.choice([wanted[index], stranger]))
    elif way == "fewer":
        del wanted[index]
        relation = None
    elif way == "color":
        wanted[index] = (_another(rng, COLORS, color), shape)
    elif way == "swap":
        wanted = _swapped_colors(wanted)
    else:
        relation = _another(rng, RELATIONS, relation)
    return _arrange(rng, wanted, relation)


def near_miss_spec(rng: random.Random, spec: PromptSpec) -> PromptSpec:
    """A prompt of the same kind that a sampled scene of `spec` misses in exactly one way.

    It may fall on the other side of the train/test split; a caller who minds asks `is_held_out`.
    """
    ways = [variants for variants in _spec_variants(spec) if variants]
    return rng.choice(rng.choice(ways))


def correct_scene(rng: random.Random, scene: Scene, spec: PromptSpec) -> Scene:
    """The scene changed as little as possible so that it satisfies the prompt, objects in the prompt's order.

    Every object that can stay keeps its place, colour and shape. Of all ways to match required with present
    objects the one with the fewest edits wins. Two objects in a wrong relation swap places if that mends it;
    else as few objects as possible move. `rng` only picks what the prompt and the scene leave open.
    """
    kept = _cheapest_match(scene[:_MAX_CORRECTED], spec)
    common = next((have.color for have in kept if have is not None), None) if spec.tag == "counting" else None
    looks = [
        (color or (have.color if have is not None else common or rng.choice(list(COLORS))), shape)
        for (color, shape), have in zip(spec.objects, kept, strict=True)
    ]
    places = [(have.x, have.y) if have is not None else (-1, -1) for have in kept]
    rows = layouts(len(looks))
    if spec.relation is not None:
        first, second = kept
        if first is not None and second is not None:
            if spec.relation not in relations_between(first.box, second.box):
                if spec.relation in relations_between(second.box, first.box):
                    places.reverse()
                else:
                    rows = related_layouts(2, spec.relation)
            if not (rows == places).all((1, 2)).any():
                rows = related_layouts(2, spec.relation)
        else:
            rows = related_layouts(2, spec.relation)
    num_kept = (rows == np.array(places)).all(-1).sum(-1)  # [L]
    best = np.flatnonzero(num_kept == num_kept.max())
    row = rows[best[rng.randrange(len(best))]]
    return _objects(looks, row)


def _edits(want: Wanted, have: SceneObject) -> int:
    color, shape = want
    return int(shape != have.shape) + int(color is not None and color != have.color)


def _cheapest_match(scene: Scene, spec: PromptSpec) -> tuple[SceneObject | None, ...]:
    """For each required object the present object to keep, None where one must be added."""
    num_wanted = len(spec.objects)
    slots: list[SceneObject | None] = [*scene, *[None] * (num_wanted - len(scene))]

    def cost(match: tuple[SceneObject | None, ...]) -> int:
        total = sum(_edits(w, h) for w, h in zip(spec.objects, match, strict=True) if h is not None)
        have = [h for h in match if h is not None]
        pairs = itertools.combinations(have, 2)
        total += sum(max(abs(a.x - b.x), abs(a.y - b.y)) < 2 * RADIUS + GAP for a, b in pairs)
        if spec.relation is not None and len(have) == 2:
            total += spec.relation not in relations_between(have[0].box, have[1].box)
        return total

    return min(itertools.permutations(slots, num_wanted), key=cost)


def _choose_colors(rng: random.Random, spec: PromptSpec) -> list[tuple[str, str]]:
    """(colour, shape) per object, free colours drawn; things counted together share one colour."""
    common = rng.choice(list(COLORS))
    free = (lambda: common) if spec.tag == "counting" else (lambda: rng.choice(list(COLORS)))
    return [(color or free(), shape) for color, shape in spec.objects]


def _arrange(rng: random.Random, looks: list[tuple[str, str]], relation: str | None) -> Scene:
    rows = related_layouts(len(looks), relation)
    return _objects(looks, rows[rng.randrange(len(rows))])


def _objects(looks: list[tuple[str, str]], places: np.ndarray) -> Scene:
    return tuple(
        SceneObject(color, shape, int(x), int(y)) for (color, shape), (x, y) in zip(looks, places, strict=True)
    )


def _another(rng: random.Random, choices, current: str) -> str:
    return rng.choice([choice for choice in choices if choice != current])


def _swapped_colors(objects):
    (color_a, shape_a), (color_b, shape_b) = objects
    return [(color_b, shape_a), (color_a, shape_b)]


def _spec_variants(spec: PromptSpec) -> Iterator[list[PromptSpec]]:
    """The legal prompts one change away, one list per way to change; some lists may be empty."""
    objects, counting = spec.objects, spec.tag == "counting"

    def put(index: int, new: Wanted) -> PromptSpec:
        if counting:
            return dataclasses.replace(spec, objects=(new,) * len(objects))
        return dataclasses.replace(spec, objects=(*objects[:index], new, *objects[index + 1 :]))

    indices = range(1 if counting else len(objects))
    used_shapes = {shape for _, shape in objects}
    yield [put(i, (objects[i][0], s)) for i in indices for s in SHAPES if s not in used_shapes]
    if objects[0][0] is not None:
        taken = {color for color, _ in objects}
        if spec.tag == "position":
            yield [put(i, (c, objects[i][1])) for i in indices for c in COLORS if c != objects[i][0]]
        else:
            yield [put(i, (c, objects[i][1])) for i in indices for c in COLORS if c not in taken]
        if len(taken) == 2:
            yield [dataclasses.replace(spec, objects=tuple(_swapped_colors(objects)))]
    if counting:
        counts = (n for n in range(2, MAX_OBJECTS + 1) if n != len(objects))
        yield [dataclasses.replace(spec, objects=objects[:1] * n) for n in counts]
    if spec.relation is not None:
        yield [dataclasses.replace(spec, relation=r) for r in RELATIONS if r != spec.relation]
