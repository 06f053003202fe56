"""What "the policy" is under classifier-free guidance: one function for sampler and learner alike."""

from __future__ import annotations

from typing import Literal

import torch

GuidanceLogits = Literal["guided", "scaled", "conditional"]


def guide(
    conditional: torch.Tensor,
    unconditional: torch.Tensor | None,
    scale: float,
    mode: GuidanceLogits = "guided",
) -> torch.Tensor:
    """Policy logits [..., V] in float32 from the logits of the two rows of a guided pair.

    guided:      u + scale * (c - u), the distribution that the sampler draws from.
    scaled:      guided / scale, that is c - (scale - 1) / scale * u: the official learner's, a hidden temperature
                 of `scale` against the sampler.
    conditional: c alone (T2I-R1's learner).

    With scale 1 or no unconditional row all three are the conditional logits.
    """
    conditional = conditional.float()
    if unconditional is None or scale == 1.0 or mode == "conditional":
        return conditional
    unconditional = unconditional.float()
    guided = unconditional + scale * (conditional - unconditional)
    if mode == "guided":
        return guided
    if mode == "scaled":
        return guided / scale
    raise ValueError(f"loss.logits: {mode!r} is none of guided, scaled, conditional")
