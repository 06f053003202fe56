"""DCP files, written with sums of what is written, and read without unpickling anything strange."""

from __future__ import annotations

import contextlib
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_READ_BYTES = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or loaded; the message names the folder and what is wrong with it."""


class SummedWriter(dcp.FileSystemWriter):
    """DCP's writer; `sums` are the CRC-32 of the files that this rank has written, by name.

    The sums are of what was to be written, so that they also tell of what a disk made of it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)
        self.fs = _SummedFiles()

    @property
    def sums(self) -> dict[str, int]:
        return self.fs.sums


class _SummedFiles(FileSystem):
    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    @contextlib.contextmanager
    def create_stream(self, path: Path, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            summed = _SummedStream(stream)
            yield summed
        self.sums[Path(path).name] = summed.crc32

    def rename(self, path: Path, new_path: Path) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _SummedStream:
    """A stream that is written from its start to its end."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.crc32 = stream, 0

    def write(self, data: Any) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as stream:
        while data := stream.read(_READ_BYTES):
            value = zlib.crc32(data, value)
    return value


class IndexReader(dcp.FileSystemReader):
    """DCP's reader, its index unpickled with care; DCP itself reads tensors with weights_only.

    Raises CheckpointError for an index that names other classes than one is made of.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _IndexUnpickler(stream).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
