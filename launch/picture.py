"""A picture of trajectories on held-out prompts: `python launch/picture.py --policy DIR --out FILE.png`.

Shows the first prompts, of different kinds, whose first image was wrong and whose second is right by the checker.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from rlpipe.config import load_config
from rlpipe.data.prompts import load_prompts
from rlpipe.observe.gallery import trajectory_strip
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Rollout, Sampling
from rlpipe.world.checker import check


def repaired(rollouts: list[Rollout], count: int) -> list[Rollout]:
    """Up to `count` rollouts, one per kind of prompt, that went from wrong to right."""
    chosen: dict[str, Rollout] = {}
    for rollout in rollouts:
        metadata = rollout.trajectory.prompt.metadata
        if len(rollout.images) == 2 and metadata["tag"] not in chosen:
            before, after = (check(metadata, image).correct for image in rollout.images)
            if after and not before:
                chosen[metadata["tag"]] = rollout
    return list(chosen.values())[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="checkpoint folder, such as runs/tiny_grpo/policy")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1, help="trajectories, one below the other")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = load_config(None, [])
    prompts = load_prompts(config.evaluate.prompts)[::-1]
    sampling = [
        Sampling(seed=arguments.seed + i, max_reflection_tokens=config.rollout.max_reflection_tokens)
        for i in range(len(prompts))
    ]
    policy = JanusPolicy.load(arguments.policy)
    with torch.inference_mode():
        rollouts = introspect(Decoder(policy), prompts, sampling, [p.id for p in prompts])
    rows = repaired(rollouts, arguments.count)
    if not rows:
        raise SystemExit(f"{arguments.policy}: no wrong first image was repaired; take another --seed")
    texts = [[policy.templates.text(r.trajectory.segments[i].token_ids) for i in r.trajectory.texts] for r in rows]
    strips = [trajectory_strip(r, t) for r, t in zip(rows, texts, strict=True)]
    picture = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        picture.paste(strip, (0, top))
        top += strip.height
    picture.save(arguments.out)
    print(f"{arguments.out}: {', '.join(repr(r.trajectory.prompt.text) for r in rows)}")


if __name__ == "__main__":
    main()
