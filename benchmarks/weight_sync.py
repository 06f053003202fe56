"""Seconds of a weight update by transport: `python benchmarks/weight_sync.py --size small --workers 2 --json FILE`.

A learner with float32 masters of all that trains, and workers with a policy each, as processes of a local Ray.
An update is what a run does between two steps: the learner publishes, every worker copies into its model, checks what
that holds and acknowledges it to the driver. The clock runs in the driver from before the first to behind the last.

bytes   of the weights in the type that they travel in, times the workers: what arrived
share   bytes / seconds, of the speed of `Tensor.copy_` from one buffer of the weights' size to another, both touched
        before, on one thread of a process that is alone at it; measured before and after each transport, the mean. A
        byte that is copied counts once there, too: 50 % is as if a single thread copied all that arrives twice.
repack  what a worker's decoder does behind that, on its own: packing the weights again for its products. Seconds of the
        slowest of all workers at once.
cpu     seconds of processor time of learner and workers for one update, on machines that others use meanwhile

The warm-up is long because the object store's memory is slow where it has not been written before: it takes some
versions until every part of it has been.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
import torch
from provenance import provenance, write
from ray.actor import ActorHandle
from rich.console import Console
from rich.table import Table
from sizes import SIZES, build

from rlpipe.paths import ROOT
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.decoder import Decoder
from rlpipe.schema import PolicySection
from roles.group import ActorPool
from roles.weight_sync import WeightSync
from roles.weights import Publisher, Receiver
from roles.work import Ack, Channel, Invitation, Manifest

TRANSPORTS = ("object_store", "gloo", "nccl")
TIMEOUT_S = 600.0


class Learner:
    """Publishes the trained parts of a policy, which it holds in float32."""

    def __init__(self, size: str, dtype: str, bucket_mib: int, device: str) -> None:
        torch.set_num_threads(1)
        policy = build(size, torch.float32, device)
        policy.set_trainable(PolicySection().trainable)
        self.masters = {n: p.detach() for n, p in policy.janus.named_parameters() if p.requires_grad}
        self.publisher = Publisher(getattr(torch, dtype), bucket_mib << 20)

    def publish(self, version: int, channel: Channel | None) -> Manifest:
        return self.publisher.publish(self.masters.items(), version, channel)

    def share(self) -> Manifest:
        return self.publisher.share()

    def cpu_s(self) -> float:
        return time.process_time()


class Worker:
    """A policy and its decoder, as a rollout worker has them."""

    def __init__(self, size: str, dtype: str, device: str) -> None:
        torch.set_num_threads(1)
        self.policy: JanusPolicy = build(size, getattr(torch, dtype), device)
        self.decoder = Decoder(self.policy)
        self.receiver = Receiver(TIMEOUT_S)

    def ready(self) -> None:
        pass

    def load_weights(self, source: Manifest | Invitation) -> Ack:
        return self.receiver.take(source, dict(self.policy.janus.named_parameters()))

    def repack(self) -> float:
        started = time.perf_counter()
        self.decoder.refresh()
        return time.perf_counter() - started

    def cpu_s(self) -> float:
        return time.process_time()


def copy_speed(nbytes: int, runs: int = 7) -> float:
    """Bytes a second of one thread's `copy_` between two buffers that have been touched; the median."""
    torch.set_num_threads(1)
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return nbytes / statistics.median(seconds)


