"""VQ codes and pixels of image files: each file is encoded once, and at most so many decoded ones stay in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.pixels import load_image

ENCODE_BATCH = 16
KEY_BYTES = 16


class ImageStore:
    """Pixels and codes of image files, by path.

    Codes are kept in one file of fixed-size records (key, codes), to which new ones are appended; a record that a
    crash cut short is dropped. A key is of path, size and time of change, the file's name of the VQ tokenizer's
    weights, so neither a changed image nor another tokenizer gets old codes. One process writes to a folder.

        store = ImageStore(policy, "runs/mine/codes", pixel_cache=512)
        codes = store.codes(["a.png", "b.png"])        # int64 [2, N]
        images = store.pixels(["a.png", "b.png"], "pad")      # uint8 [2, H, W, 3]
    """

    def __init__(
        self, policy: JanusPolicy, folder: str | Path | None, pixel_cache: int = 512, threads: int = 2
    ) -> None:
        self.policy, self.pixel_cache, self.threads = policy, pixel_cache, threads
        self._pixels: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._stored: dict[bytes, int] = {}
        self._new: dict[bytes, np.ndarray] = {}
        self.record = np.dtype([("key", f"S{KEY_BYTES * 2}"), ("codes", "<i4", (policy.num_image_tokens,))])
        self.path = None if folder is None else Path(folder) / f"{vq_fingerprint(policy)}.codes"
        self.num_encoded = 0
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._read()

    def _read(self) -> None:
        size = self.path.stat().st_size if self.path.is_file() else 0
        count = size // self.record.itemsize
        if size % self.record.itemsize:
            with self.path.open("r+b") as file:
                file.truncate(count * self.record.itemsize)
        if count:
            # Mapped, not read: the codes of a large set stay on disk until they are asked for.
            self._records = np.memmap(self.path, dtype=self.record, mode="r", shape=(count,))
            self._stored = {key: number for number, key in enumerate(self._records["key"].tolist())}

    def codes(self, paths: Sequence[str]) -> np.ndarray:
        """int64 [len(paths), N]; files that are not known yet are encoded first."""
        keys = [_key(path) for path in paths]
        unknown = {k: path for k, path in zip(keys, paths, strict=True) if k not in self._stored and k not in self._new}
        names = list(unknown)
        for start in range(0, len(names), ENCODE_BATCH):
            part = names[start : start + ENCODE_BATCH]
            images = torch.from_numpy(self.pixels([unknown[key] for key in part], "crop"))
            encoded = self.policy.encode_pixels(images).cpu().numpy().astype(np.int32)
            self._new |= dict(zip(part, encoded, strict=True))
            self._append(part, encoded)
        self.num_encoded += len(names)
        rows = [self._new[k] if k in self._new else self._records["codes"][self._stored[k]] for k in keys]
        return np.stack(rows).astype(np.int64)

    def _append(self, keys: list[bytes], codes: np.ndarray) -> None:
        if self.path is not None:
            records = np.zeros(len(keys), self.record)
            records["key"], records["codes"] = keys, codes
            with self.path.open("ab") as file:
                file.write(records.tobytes())

    def pixels(self, paths: Sequence[str], square: str) -> np.ndarray:
        """uint8 [len(paths), H, W, 3] at the policy's size; `square` as in `load_image`: crop to draw, pad to look."""
        keys = [(path, square) for path in paths]
        new = [key for key in dict.fromkeys(keys) if key not in self._pixels]
        with ThreadPoolExecutor(self.threads) as executor:
            loaded = dict(zip(new, executor.map(self._load, new), strict=True))
        found = {key: loaded[key] if key in loaded else self._pixels[key] for key in keys}
        for key, image in found.items():
            self._pixels[key] = image
            self._pixels.move_to_end(key)
        while len(self._pixels) > self.pixel_cache:
            self._pixels.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def _load(self, key: tuple[str, str]) -> np.ndarray:
        path, square = key
        return load_image(path, self.policy.image_size, square)


def _key(path: str) -> bytes:
    """Of what tells one state of a file from another, in hexadecimal: it never ends in a zero byte."""
    state = Path(path).stat()
    text = f"{path}\n{state.st_size}\n{state.st_mtime_ns}"
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest().encode()


def vq_fingerprint(policy: JanusPolicy) -> str:
    """Sixteen hexadecimal digits of the VQ tokenizer's weights, their type and the image size."""
    digest = hashlib.blake2b(str(policy.image_size).encode(), digest_size=8)
    for name, tensor in sorted(policy.janus.model.vqmodel.state_dict().items()):
        digest.update(f"{name} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
