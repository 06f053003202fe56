"""Pools of images with what the checker sees in them, and the (prompt, image) pairs that can be made of them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.checker import check_detections
from rlpipe.world.detection import Detection, detect, scene_from_detections
from rlpipe.world.prompts import PromptSpec, is_held_out, sample_spec, spec_from_metadata
from rlpipe.world.render import render
from rlpipe.world.scenes import (
    MAX_OBJECTS,
    correct_scene,
    near_miss,
    near_miss_spec,
    relations_between,
    sample_scene,
)


@dataclass
class Pool:
    """Images of one origin.

    specs:      the prompt that each was made for.
    codes:      int64 [N, 36], images: uint8 [N, 48, 48, 3] decoded from them.
    detections: what the checker sees in each image; correct: bool [N]; reasons: the true reason for each.
    """

    specs: list[PromptSpec]
    codes: np.ndarray
    images: np.ndarray
    detections: list[tuple[Detection, ...]]
    correct: np.ndarray
    reasons: list[str]

    def __len__(self) -> int:
        return len(self.specs)

    def save(self, path: str | Path) -> None:
        """Write one .npz without pickled objects."""
        detections = [[(d.color, d.shape, d.box, d.score) for d in row] for row in self.detections]
        notes = {"specs": [s.metadata for s in self.specs], "detections": detections, "reasons": self.reasons}
        text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        np.savez_compressed(path, codes=self.codes, images=self.images, correct=self.correct, notes=text)

    @staticmethod
    def load(path: str | Path) -> Pool:
        with np.load(path, allow_pickle=False) as file:
            notes = json.loads(file["notes"].tobytes())
            detections = [tuple(Detection(c, s, tuple(b), v) for c, s, b, v in row) for row in notes["detections"]]
            specs = [spec_from_metadata(metadata) for metadata in notes["specs"]]
            return Pool(specs, file["codes"], file["images"], detections, file["correct"], notes["reasons"])

    @staticmethod
    def join(pools: Sequence[Pool]) -> Pool:
        return Pool(
            [s for p in pools for s in p.specs],
            np.concatenate([p.codes for p in pools]),
            np.concatenate([p.images for p in pools]),
            [d for p in pools for d in p.detections],
            np.concatenate([p.correct for p in pools]),
            [r for p in pools for r in p.reasons],
        )


def pool_of(specs: list[PromptSpec], codes: np.ndarray, policy: JanusPolicy, workers: int = 2) -> Pool:
    """Decode the codes and look at every image with the checker, on `workers` processes."""
    images = np.concatenate([policy.decode_codes(part).numpy() for part in torch.from_numpy(codes).split(500)])
    with ProcessPoolExecutor(workers) as executor:
        detections = list(executor.map(detect, images, chunksize=200))
    verdicts = [check_detections(s.metadata, d) for s, d in zip(specs, detections, strict=True)]
    correct = np.array([v.correct for v in verdicts])
    return Pool(specs, codes, images, detections, correct, [v.reason for v in verdicts])


def encode(policy: JanusPolicy, images: list[np.ndarray]) -> np.ndarray:
    """VQ codes int64 [N, 36] of rendered images."""
    pixels = torch.from_numpy(np.stack(images))
    return np.concatenate([policy.encode_pixels(part).numpy() for part in pixels.split(500)])


def rendered_pool(policy: JanusPolicy, count: int, wrong_share: float, seed: int) -> Pool:
    """Round trips of renders for training prompts, a share of them near misses."""
    rng = random.Random(seed)
    specs = [sample_spec(rng, "train") for _ in range(count)]
    scenes = [near_miss(rng, s) if rng.random() < wrong_share else sample_scene(rng, s) for s in specs]
    return pool_of(specs, encode(policy, [render(scene) for scene in scenes]), policy)


def spliced_pool(policy: JanusPolicy, source: Pool, seed: int, share: float = 0.12) -> Pool:
    """Images with a few codes taken from another image or at random: the defects of a sampler that slips."""
    rng = np.random.default_rng(seed)
    codes = source.codes.copy()
    other = source.codes[rng.permutation(len(codes))]
    noise = rng.integers(0, policy.codebook_size, codes.shape)
    where = rng.random(codes.shape)
    codes = np.where(where < share * 0.7, other, np.where(where < share, noise, codes))
    return pool_of(source.specs, codes, policy)


def corrections(policy: JanusPolicy, pool: Pool, indices: Sequence[int], seed: int) -> np.ndarray:
    """VQ codes [len(indices), 36] of the smallest changes that make wrong images right."""
    rng = random.Random(seed)
    images = []
    for index in indices:
        scene = scene_from_detections(pool.detections[index])
        images.append(render(correct_scene(rng, scene, pool.specs[index])))
    return encode(policy, images)


def shown_specs(detections: tuple[Detection, ...]) -> list[PromptSpec]:
    """Every training prompt that an image with these detections satisfies."""
    if not detections or len(detections) > MAX_OBJECTS or any(d.shape is None for d in detections):
        return []
    looks = [(d.color, d.shape) for d in detections]
    specs: list[PromptSpec] = []
    if len(looks) == 1:
        specs = [PromptSpec("single_object", ((None, looks[0][1]),)), PromptSpec("colors", (looks[0],))]
    elif len({shape for _, shape in looks}) == 1:
        shape, colors = looks[0][1], {color for color, _ in looks}
        specs = [PromptSpec("counting", ((None, shape),) * len(looks))]
        if len(colors) == 1:
            specs.append(PromptSpec("counting", (looks[0],) * len(looks)))
    elif len(looks) == 2:
        for a, b in itertools.permutations(detections):
            (ca, sa), (cb, sb) = (a.color, a.shape), (b.color, b.shape)
            specs.append(PromptSpec("two_object", ((None, sa), (None, sb))))
            for relation in relations_between(a.box, b.box):
                specs += [PromptSpec("position", ((ca, sa), (cb, sb)), relation)] * 2
            if ca != cb:
                specs.append(PromptSpec("color_attr", ((ca, sa), (cb, sb))))
    return [s for s in specs if not is_held_out(s) and check_detections(s.metadata, detections).correct]


@dataclass(frozen=True)
class Pair:
    """A prompt shown with image number `image` of a pool, and the truth about the two."""

    spec: PromptSpec
    image: int
    correct: bool
    reason: str


def own_pairs(pool: Pool) -> list[Pair]:
    """Every image under the prompt that it was made for."""
    return [Pair(pool.specs[i], i, bool(pool.correct[i]), pool.reasons[i]) for i in range(len(pool))]


def near_miss_pairs(pool: Pool, seed: int, keep: Callable[[PromptSpec], bool] | None = None) -> list[Pair]:
    """Images under a prompt that they satisfy and under one that they just miss, one of each per image."""
    rng = random.Random(seed)
    keep = keep or (lambda spec: not is_held_out(spec))
    pairs = []
    for i, detections in enumerate(pool.detections):
        specs = shown_specs(detections)
        if not specs:
            continue
        spec = rng.choice(specs)
        missed = next((s for s in (near_miss_spec(rng, spec) for _ in range(8)) if keep(s)), None)
        if missed is None:
            continue
        for candidate in (spec, missed):
            verdict = check_detections(candidate.metadata, detections)
            pairs.append(Pair(candidate, i, verdict.correct, verdict.reason))
    return pairs