async def measure(
    arguments: argparse.Namespace, transport: str, learner: ActorHandle, pool: ActorPool, first: int
) -> dict[str, Any]:
    """Warm-up updates, then those that count; versions from `first` on."""
    sync = WeightSync(pool, TIMEOUT_S, transport, lambda: learner)
    seconds, manifest, before = [], None, 0.0
    for number in range(arguments.warmup + arguments.runs):
        if number == arguments.warmup:
            before = await _cpu_s(learner, pool)
        started = time.perf_counter()
        channel = sync.invite(first + number)
        manifest = await learner.publish.remote(first + number, channel)
        await sync.send(manifest)
        seconds.append(time.perf_counter() - started)
    counted = seconds[arguments.warmup :]
    median, nbytes = statistics.median(counted), manifest.num_bytes * len(pool.replicas)
    return {
        "seconds": median,
        "seconds_least": min(counted),
        "seconds_most": max(counted),
        "runs": len(counted),
        "bytes": nbytes,
        "gb_per_s": nbytes / median / 1e9,
        "cpu_seconds": (await _cpu_s(learner, pool) - before) / len(counted),
    }


async def _cpu_s(learner: ActorHandle, pool: ActorPool) -> float:
    return await learner.cpu_s.remote() + sum(await pool.broadcast("cpu_s", timeout_s=TIMEOUT_S))


async def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    gpus = 1 if arguments.device == "cuda" else 0
    common = {"num_cpus": 0.1, "num_gpus": gpus}
    make = (arguments.size, arguments.dtype)
    learner = ray.remote(Learner).options(**common).remote(*make, arguments.bucket_mib, arguments.device)
    worker = ray.remote(Worker).options(**common)
    pool = ActorPool("rollout", lambda _: worker.remote(*make, arguments.device), arguments.workers)
    await pool.start()
    first = await learner.publish.remote(0, None)
    await WeightSync(pool, TIMEOUT_S).send(first)
    result: dict[str, Any] = {"weight_bytes": first.num_bytes, "transports": {}}
    for place, transport in enumerate(arguments.transports):
        before = copy_speed(first.num_bytes)
        found = await measure(arguments, transport, learner, pool, 1 + 1000 * place)
        copied = (before + copy_speed(first.num_bytes)) / 2
        found |= {"copy_gb_per_s": copied / 1e9, "share_of_copy": found["gb_per_s"] * 1e9 / copied}
        result["transports"][transport] = found
        print(f"{transport}: {found['seconds']:.3f} s, {found['share_of_copy']:.0%} of the copy bandwidth", flush=True)
    repacks = [max(await pool.broadcast("repack", timeout_s=TIMEOUT_S)) for _ in range(1 + arguments.runs)]
    result["repack_seconds"] = statistics.median(repacks[1:])
    pool.close()
    return result


def show(result: dict[str, Any], console: Console) -> None:
    setting = result["setting"]
    table = Table(
        "transport", "seconds", "least to most", "MB to all", "GB/s", "copy GB/s", "share", "cpu s",
        title=f"{setting['size']}, {setting['dtype']}, {setting['workers']} workers: "
        f"{result['weight_bytes'] / 1e6:.0f} MB of weights; repack {result['repack_seconds']:.3f} s",
    )  # fmt: skip
    for name, row in result["transports"].items():
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['seconds_least']:.3f} to {row['seconds_most']:.3f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['copy_gb_per_s']:.2f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['cpu_seconds']:.2f}",
        )
    console.print(table)


def parse(argv: Iterable[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=["object_store", "gloo"])
    parser.add_argument("--bucket-mib", type=int, default=128)
    parser.add_argument("--runs", type=int, default=11, help="updates that count")
    parser.add_argument("--warmup", type=int, default=10, help="updates before them")
    parser.add_argument("--store-gib", type=int, default=2, help="object store: of three versions of the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    os.environ.update(PYTHONPATH=paths, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    ray.init(
        num_cpus=max(2, os.cpu_count() or 1),
        include_dashboard=False,
        object_store_memory=arguments.store_gib << 30,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
    )
    try:
        result = asyncio.run(bench(arguments))
    finally:
        ray.shutdown()
    result["setting"] = {
        name: getattr(arguments, name) for name in ("size", "dtype", "workers", "bucket_mib", "device")
    }
    result["provenance"] = provenance(threads=1, device=arguments.device, packages=["torch", "ray"])
    show(result, Console())
    write(arguments.json, result)


if __name__ == "__main__":
    main()
