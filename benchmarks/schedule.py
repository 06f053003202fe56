"""What turn-level scheduling gains on a queue longer than a batch: `python benchmarks/schedule.py --json FILE`.

Rows are drawn, looked at, and drawn again after "No", up to T images each, at most `limit` of them at once. `lockstep`
takes the next rows when the last of these is done; `turns` gives the places of rows that leave to others, see
`rlpipe/rollout/schedule.py`. Verdicts are coins of the rows' seeds with a given share of No, so both draw the same
images. Seconds are the process's own, on one thread; the best of the repeats, which take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from sizes import PROMPTS, REFLECTION_TOKENS, SIZES, build

from rlpipe.data.prompts import load_prompts
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.rollout.sampling import uniforms
from rlpipe.types import Prompt, Rollout, Sampling

Rows = tuple[list[Prompt], list[Sampling], list[str]]


def queue(count: int, share_no: float, sampling: Sampling) -> Rows:
    """`count` rows with a prompt each; every look says No with the given probability."""
    prompts, rng, samplings, seed = load_prompts(str(PROMPTS)), np.random.default_rng(0), [], 0
    for _ in range(count):
        said_no = rng.random(sampling.max_images - 1) < share_no
        while not _says(seed, said_no):
            seed += 1
        samplings.append(replace(sampling, seed=seed))
        seed += 1
    return [prompts[row % len(prompts)] for row in range(count)], samplings, [f"row{row}" for row in range(count)]


def _says(seed: int, said_no: np.ndarray) -> bool:
    """Whether the coins of a seed fall so up to the first Yes, well clear of their edge; see `sizes.level_verdicts`."""
    for number, no in enumerate(said_no):
        chance = uniforms(seed, 2 * number + 1, 1)[0]
        if not (chance > 0.6 if no else chance < 0.4):
            return False
        if not no:
            break
    return True


def lockstep(decoder: Decoder, rows: Rows, limit: int) -> list[Rollout]:
    starts = range(0, len(rows[0]), limit)
    return [rollout for at in starts for rollout in introspect(decoder, *(part[at : at + limit] for part in rows))]


def turns(decoder: Decoder, rows: Rows, limit: int) -> list[Rollout]:
    return introspect(decoder, *rows, limit=limit)


def measure(decoder: Decoder, rows: Rows, limit: int, repeats: int, clock: Callable[[], float]) -> dict:
    """Images per second of both schedules, and how much faster the second is."""
    schedules, best, images = {"lockstep": lockstep, "turns": turns}, {}, 0
    for _ in range(repeats):
        for name, schedule in schedules.items():
            started = clock()
            images = sum(len(rollout.images) for rollout in schedule(decoder, rows, limit))
            _synchronise(decoder.device)
            best[name] = min(clock() - started, best.get(name, float("inf")))
    result = {name: images / seconds for name, seconds in best.items()}
    return {"limit": limit, "images": images, "images_per_second": result, "gain": result["turns"] / result["lockstep"]}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--queue", type=int, default=192, help="rows in all")
    parser.add_argument("--limits", type=int, nargs="+", default=[8, 16, 64], help="rows at once")
    parser.add_argument("--share-no", type=float, default=0.5, help="probability that a look says No")
    parser.add_argument("--rounds", type=int, default=3, help="most images of a row, T")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sampling = Sampling(
        guidance=arguments.guidance,
        max_reflection_tokens=REFLECTION_TOKENS[arguments.size],
        max_images=arguments.rounds,
    )
    decoder = Decoder(build(arguments.size, getattr(torch, arguments.dtype), arguments.device))
    rows = queue(arguments.queue, arguments.share_no, sampling)
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    turns(decoder, tuple(part[: arguments.limits[0]] for part in rows), arguments.limits[0])  # a warm-up
    results = []
    print("limit  images  lockstep img/s  turns img/s  gain")
    for limit in arguments.limits:
        result = measure(decoder, rows, limit, arguments.repeats, clock)
        results.append(result)
        speed = result["images_per_second"]
        print(
            f"{limit:5}  {result['images']:6}  {speed['lockstep']:14.2f}  {speed['turns']:11.2f}  {result['gain']:.2f}",
            flush=True,
        )
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        document = {**provenance(threads=1, device=arguments.device), **settings, "results": results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
