"""Weights of the entropies of images and reflections in the loss: none, fixed, or held at a target.

The loss is added weight * entropy, so a negative weight rewards entropy and a positive one penalises it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlpipe.schema_learn import EntropySection

_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass
class Adaptive:
    """Moves one weight so that an entropy comes to its target (ReasonGen-R1, adaptive entropy loss).

    weight = sinh(psi); Adam lowers -weight * (entropy - target) by psi, and the weight stays within `bound` of 0. Here
    the entropy is that of the whole batch, once per optimiser step (there: of a micro-batch of one rank, each time).
    """

    target: float
    lr: float = 5e-5
    bound: float = 5e-3
    psi: float = 0.0
    mean: float = 0.0
    square: float = 0.0
    count: int = 0

    @property
    def weight(self) -> float:
        return math.sinh(self.psi)

    def observe(self, entropy: float) -> None:
        """Move the weight after a step in which the mean entropy was so many nats."""
        gradient = -math.cosh(self.psi) * (entropy - self.target)
        self.count += 1
        self.mean += (1 - _BETAS[0]) * (gradient - self.mean)
        self.square += (1 - _BETAS[1]) * (gradient**2 - self.square)
        mean, square = self.mean / (1 - _BETAS[0] ** self.count), self.square / (1 - _BETAS[1] ** self.count)
        moved = math.sinh(self.psi - self.lr * mean / (math.sqrt(square) + _EPS))
        self.psi = math.asinh(max(-self.bound, min(self.bound, moved)))


class EntropyControl:
    """Holds both weights from step to step.

    control = EntropyControl(section)
    control.weights                  # of image and text, for the next step; None: the loss has no such term
    control.observe(metrics)         # of that step
    """

    def __init__(self, section: EntropySection) -> None:
        self.section = section
        targets = {"image": section.image_target, "text": section.text_target}
        adaptive = section.mode == "adaptive"
        self.adaptive = {
            kind: Adaptive(target, section.weight_lr, section.max_weight)
            for kind, target in targets.items()
            if adaptive and target is not None
        }

    @property
    def weights(self) -> tuple[float, float] | None:
        if self.section.mode == "none":
            return None
        if self.section.mode == "bonus":
            return -self.section.weight, -self.section.weight
        image, text = (self.adaptive[k].weight if k in self.adaptive else 0.0 for k in ("image", "text"))
        return image, text

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take a step's `entropy/image` and `entropy/text`; a kind that was not trained stays as it is."""
        for kind, control in self.adaptive.items():
            if f"entropy/{kind}" in metrics:
                control.observe(metrics[f"entropy/{kind}"])

    def metrics(self) -> dict[str, float]:
        """The weights that the next step has."""
        if self.weights is None:
            return {}
        return {f"entropy/{kind}_weight": w for kind, w in zip(("image", "text"), self.weights, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values."""
        moving = ("psi", "mean", "square", "count")
        return {kind: {name: asdict(control)[name] for name in moving} for kind, control in self.adaptive.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for kind in state.keys() & self.adaptive.keys():
            for name, value in state[kind].items():
                setattr(self.adaptive[kind], name, value)
