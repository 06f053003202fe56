"""Finds coloured shapes in an image.

Images may come through a lossy image tokenizer, so colours are matched to the palette with tolerance and
shapes by overlap with templates. A blob that is no clear shape is reported as such.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from rlpipe.world.render import render
from rlpipe.world.scenes import BACKGROUND, CENTERS, COLORS, IMAGE_SIZE, SHAPES, Box, Scene, SceneObject

_COLOR_NAMES = tuple(COLORS)
_RAYS = np.array(list(COLORS.values()), dtype=np.float32) - np.float32(BACKGROUND)
"""From the background to each colour, [C, 3]."""
_OTHER = len(_COLOR_NAMES)
"""Label of pixels that stand out from the background but resemble no colour."""
_MAX_COLOR_DISTANCE = 90.0
"""Of a pixel from the mixtures of a colour with the background, in RGB levels."""
_MAX_BLOB_DISTANCE = 50.0
"""The same for the mean of a blob, which is less noisy than a pixel."""
_MIN_CONTRAST = 90.0
_MIN_AREA = 28
_MIN_OVERLAP = 0.72
_MAX_ASPECT = 1.67
_MIN_STRENGTH = 0.65
"""Least mean share of its colour in a blob; paler ones are unclear."""
_TEMPLATE_SIZE = 20
_TEMPLATE_REACH = 1.0
_HALO_REACH = 2


@dataclass(frozen=True, slots=True)
class Detection:
    """One blob: its shape is None when no template fits or when its colour is pale or off the palette.

    `color` is always of the palette, the nearest; `score` in [0, 1] is the overlap with the best template.
    """

    color: str
    shape: str | None
    box: Box
    score: float


def detect(image: np.ndarray) -> tuple[Detection, ...]:
    """All blobs of a uint8 image [48, 48, 3], top to bottom; boxes in pixels with the scene's coordinates."""
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [48, 48, 3], got {image.dtype} {list(image.shape)}")
    labels = _label_colors(image)
    blobs = [blob for blob in _connected_blobs(labels) if blob.area >= _MIN_AREA]
    rimless = [blob for blob in blobs if not any(_is_halo(blob, other) for other in blobs)]
    return tuple(_classify(blob, image) for blob in rimless)


def scene_from_detections(detections: tuple[Detection, ...]) -> Scene:
    """The clear detections as a scene, centres snapped to the grid; snapped objects may lie too close."""
    return tuple(
        SceneObject(d.color, d.shape, _snap(d.box[0]), _snap(d.box[1])) for d in detections if d.shape is not None
    )


def _snap(value: float) -> int:
    return min(CENTERS, key=lambda center: abs(center - value))


@dataclass(frozen=True, slots=True)
class _Blob:
    """A 4-connected region of one colour; rows and columns are half-open."""

    label: int
    area: int
    top: int
    left: int
    bottom: int
    right: int
    mask: np.ndarray


def _label_colors(image: np.ndarray) -> np.ndarray:
    """Each pixel's colour index, int [48, 48], -1 for background.

    A pixel is matched to the mixtures of each colour with the background, so a soft edge never passes for a
    third colour; less than half coloured counts as background, far from all mixtures as other.
    """
    pixels = image.reshape(-1, 3).astype(np.float32) - np.float32(BACKGROUND)  # [P, 3]
    along, lengths = pixels @ _RAYS.T, (_RAYS**2).sum(1)
    share = (along / lengths).clip(0, 1)  # [P, C]
    squared = (pixels**2).sum(1)  # [P]
    distance = squared[:, None] + share * (share * lengths - 2 * along)  # [P, C], squared
    labels = distance.argmin(1)
    every = np.arange(len(pixels))
    far = distance[every, labels] > _MAX_COLOR_DISTANCE**2
    labels[share[every, labels] < 0.5] = -1
    labels[far & (squared > _MIN_CONTRAST**2)] = _OTHER
    return labels.reshape(IMAGE_SIZE, IMAGE_SIZE)


