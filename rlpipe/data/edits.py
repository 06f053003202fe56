"""Edits to learn: pairs of images with the instruction that leads from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.data.prompts import LabelError, read_jsonl
from rlpipe.paths import resolve_path


@dataclass(frozen=True, slots=True)
class EditPair:
    """An edit to learn: paths of the source and of the target, and the instruction."""

    id: str
    source: str
    target: str
    instruction: str


EDIT_KEYS = {"source": ("image1", "input"), "target": ("image2", "output"), "instruction": ("text",)}
"""Keys of a row; the second names are those of the official supervised files."""


def load_edits(path: str | Path) -> list[EditPair]:
    """Read {"image1": source, "image2": target, "text": instruction} rows; images relative to the file's folder.

    Raises LabelError naming file and line of each bad row.
    """
    path = resolve_path(path)
    if not path.is_file():
        raise LabelError([f"sft.edits: {path} does not exist; give a .jsonl file of image1, image2 and text"])
    pairs, problems = [], []
    for number, (where, row) in enumerate(read_jsonl(path), 1):
        wrong, fields = _edit_fields(row, path.parent)
        problems += [f"{where}: {line}" for line in wrong]
        if not wrong:
            pairs.append(EditPair(f"{path.stem}-{number:06d}", **fields))
    if problems or not pairs:
        raise LabelError(problems or [f"sft.edits: {path} has no rows"])
    return pairs


def _edit_fields(row: Any, folder: Path) -> tuple[list[str], dict[str, str]]:
    if isinstance(row, ValueError):
        return [str(row)], {}
    if not isinstance(row, Mapping):
        return [f"a {type(row).__name__}; give an object with image1, image2 and text"], {}
    wrong, fields = [], {}
    for name, keys in EDIT_KEYS.items():
        key = next((key for key in keys if key in row), keys[0])
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            wrong.append(f"{key} is {value!r}; give a text")
        elif name != "instruction" and not (folder / value).is_file():
            wrong.append(f"{key} is {value!r}; no such file in {folder}")
        fields[name] = str(folder / str(value)) if name != "instruction" else str(value)
    return wrong, fields
