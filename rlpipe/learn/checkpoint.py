"""Checkpoints of a run: torch DCP for tensors, JSON for the rest, committed by a rename.

    checkpoints/step_000120/{.metadata, __0_0.distcp, ..., state.json}
    checkpoints/latest          the name of the last committed folder; written last

A folder exists under its final name only when everything in it is on disk; `state.json` lists its files with their
sizes and sums (CRC-32), its own included, so that a damaged one is recognised. Nothing in a checkpoint is unpickled
but DCP's index, and that through a reader that admits only the classes an index is made of.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rlpipe.learn.storage import CheckpointError, IndexReader, SummedWriter, file_crc32

log = logging.getLogger(__name__)

_STATE, _LATEST, _UNFINISHED, _REMOVED = "state.json", "latest", ".unfinished_", ".removed_"
_READERS = 8
"""Files of a checkpoint whose sums are taken at once."""
_CHANGES = 4
"""Times that a run may remove the checkpoint that somebody else is reading."""


class Checkpointable(Protocol):
    """What a learner offers; on several ranks the tensors may be shards (DTensor)."""

    rank: int
    world_size: int
    policy_version: int

    def state_dict(self) -> dict[str, torch.Tensor]: ...


class Restorable(Checkpointable, Protocol):
    """One that can also be loaded: `load_state_dict` gets the tensors of `state_dict`, changed in place."""

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """The state of a learner at one moment, for a save that goes on while it trains."""

    rank: int
    world_size: int
    policy_version: int
    tensors: dict[str, torch.Tensor]

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.tensors


def step_folder(checkpoints: str | Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimiser steps."""
    return Path(checkpoints) / f"step_{step:06d}"