def _connected_blobs(labels: np.ndarray) -> list[_Blob]:
    """Join horizontal runs of one label that touch a run of the same label in the row above."""
    padded = np.full((IMAGE_SIZE, IMAGE_SIZE + 1), -1)
    padded[:, :-1] = labels
    flat = padded.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-2))
    values = flat[starts].tolist()
    runs: list[tuple[int, int, int, int]] = []  # row, first column, column after the last, label
    for start, end, value in zip(starts.tolist(), [*starts[1:].tolist(), flat.size], values, strict=True):
        if value >= 0:
            row, column = divmod(start, IMAGE_SIZE + 1)
            runs.append((row, column, column + end - start, value))
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    for i, (row, first, last, value) in enumerate(runs):
        while runs[above][0] < row - 1:
            above += 1
        for j in range(above, i):
            other_row, other_first, other_last, other_value = runs[j]
            if other_row >= row:
                break
            if other_value == value and other_first < last and first < other_last:
                a, b = root(i), root(j)
                parent[max(a, b)] = min(a, b)
    groups: dict[int, list[tuple[int, int, int, int]]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(root(i), []).append(run)
    return [_blob(group) for group in groups.values()]


def _blob(runs: list[tuple[int, int, int, int]]) -> _Blob:
    top, bottom = runs[0][0], runs[-1][0] + 1
    left, right = min(run[1] for run in runs), max(run[2] for run in runs)
    mask = np.zeros((bottom - top, right - left), dtype=bool)
    for row, first, last, _ in runs:
        mask[row - top, first - left : last - left] = True
    return _Blob(runs[0][3], sum(last - first for _, first, last, _ in runs), top, left, bottom, right, mask)


def _is_halo(blob: _Blob, other: _Blob) -> bool:
    """Whether `blob` is only the mixed-colour rim of `other`: around it and nowhere three pixels thick."""
    around = (
        other.area > blob.area
        and other.label != blob.label
        and blob.top >= other.top - _HALO_REACH
        and blob.left >= other.left - _HALO_REACH
        and blob.bottom <= other.bottom + _HALO_REACH
        and blob.right <= other.right + _HALO_REACH
    )
    if not around:
        return False
    rows = blob.mask[:-2] & blob.mask[1:-1] & blob.mask[2:]
    return not (rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]).any()


def _classify(blob: _Blob, image: np.ndarray) -> Detection:
    height, width = blob.mask.shape
    sample, templates = _normalized(blob.mask), _templates()
    overlap = (sample & templates).sum((1, 2)) / (sample | templates).sum((1, 2))
    best = int(overlap.argmax())
    compact = max(width, height) <= _MAX_ASPECT * min(width, height)
    color, clear_color = _color_of(blob, image)
    clear = clear_color and compact and overlap[best] >= _MIN_OVERLAP
    box = ((blob.left + blob.right) / 2, (blob.top + blob.bottom) / 2, float(width), float(height))
    return Detection(color, SHAPES[best] if clear else None, box, float(overlap[best]))


def _color_of(blob: _Blob, image: np.ndarray) -> tuple[str, bool]:
    """The blob's palette colour, and whether its mean is close enough to that colour."""
    crop = image[blob.top : blob.bottom, blob.left : blob.right]
    mean = crop[blob.mask].mean(0) - BACKGROUND
    if blob.label == _OTHER:
        return _COLOR_NAMES[int(((_RAYS - mean) ** 2).sum(1).argmin())], False
    ray = _RAYS[blob.label]
    share = min(float(mean @ ray / (ray @ ray)), 1.0)
    distance = float(np.linalg.norm(mean - share * ray))
    return _COLOR_NAMES[blob.label], share >= _MIN_STRENGTH and distance <= _MAX_BLOB_DISTANCE


def _normalized(mask: np.ndarray) -> np.ndarray:
    """The mask sampled around its centroid on a lattice scaled by the square root of its area, bool [20, 20].

    Unlike its bounding box, these hardly change when a sharp tip is lost.
    """
    rows, columns = np.nonzero(mask)
    reach = np.linspace(-_TEMPLATE_REACH, _TEMPLATE_REACH, _TEMPLATE_SIZE) * math.sqrt(len(rows))
    row = np.rint(rows.mean() + reach).astype(int)
    column = np.rint(columns.mean() + reach).astype(int)
    height, width = mask.shape
    inside = ((row >= 0) & (row < height))[:, None] & ((column >= 0) & (column < width))
    return mask[row.clip(0, height - 1)[:, None], column.clip(0, width - 1)] & inside


@cache
def _templates() -> np.ndarray:
    """What each shape looks like after `_normalized`, bool [5, 20, 20]."""
    masks = []
    for shape in SHAPES:
        labels = _label_colors(render((SceneObject("blue", shape, 24, 24),)))
        (blob,) = _connected_blobs(labels)
        masks.append(_normalized(blob.mask))
    return np.stack(masks)
