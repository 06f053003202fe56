"""Accuracy by the number of images a trajectory may have: `python benchmarks/rounds.py --policy DIR --json FILE`.

T = 1 is the first image alone. With T above 1 the policy looks at every image but the T-th and draws again after "No".
Every prompt is drawn once for each seed with the largest T: a shorter trajectory is the beginning of a longer one. The
exact checker judges the image that each T ends with; accuracy is the mean over kinds of prompt, intervals are 95 %.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from provenance import provenance, write

from rlpipe.config import load_config
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.outcomes import row_seed
from rlpipe.evaluate.table import Measured, Outcome, policy_row
from rlpipe.paths import resolve_path
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Prompt, Sampling
from rlpipe.world.checker import check


@dataclass(frozen=True)
class Story:
    """One trajectory: which of its images are right, and how many it has had when it stops by itself."""

    id: str
    tag: str
    right: tuple[bool, ...]

    def at(self, rounds: int) -> bool:
        """Whether the image is right that it ends with under a limit of `rounds` images."""
        return self.right[min(rounds, len(self.right)) - 1]


def stories(decoder: Decoder, prompts: Sequence[Prompt], sampling: Sampling, seed: int, batch_size: int) -> list[Story]:
    """One trajectory of each prompt, up to sampling.max_images images."""
    told = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        samplings = [replace(sampling, seed=row_seed(seed, prompt.id)) for prompt in rows]
        for rollout in introspect(decoder, rows, samplings, [prompt.id for prompt in rows]):
            prompt = rollout.trajectory.prompt
            right = tuple(bool(check(prompt.metadata, image).correct) for image in rollout.images)
            told.append(Story(f"{prompt.id}/{seed}", prompt.metadata["tag"], right))
    return told


def rows_of(told: Sequence[Story], history: str, rounds: int) -> list[dict]:
    """One row for each limit: accuracy, its gain over one image less, images drawn per prompt."""
    rows = []
    for limit in range(1, rounds + 1):
        fewer = max(limit - 1, 1)
        # The table's machinery compares a first with a final image: here those of two limits.
        outcomes = [
            Outcome(
                story.id,
                story.tag,
                first_correct=story.at(fewer),
                said_yes=len(story.right) <= fewer,
                final_correct=story.at(limit),
                fresh_correct=story.at(limit),
            )
            for story in told
        ]
        cells = policy_row(Measured(outcomes))
        images = float(np.mean([min(limit, len(story.right)) for story in told]))
        row = {"history": history, "rounds": limit, **cells["with"], "images_per_prompt": images}
        rows.append(row | ({"gain": cells["gain"]} if limit > 1 else {}))
    return rows


def print_rows(rows: Sequence[dict]) -> None:
    print("history  T  accuracy             gain over T - 1       images per prompt")
    for row in rows:
        low, high = row["ci95"]
        gain = ""
        if "gain" in row:
            below, above = row["gain"]["ci95"]
            gain = f"{100 * row['gain']['value']:+.1f} [{100 * below:+.1f}, {100 * above:+.1f}]"
        accuracy = f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        print(f"{row['history']:<8} {row['rounds']}  {accuracy:<19}  {gain:<20}  {row['images_per_prompt']:.2f}")


def main() -> None:
    config = load_config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=resolve_path(config.policy.path), help="checkpoint folder")
    parser.add_argument("--prompts", default=config.evaluate.prompts, help="prompts with metadata for the checker")
    parser.add_argument("--rounds", type=int, default=3, help="largest T")
    parser.add_argument("--history", nargs="+", choices=("last", "all"), default=["last"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[config.evaluate.seed])
    parser.add_argument("--guidance", type=float, default=config.rollout.guidance)
    parser.add_argument("--batch-size", type=int, default=config.evaluate.batch_size)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: nothing is drawn again; give 2 or more")
    torch.set_num_threads(arguments.threads)
    prompts, started = load_prompts(arguments.prompts), time.perf_counter()
    decoder = Decoder(JanusPolicy.load(arguments.policy))
    rows = []
    for history in arguments.history:
        sampling = Sampling(
            guidance=arguments.guidance,
            max_reflection_tokens=config.rollout.max_reflection_tokens,
            max_images=arguments.rounds,
            history=history,
        )
        told = [s for seed in arguments.seeds for s in stories(decoder, prompts, sampling, seed, arguments.batch_size)]
        rows += rows_of(told, history, arguments.rounds)
    print_rows(rows)
    if arguments.json:
        result = {
            **provenance(arguments.threads),
            "prompts": len(prompts),
            "seeds": arguments.seeds,
            "guidance": arguments.guidance,
            "seconds": round(time.perf_counter() - started),
            "rows": rows,
        }
        write(arguments.json, result)


if __name__ == "__main__":
    main()
