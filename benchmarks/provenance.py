"""Where a result comes from: what every file in benchmarks/results says of itself."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlpipe.paths import ROOT


def provenance(threads: int | None = None, device: str = "cpu", packages: Iterable[str] = ()) -> dict[str, Any]:
    """Command, commit and hardware of this process; versions of those of `packages` that are installed.

    provenance(threads=1, packages=["torch"])
    {"command": "python ...", "commit": "45d2...", "hardware": "x86_64, 2 cores, 1 thread", "versions": {...}}
    """
    command = shlex.join(["python", *map(_portable, sys.argv)])
    found = {"command": command, "commit": commit(), "hardware": hardware(threads, device)}
    versions = {name: number for name in packages if (number := _version(name))}
    return found | ({"versions": versions} if versions else {})


def commit() -> str:
    """Hash of the checkout's commit, with a + behind it where tracked code differs from it; empty outside a clone."""
    found = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return found + "+" if changed else found


def hardware(threads: int | None = None, device: str = "cpu") -> str:
    """Name of the GPU, or processor, cores and threads of the CPU."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    cores = f"{platform.machine()}, {os.cpu_count()} cores"
    return cores if threads is None else f"{cores}, {threads} thread{'s' * (threads != 1)}"


def write(path: Path | None, document: Any) -> None:
    """The document as JSON, with the folders it lies in; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def _portable(argument: str) -> str:
    """The argument without a folder of this machine: relative to the checkout, or a path outside of it by its name."""
    key, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(ROOT)
    return key + equals + (path.relative_to(ROOT).as_posix() if inside else path.name)


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # a machine without git
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
