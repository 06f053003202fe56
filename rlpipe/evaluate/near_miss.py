"""The near-miss test: does the verdict look at the image, or does it only know which prompts are hard?

A right image is shown under its own prompt and under one that it misses in exactly one way. Both prompts are
about equally hard, so a verdict that never looks stays at chance (balanced accuracy 0.5).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from rlpipe.evaluate.outcomes import row_seed
from rlpipe.evaluate.table import NearMiss
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import REFLECTION, look
from rlpipe.rollout.sampling import uniforms
from rlpipe.types import Prompt
from rlpipe.world.checker import check
from rlpipe.world.prompts import PromptSpec, is_held_out, spec_from_metadata
from rlpipe.world.render import render
from rlpipe.world.scenes import near_miss_spec, sample_scene

_TRIES = 16


class Case(NamedTuple):
    """An image (uint8 [H, W, 3]) under a prompt, and whether it shows it."""

    prompt: Prompt
    image: np.ndarray
    truth: bool


def near_miss_cases(decoder: Decoder, prompts: Sequence[Prompt], seed: int = 0, batch_size: int = 200) -> list[Case]:
    """Two cases a prompt: a render of it, through the VQ tokenizer, under its own and a near-miss prompt.

    Prompts whose image the round trip spoils are left out, so truth is always the checker's. The near-miss
    prompt is held out wherever its kind has such.
    """
    cases: list[Case] = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        specs = [spec_from_metadata({**prompt.metadata, "prompt": prompt.text}) for prompt in rows]
        rngs = [random.Random(row_seed(seed, prompt.id, "near miss")) for prompt in rows]
        scenes = [sample_scene(rng, spec) for rng, spec in zip(rngs, specs, strict=True)]
        pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        images = decoder.policy.decode_codes(decoder.policy.encode_pixels(pixels)).cpu().numpy()
        for prompt, spec, rng, image in zip(rows, specs, rngs, images, strict=True):
            missed = _near_miss_prompt(rng, prompt, spec)
            if check(prompt.metadata, image).correct and not check(missed.metadata, image).correct:
                cases += [Case(prompt, image, True), Case(missed, image, False)]
    return cases


def near_miss_verdicts(
    decoder: Decoder, cases: Sequence[Case], seed: int = 0, temperature: float = 1.0, batch_size: int = 200
) -> list[NearMiss]:
    """The policy's verdict on each case, sampled over {Yes, No} as in a rollout (temperature 0: likelier)."""
    results = []
    for start in range(0, len(cases), batch_size):
        rows = cases[start : start + batch_size]
        looks = look(decoder, [case.prompt for case in rows], [case.image for case in rows])
        for case, seen in zip(rows, looks, strict=True):
            noise = uniforms(row_seed(seed, case.prompt.id, "near miss"), REFLECTION, 1)[0]
            said_yes = bool(noise < _tempered(seen.p_yes, temperature))
            results.append(NearMiss(case.prompt.id, case.prompt.metadata["tag"], case.truth, said_yes))
    return results


def _tempered(p: float, temperature: float) -> float:
    if temperature == 0.0:
        return float(p > 0.5)
    yes, no = p ** (1 / temperature), (1 - p) ** (1 / temperature)
    return yes / (yes + no)


def _near_miss_prompt(rng: random.Random, prompt: Prompt, spec: PromptSpec) -> Prompt:
    for _ in range(_TRIES):
        missed = near_miss_spec(rng, spec)
        if is_held_out(missed):
            break
    metadata = missed.metadata
    return Prompt(id=f"{prompt.id}/near", text=metadata.pop("prompt"), metadata=metadata)
