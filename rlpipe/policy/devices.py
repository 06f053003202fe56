"""What devices can do: figures of data sheets, and what share of them is reached, measured or assumed.

Dense products without sparsity, the largest memory that a model of the name is sold with. A figure of one's own
machine (`python benchmarks/rollout.py`, `benchmarks/learner.py`) is always better than one of these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """half, single: operations per second in bfloat16 and float32. bandwidth, link: bytes per second of its memory, and
    between it and the host. memory: bytes. reserve: bytes that no role gets (contexts, libraries, fragments)."""

    name: str
    half: float
    single: float
    bandwidth: float
    link: float
    memory: float
    reserve: float = 2 * GIB

    def flops(self, dtype: str) -> float:
        return self.half if dtype == "bfloat16" else self.single

    @property
    def usable(self) -> float:
        return self.memory - self.reserve

    def given(self, flops: float | None, bandwidth: float | None, memory_gib: float | None) -> Device:
        """With figures of one's own in place of the table's."""
        own: dict[str, float] = {}
        if flops is not None:
            own |= {"half": flops, "single": flops}
        if bandwidth is not None:
            own["bandwidth"] = bandwidth
        if memory_gib is not None:
            own["memory"] = memory_gib * GIB
        return replace(self, name=f"{self.name}, figures given", **own) if own else self


GPUS = {
    # NVIDIA's data sheets of the SXM modules; float32 without TF32.
    "h200": Device("h200", 989e12, 67e12, 4.8e12, 64e9, 141 * GIB),
    "h100": Device("h100", 989e12, 67e12, 3.35e12, 64e9, 80 * GIB),
    "a100": Device("a100", 312e12, 19.5e12, 2.04e12, 32e9, 80 * GIB),
}
DEVICES = (*GPUS, "cpu")
CPU_FLOPS, CPU_BANDWIDTH = 80e9, 20e9
"""Of a core (32 operations in each of 2.5e9 cycles), and of two channels of memory."""


def device(name: str) -> Device:
    """A device of the table; `cpu` is the machine at hand, all its cores and memory."""
    if name in GPUS:
        return GPUS[name]
    if name != "cpu":
        raise ValueError(f"--device: {name!r} is none of {', '.join(DEVICES)}")
    cores, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", CPU_FLOPS * cores, CPU_FLOPS * cores, CPU_BANDWIDTH, CPU_BANDWIDTH, memory)


@dataclass(frozen=True)
class Figure:
    """A number, and where it comes from."""

    value: float
    source: str


ASSUMED = {"rollout": 0.4, "learner": 0.35, "forward": 0.45}
"""Shares of a device's limit: of decoding (of the roofline), of training and of scoring (of the products' peak)."""


def efficiencies(name: str, results: Path) -> dict[str, Figure]:
    """`ASSUMED`, with what the files in `results` measured on such a device in its place, the largest model first."""
    found = {kind: Figure(value, "assumed") for kind, value in ASSUMED.items()}
    ranks = dict.fromkeys(ASSUMED, -1)
    for path in sorted(results.glob("*.json")) if results.is_dir() else ():
        document = json.loads(path.read_text("utf-8"))
        if not isinstance(document, dict) or not _made_on(document, name):
            continue
        for kind, size, value in _shares(document):
            rank = ("tiny", "small", "1b", "7b").index(size)
            if rank > ranks[kind]:
                ranks[kind], found[kind] = rank, Figure(value, f"{path.name}, {size}")
    return found


def _made_on(document: dict[str, Any], name: str) -> bool:
    hardware = str(document.get("hardware", "")).lower()
    return name in hardware or (name == "cpu" and "cores" in hardware)


def _shares(document: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Kind, model size and share: of a file of benchmarks/rollout.py, learner.py or gpu_suite.py."""
    if "size" in document:
        if "share_of_limit" in document:
            yield "rollout", document["size"], document["share_of_limit"]
        if "mfu" in document:
            yield "learner", document["size"], document["mfu"]
    for name, part in document.get("parts", {}).items():
        shares = [
            r["share_of_limit"] for r in part.get("runs", ()) if r["engine"] == "native" and "share_of_limit" in r
        ]
        if shares:
            yield "rollout", name.split()[1], max(shares)
        if name.startswith("learner") and "mfu" in part:
            yield "learner", part["size"], part["mfu"]