def save_checkpoint(
    checkpoints: str | Path,
    step: int,
    learner: Checkpointable,
    driver: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of `step` and name it in `latest`; returns its folder.

    All ranks call this, on a file system they share.
    driver: what the driver needs to go on (step, data cursor, seeds, random states as lists), as JSON values.
    group:  of all ranks, for what they tell each other meanwhile; None: the default one.

    Raises CheckpointError, on every rank, if something could not be written; earlier checkpoints are there as before.
    """
    folder = step_folder(checkpoints, step)
    unfinished = folder.with_name(_UNFINISHED + folder.name)
    record = {"policy_version": learner.policy_version, "driver": dict(driver)}
    record = json.loads(json.dumps(record))  # fails before anything is written

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def commit() -> None:
        record["files"] = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
        record["crc32"] = {name: value for sums in everyone for name, value in sums.items()}
        _write(unfinished / _STATE, json.dumps({**record, "own_crc32": _own_crc32(record)}))
        _sync(unfinished)
        _remove(folder)
        unfinished.rename(folder)
        _sync(folder.parent)
        _write(folder.parent / _LATEST, folder.name)
        _sync(folder.parent)

    _by_first(begin, learner, group)
    writer = SummedWriter(unfinished)
    with _quiet(), _as_checkpoint_error(f"{folder}: not saved"):
        dcp.save(learner.state_dict(), storage_writer=writer, no_dist=learner.world_size == 1, process_group=group)
    everyone = [writer.sums] * learner.world_size
    if learner.world_size > 1:
        dist.all_gather_object(everyone, writer.sums, group=group)
    _by_first(commit, learner, group)
    return folder


def load_checkpoint(folder: str | Path, learner: Restorable) -> dict[str, Any]:
    """Restore the learner's tensors and policy version in place; returns the driver's state.

    Any number of ranks, under any strategy, may load what any number wrote. Of the folder's files only the sizes are
    looked at: `verify` and `latest_checkpoint` read them. Raises CheckpointError.
    """
    folder = Path(folder)
    record = _record(folder)
    state = learner.state_dict()
    reader = IndexReader(folder)
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
    with _quiet(), _as_checkpoint_error(f"{folder}: not loaded"):
        dcp.load(state, storage_reader=reader, no_dist=learner.world_size == 1)
    learner.load_state_dict(state)
    learner.policy_version = int(record["policy_version"])
    return record["driver"]


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """What trained, whole and in float32, by the names of the learner's parameters; no learner is needed.

    Raises CheckpointError, also for a damaged folder.
    """
    folder = Path(folder)
    verify(folder)
    reader = IndexReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith("model.")
    }
    with _quiet(), _as_checkpoint_error(f"{folder}: not loaded"):
        dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def read_newest_weights(checkpoints: str | Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The newest usable checkpoint of a run, which may be going on and remove old ones meanwhile, and its weights.

    Raises CheckpointError.
    """
    for _ in range(_CHANGES):
        folder = latest_checkpoint(checkpoints)
        if folder is None:
            break
        try:
            return folder, read_weights(folder)
        except (CheckpointError, OSError):
            if folder.exists():
                raise
    raise CheckpointError(f"{checkpoints}: no checkpoint to read; give the folder of a run that has saved one")


def latest_checkpoint(
    checkpoints: str | Path, passed_over: Callable[[CheckpointError], None] | None = None
) -> Path | None:
    """The newest usable checkpoint of a run, or None if it has none; its files have been read and compared.

    passed_over: told of each damaged one that is newer; else that is a warning.
    """
    checkpoints = Path(checkpoints)
    candidates = _newest_first(checkpoints)
    for folder in candidates:
        try:
            verify(folder)
        except CheckpointError as error:
            log.warning("checkpoint passed over: %s", error)
            if passed_over is not None:
                passed_over(error)
        else:
            return folder
    if candidates:
        raise CheckpointError(f"{checkpoints}: no usable checkpoint; set resume=never with a new run.dir to start over")
    return None


def _newest_first(checkpoints: Path) -> list[Path]:
    """What `latest` names, then what is older. Newer ones are of a run that went on from an earlier checkpoint.

    Folders are whole under their names, so that one without `latest` has lost it: then all of them.
    """
    latest = checkpoints / _LATEST
    names = sorted((path.name for path in checkpoints.glob("step_*")), reverse=True)
    if latest.is_file():
        named = latest.read_text().strip()
        names = [named, *(name for name in names if name < named)]
    return [checkpoints / name for name in names]


def verify(folder: str | Path) -> None:
    """Read a checkpoint and compare its files with the sizes and sums of `state.json`. Raises CheckpointError."""
    folder = Path(folder)
    sums = _record(folder)["crc32"]
    with ThreadPoolExecutor(_READERS) as pool, _as_checkpoint_error(f"{folder}: cannot be read"):
        for (name, expected), found in zip(sums.items(), pool.map(file_crc32, map(folder.joinpath, sums)), strict=True):
            if found != expected:
                raise CheckpointError(f"{folder}: {name} has CRC-32 {found:08x} instead of {expected:08x}")


def prune_checkpoints(checkpoints: str | Path, keep: int, every: int = 0) -> None:
    """Remove unfinished folders and all but the newest `keep` checkpoints.

    What `latest` names stays, and so do the checkpoints of every `every`-th step (0: of none).
    Nothing may be saved in the folder meanwhile. What the file system refuses is a warning, and is tried next time.
    """
    checkpoints = Path(checkpoints)
    for pattern in (_UNFINISHED, _REMOVED):
        for path in checkpoints.glob(pattern + "*"):
            shutil.rmtree(path, ignore_errors=True)
    latest = checkpoints / _LATEST
    with _as_warning(f"{checkpoints}: nothing removed"):
        name = latest.read_text().strip() if latest.is_file() else ""
        for path in sorted(checkpoints.glob("step_*"))[:-keep]:
            step = int(path.name.removeprefix("step_"))
            if path.name != name and not (every and step % every == 0):
                with _as_warning(f"{path}: not removed"):
                    _remove(path)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; whoever looks sees it whole or not at all."""
    if folder.exists():
        removed = folder.with_name(_REMOVED + folder.name)
        shutil.rmtree(removed, ignore_errors=True)
        shutil.rmtree(folder.rename(removed), ignore_errors=True)


def _by_first(work: Callable[[], None], learner: Checkpointable, group: dist.ProcessGroup | None) -> None:
    """Rank 0 works while the others wait; if that fails, it fails on all of them."""
    failure: list[str | None] = [None]
    if learner.rank == 0:
        try:
            work()
        except OSError as error:
            failure = [f"checkpoint: {type(error).__name__}: {error}"]
    if learner.world_size > 1:
        dist.broadcast_object_list(failure, src=0, group=group)
    if failure[0] is not None:
        raise CheckpointError(failure[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _as_checkpoint_error(what: str) -> Iterator[None]:
    """DCP's errors, which are no `Exception`, and those of files as one line."""
    try:
        yield
    except CheckpointException as error:
        _, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{what}: {type(cause).__name__}: {cause}") from error
    except OSError as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _as_warning(what: str) -> Iterator[None]:
    """Errors of files in the log alone."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s: %s", what, type(error).__name__, error)


def _record(folder: Path) -> dict[str, Any]:
    """The folder's state.json, after a look at the sizes of its files."""
    try:
        record = json.loads((folder / _STATE).read_text())
        own, files, *_ = (record.pop("own_crc32"), record["files"], record["crc32"], record["driver"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no complete {_STATE} ({error})") from error
    if own != _own_crc32(record):
        raise CheckpointError(f"{folder}: {_STATE} is not what was written")
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise CheckpointError(f"{folder}: {name} has {found} bytes instead of {size}")
    return record


def _own_crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


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
