"""Edited images, right and wrong, with what the checker says of them: what a judge of edits learns from."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.detection import detect
from rlpipe.world.edits import (
    KINDS,
    Edit,
    EditVerdict,
    Task,
    all_edits,
    apply_edit,
    check_edited,
    is_held_out,
    sample_task,
)
from rlpipe.world.pool import encode
from rlpipe.world.render import render
from rlpipe.world.scenes import COLORS, SHAPES, Scene


@dataclass(frozen=True)
class EditCase:
    """An instruction about a pair of images, number `index` of a pool, and the truth about the three."""

    edit: Edit
    index: int
    verdict: EditVerdict


@dataclass
class EditPool:
    """Pairs of images, and instructions about them; sources and images: uint8 [N, 48, 48, 3]."""

    sources: np.ndarray
    images: np.ndarray
    cases: list[EditCase]

    def save(self, path: str | Path) -> None:
        """Write one .npz without pickled objects."""
        rows = [(asdict(case.edit), case.index, asdict(case.verdict)) for case in self.cases]
        notes = np.frombuffer(json.dumps(rows).encode(), np.uint8)
        np.savez_compressed(path, sources=self.sources, images=self.images, cases=notes)

    @staticmethod
    def load(path: str | Path) -> EditPool:
        with np.load(path, allow_pickle=False) as file:
            rows = json.loads(file["cases"].tobytes())
            cases = [EditCase(Edit(**edit), index, EditVerdict(**verdict)) for edit, index, verdict in rows]
            return EditPool(file["sources"], file["images"], cases)


def pool_of_edits(
    tasks: Sequence[Task], images: np.ndarray, seed: int, near_misses: bool = True, workers: int = 1
) -> EditPool:
    """Look at all images with the checker; each pair under its own instruction and under one that is near it."""
    rng = random.Random(seed)
    sources = np.stack([render(task.source) for task in tasks])
    with ProcessPoolExecutor(workers) as executor:
        seen = list(executor.map(detect, [*sources, *images], chunksize=200))
    cases = []
    for index, task in enumerate(tasks):
        before, after = seen[index], seen[len(tasks) + index]
        edits = [task.edit, *([near_edit(rng, task)] if near_misses else [])]
        cases += [EditCase(edit, index, check_edited(edit, before, after)) for edit in edits]
    return EditPool(sources, images, cases)


def near_edit(rng: random.Random, task: Task) -> Edit:
    """Another training instruction for the source scene: mostly one about the same object, or with the same aim."""
    looks = {(o.color, o.shape) for o in task.source}
    fitting = [
        edit
        for kind in KINDS
        for edit in all_edits(kind)
        if ((edit.color, edit.shape) in looks) == (edit.kind != "add")
        if not is_held_out(edit) and edit != task.edit and (edit.to, edit.shape) not in looks
    ]
    near = [e for e in fitting if (e.color, e.shape) == (task.edit.color, task.edit.shape)]
    near += [e for e in fitting if e.kind == task.edit.kind and e.kind != "add"]
    near += [e for e in fitting if e.kind == task.edit.kind == "add" and rng.random() < 0.1]
    return rng.choice(near or fitting)


def edited_pool(policy: JanusPolicy, count: int, seed: int, split: str = "train") -> EditPool:
    """Edits as a policy might draw them: right, left undone, wrong, with damage elsewhere, some with slipped codes."""
    rng, chance = random.Random(seed), np.random.default_rng(seed)
    tasks = [sample_task(rng, split) for _ in range(count)]
    codes = encode(policy, [render(_attempt(rng, task)) for task in tasks])
    slips = chance.random((count, 1)) < 0.35
    where, rate = chance.random(codes.shape), chance.uniform(0.0, 0.15, (count, 1))
    other = np.where(where < rate / 2, codes[chance.permutation(count)], chance.integers(0, 512, codes.shape))
    codes = np.where(slips & (where < rate), other, codes)
    images = np.concatenate([policy.decode_codes(part).numpy() for part in torch.from_numpy(codes).split(500)])
    return pool_of_edits(tasks, images, seed + 1)


def _attempt(rng: random.Random, task: Task) -> Scene:
    draw = rng.random()
    if draw < 0.4:
        return task.target
    if draw < 0.5:
        return task.source
    if draw < 0.75:
        return _disturbed(rng, task.target)
    scene = _disturbed(rng, task.source)
    return scene if draw < 0.9 else _disturbed(rng, scene)


def _disturbed(rng: random.Random, scene: Scene) -> Scene:
    """The scene after some other edit, or with another shape in an object's place."""
    if scene and rng.random() < 0.2:
        index = rng.randrange(len(scene))
        changed = replace(scene[index], shape=rng.choice([s for s in SHAPES if s != scene[index].shape]))
        return scene[:index] + (changed,) + scene[index + 1 :]
    while True:
        kind = rng.choice(KINDS)
        look = rng.choice(scene) if scene and kind != "add" else None
        color, shape = (look.color, look.shape) if look else (rng.choice(list(COLORS)), rng.choice(SHAPES))
        options = [e for e in all_edits(kind) if (e.color, e.shape) == (color, shape)]
        changed = apply_edit(rng, rng.choice(options), scene)
        if changed is not None:
            return changed
