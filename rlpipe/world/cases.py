"""Images of the tiny world for checking a judge: renders under their own prompt and under one that they just miss."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image

from rlpipe.data.labels import write_rows
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.near_miss import near_miss_cases
from rlpipe.paths import resolve_path
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.schema import Config


def write_cases(config: Config) -> None:
    """Write score.images, a JSONL of two rows for each of score.world prompts of evaluate.prompts, and its images.

    The renders have been through the VQ tokenizer of policy.path, as everything has that the policy draws. Labels are
    the exact checker's. Which scene a prompt is rendered as depends on `seed` and the prompt.
    """
    path = Path(config.score.images)
    prompts = load_prompts(config.evaluate.prompts)
    # Files of prompts may have their kinds in any order; each shall be among the chosen ones as often as in the file.
    places = random.Random(config.seed).sample(range(len(prompts)), min(config.score.world, len(prompts)))
    chosen = [prompts[place] for place in sorted(places)]
    decoder = Decoder(JanusPolicy.load(resolve_path(config.policy.path)))
    folder = path.parent / f"{path.stem}_images"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in near_miss_cases(decoder, chosen, config.seed):
        file = folder / f"{case.prompt.id.partition('/')[0]}.png"
        if case.truth:
            Image.fromarray(case.image).save(file)
        row = {"image": f"{folder.name}/{file.name}", "id": case.prompt.id, "prompt": case.prompt.text}
        rows.append({**row, "metadata": dict(case.prompt.metadata), "label": case.truth})
    write_rows(path, rows)
