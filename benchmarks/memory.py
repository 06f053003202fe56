"""The highest memory of a stretch of work: resident on a CPU, allocated on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """bytes: the highest amount, weights and interpreter included. added: what the work itself took on top."""

    bytes: int = 0
    added: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Fills its Peak when the block ends. Raises OSError on a CPU without Linux's /proc.

    with peak_memory("cpu") as peak:
        work()
    print(peak.added)
    """
    peak, cuda = Peak(), device.startswith("cuda")
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # What was freed before shall not be counted: the allocator gives it back, the kernel forgets the old peak.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        CLEAR.write_text("5")
        before = _resident("VmRSS")
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    peak.added = peak.bytes - before


def give_back_at_once() -> None:
    """From now on the C allocator returns every large block to the kernel when it is freed.

    By itself it learns to keep blocks of up to 32 MiB, which then count as resident. Slower: not for timing.
    """
    m_mmap_threshold = -3
    ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 20)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
