"""Pre-training of a vision tower: what stands in every 8 x 8 patch.

A verdict that looks, rather than guessing from the prompt's difficulty, needs a tower that sees objects before
the language model is trained on it; afterwards the tower stays frozen, as the published models' SigLIP does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rlpipe.world.build.progress import Meter, learning_rates, optimise, require
from rlpipe.world.detection import Detection
from rlpipe.world.models import VQ_BLOCK
from rlpipe.world.pool import Pool
from rlpipe.world.scenes import COLORS, IMAGE_SIZE, SHAPES

_SIDE = IMAGE_SIZE // VQ_BLOCK
_KINDS = len(SHAPES) + 1
NUM_CLASSES = 1 + len(COLORS) * _KINDS
"""Nothing, or a colour with a shape or with an unclear one."""


def patch_targets(detections: tuple[Detection, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per patch: class of the object centred in it [36], class of the object covering it [36], offset of the
    centre from the middle of the patch in patches [36, 2]."""
    centre = np.zeros(_SIDE**2, np.int64)
    cover = np.zeros(_SIDE**2, np.int64)
    offset = np.zeros((_SIDE**2, 2), np.float32)
    for detection in detections:
        x, y, width, height = detection.box
        kind = SHAPES.index(detection.shape) if detection.shape else len(SHAPES)
        label = 1 + list(COLORS).index(detection.color) * _KINDS + kind
        columns = _patches(x - width / 2 + 2, x + width / 2 - 2)
        rows = _patches(y - height / 2 + 2, y + height / 2 - 2)
        for row in rows:
            cover[row * _SIDE + columns.start : row * _SIDE + columns.stop] = label
        column, row = min(_SIDE - 1, int((x + 0.5) // VQ_BLOCK)), min(_SIDE - 1, int((y + 0.5) // VQ_BLOCK))
        centre[row * _SIDE + column] = label
        offset[row * _SIDE + column] = ((x + 0.5) / VQ_BLOCK - column - 0.5, (y + 0.5) / VQ_BLOCK - row - 0.5)
    return centre, cover, offset


def _patches(low: float, high: float) -> range:
    return range(max(0, int(low // VQ_BLOCK)), min(_SIDE - 1, int(high // VQ_BLOCK)) + 1)


def train_tower(
    name: str,
    features: Callable[[torch.Tensor], torch.Tensor],
    tower: nn.Module,
    pool: Pool,
    steps: int = 1500,
    batch: int = 96,
    lr: float = 2e-3,
    bar: float = 0.85,
    seed: int = 4,
) -> None:
    """Train `tower` in place so that `features(uint8 [B, 48, 48, 3]) -> [B, 36, D]` tells the objects."""
    held = len(pool) // 20
    targets = [torch.from_numpy(np.stack(t)) for t in zip(*map(patch_targets, pool.detections), strict=True)]
    images = torch.from_numpy(pool.images)
    width = features(images[:1]).shape[-1]
    torch.manual_seed(seed)
    heads = nn.ModuleList([nn.Linear(width, n) for n in (NUM_CLASSES, NUM_CLASSES, 2)])
    tower.requires_grad_(True).train()
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    class_weight = torch.ones(NUM_CLASSES)
    class_weight[0] = 0.5
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    train, test = order[held:], order[:held]
    meter = Meter(name, steps, every=200)

    def losses(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centre, cover, offset = (t[rows] for t in targets)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = features(images[rows])
            c, v, o = (head(hidden).float() for head in heads)
        loss = F.cross_entropy(c.flatten(0, 1), centre.flatten(), weight=class_weight)
        loss = loss + 0.5 * F.cross_entropy(v.flatten(0, 1), cover.flatten())
        present = centre > 0
        if present.any():
            loss = loss + 0.3 * (o - offset)[present].abs().mean()
        return loss, (c.argmax(-1) == centre).all(1).float().mean()

    for step, rate in enumerate(learning_rates(steps, lr, warmup=100), start=1):
        loss, exact = losses(train[torch.randint(len(train), (batch,))])
        optimise(loss, optimizer, rate)
        meter.update(step, loss=loss.item(), exact_maps=exact.item())
    tower.requires_grad_(False).eval()
    with torch.no_grad():
        exact = np.mean([losses(rows)[1].item() for rows in test.split(250)])
    require(name, "exact object maps on held-out images", float(exact), bar)
