"""Checkpoints of a run: torch DCP for tensors, JSON for the rest, committed by a rename.

    checkpoints/step_000120/{.metadata, __0_0.distcp, ..., state.json}
    checkpoints/latest          the name of the last committed folder; written last

A folder exists under its final name only when everything in it is on disk; `state.json` lists its files and
their sizes, so that a damaged one is recognised. Nothing in a checkpoint is unpickled but DCP's index, and
that through a reader that admits only the classes an index is made of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

log = logging.getLogger(__name__)

_STATE, _LATEST, _UNFINISHED = "state.json", "latest", ".unfinished_"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be loaded; the message names the folder and what is wrong with it."""


class Checkpointable(Protocol):
    """What a learner offers; on several ranks the tensors may be shards (DTensor)."""

    rank: int
    world_size: int
    policy_version: int

    def state_dict(self) -> dict[str, torch.Tensor]: ...


def step_folder(checkpoints: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimiser steps."""
    return Path(checkpoints) / f"step_{step:06d}"


def save_checkpoint(checkpoints: str | Path, step: int, learner: Checkpointable, driver: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` and name it in `latest`; returns its folder.

    All ranks call this, on a file system they share.
    driver: what the driver needs to go on (step, data cursor, seeds, random states as lists), as JSON values.
    """
    folder = step_folder(checkpoints, step)
    unfinished = folder.with_name(_UNFINISHED + folder.name)
    if learner.rank == 0:
        record = {"policy_version": learner.policy_version, "driver": dict(driver)}
        json.dumps(record)  # fails before anything is written
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    _barrier(learner)
    writer = dcp.FileSystemWriter(unfinished, overwrite=False)
    with _quiet():
        dcp.save(learner.state_dict(), storage_writer=writer, no_dist=learner.world_size == 1)
    if learner.rank == 0:
        record["files"] = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        _write(unfinished / _STATE, json.dumps(record))
        _sync(unfinished)
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        _sync(folder.parent)
        _write(folder.parent / _LATEST, folder.name)
        _sync(folder.parent)
    _barrier(learner)
    return folder


def load_checkpoint(folder: str | Path, learner: Checkpointable) -> dict[str, Any]:
    """Restore the learner's tensors and policy version in place; returns the driver's state.

    Any number of ranks may load what any number wrote. Raises CheckpointError.
    """
    folder = Path(folder)
    record = _record(folder)
    state = learner.state_dict()
    reader = _IndexReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    for name in sorted(state.keys() ^ stored.keys()):
        side = "lacks" if name in state else "has an unknown"
        raise CheckpointError(f"{folder} {side} tensor {name!r}; was policy.trainable another one?")
    for name, tensor in state.items():
        if stored[name].size != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} is {tuple(stored[name].size)}, the policy's {tuple(tensor.shape)}; "
                "resume with the policy.path of the run"
            )
    with _quiet():
        dcp.load(state, storage_reader=reader, no_dist=learner.world_size == 1)
    learner.policy_version = int(record["policy_version"])
    return record["driver"]


def latest_checkpoint(checkpoints: str | Path) -> Path | None:
    """The newest usable checkpoint of a run, or None; a damaged one is passed over with a warning."""
    checkpoints = Path(checkpoints)
    latest = checkpoints / _LATEST
    if not latest.is_file():
        return None
    name = latest.read_text().strip()
    older = sorted((p.name for p in checkpoints.glob("step_*") if p.name < name), reverse=True)
    for candidate in [name, *older]:
        try:
            _record(checkpoints / candidate)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
        else:
            return checkpoints / candidate
    raise CheckpointError(f"{checkpoints}: no usable checkpoint; set resume=never with a new run.dir to start over")


def prune_checkpoints(checkpoints: str | Path, keep: int) -> None:
    """Remove unfinished folders and all but the newest `keep` checkpoints; what `latest` names stays."""
    checkpoints = Path(checkpoints)
    for path in checkpoints.glob(_UNFINISHED + "*"):
        shutil.rmtree(path)
    latest = checkpoints / _LATEST
    name = latest.read_text().strip() if latest.is_file() else ""
    for path in sorted(checkpoints.glob("step_*"))[:-keep]:
        if path.name != name:
            shutil.rmtree(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _record(folder: Path) -> dict[str, Any]:
    """The folder's state.json, after a look at its files."""
    try:
        record = json.loads((folder / _STATE).read_text())
        files, _, _ = record["files"], record["driver"], record["policy_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no complete {_STATE} ({error})") from error
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise CheckpointError(f"{folder}: {name} has {found} bytes instead of {size}")
    return record


def _write(path: Path, text: str) -> None:
    """Write a small file so that it is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _sync(folder: Path) -> None:
    """Put a folder's entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier(learner: Checkpointable) -> None:
    if learner.world_size > 1:
        dist.barrier()


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles a DCP index and refuses whatever else a file may name."""

    allowed = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "StorageMeta",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {
            "Size",
            *(str(d).removeprefix("torch.") for d in (torch.float32, torch.bfloat16, torch.int64)),
        },
        "pathlib": {"Path", "PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self.allowed.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"checkpoint index names {module}.{name}, which is no part of one")


class _IndexReader(dcp.FileSystemReader):
    """DCP's reader, its index unpickled with care; DCP itself reads tensors with weights_only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
