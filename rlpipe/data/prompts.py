"""Prompt files, local only, and the endless shuffled stream of prompts that training reads."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe.paths import resolve_path
from rlpipe.types import Prompt

METADATA_KEYS = {"tag": str, "include": list, "exclude": list}
"""GenEval's columns beside `prompt`, and the type of each."""
COLUMNS = {"prompt", "id", "metadata", "source_image", *METADATA_KEYS}
MAX_TOLD = 10

Rows = list[tuple[str, Any]]
"""Where a row stands ("prompts.jsonl:3") and what it holds; a row that could not be read holds its error."""


class PromptError(ValueError):
    """Prompts that cannot be used; `problems` names file and line of up to ten bad rows."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems[:MAX_TOLD])
        if len(problems) > MAX_TOLD:
            self.problems.append(f"and {len(problems) - MAX_TOLD} more problems")
        super().__init__("\n".join(self.problems))


class LabelError(PromptError):
    """Supervised examples that cannot be used; `problems` names file and line of up to ten bad rows."""


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a .txt (one a line), .jsonl or .parquet file, or a folder that `datasets` can load.

    Columns: `prompt`; optionally `id` (else file name and line), `tag`, `include` and `exclude` (GenEval's
    schema; they become `Prompt.metadata`, over what a `metadata` object holds) and `source_image` (a path,
    relative to the file's folder). Other columns are ignored. Nothing is fetched. Raises PromptError naming
    file and line of each bad row.
    """
    path = resolve_path(path)
    if not path.exists():
        raise PromptError([f"{path} does not exist; give a .txt, .jsonl or .parquet file or a folder"])
    readers = {".txt": _read_text, ".jsonl": read_jsonl, ".parquet": _read_parquet}
    if path.is_file() and path.suffix not in readers:
        raise PromptError([f"{path}: no .txt, .jsonl or .parquet file; convert it"])
    try:
        rows = _read_folder(path) if path.is_dir() else readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise PromptError([f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"]) from error
    if not rows:
        raise PromptError([f"{path}: no prompts in it"])
    folder = path if path.is_dir() else path.parent
    prompts, problems, seen = [], [], {}
    for number, (where, row) in enumerate(rows, 1):
        wrong, fields = _check(row, folder)
        name = fields.setdefault("id", f"{path.stem}-{number:05d}")
        if not wrong and name in seen:
            wrong = [f"id {name!r} is taken by {seen[name]}; give every row its own"]
        seen.setdefault(name, where)
        problems += [f"{where}: {line}" for line in wrong]
        if not wrong:
            prompts.append(Prompt(**fields))
    if problems:
        raise PromptError(problems)
    return prompts


def _read_text(path: Path) -> Rows:
    lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    return [(f"{path}:{i}", {"prompt": line}) for i, line in enumerate(lines, 1)]


def read_jsonl(path: Path) -> Rows:
    """Rows of a JSONL file; one that is not JSON holds its ValueError."""
    rows: Rows = []
    text = path.read_text(encoding="utf-8").rstrip()
    # Split at line feeds only: JSON strings may hold the other separators that str.splitlines splits at.
    for i, line in enumerate(text.split("\n") if text else (), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = ValueError(f"not JSON ({error.msg} at column {error.colno}); give one object a line")
        rows.append((f"{path}:{i}", row))
    return rows


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError([f"{path}: not a parquet file ({_first_line(error)})"]) from error
    return _rows_of(path, table.column_names, table.to_pylist())


def _read_folder(path: Path) -> Rows:
    """A folder of `save_to_disk`, or of data files that `load_dataset` recognises; one split."""
    import datasets

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    with tempfile.TemporaryDirectory() as cache:
        try:
            if saved:
                loaded = datasets.load_from_disk(path)
            else:
                loaded = datasets.load_dataset(str(path), cache_dir=cache)
        except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
            raise PromptError([f"{path}: `datasets` cannot load it ({_first_line(error)})"]) from error
        if isinstance(loaded, dict):
            if len(loaded) != 1:
                raise PromptError([f"{path}: has the splits {', '.join(loaded)}; give the folder of one"])
            loaded = next(iter(loaded.values()))
        names = [name for name in loaded.column_names if name in COLUMNS]
        return _rows_of(path, names, loaded.select_columns(names).to_list() if "prompt" in names else [])


def _rows_of(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Rows:
    """Rows of a table, where every row has every column: a null is an absent value."""
    if "prompt" not in columns:
        raise PromptError([f"{path}: no column `prompt` among {', '.join(columns) or 'none'}"])
    return [(f"{path}: row {i}", _without_nulls(row)) for i, row in enumerate(rows, 1)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check(row: Any, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a row, and the arguments of its Prompt as far as they are right."""
    if isinstance(row, ValueError):
        return [str(row)], {}
    if not isinstance(row, Mapping):
        return [f"a {type(row).__name__}; give an object with the key `prompt`"], {}
    wrong: list[str] = []
    fields: dict[str, Any] = {}
    text = row.get("prompt")
    if not isinstance(text, str):
        wrong.append(f"prompt is {'missing' if text is None else repr(text)}; give a text")
    elif not text.strip():
        wrong.append("prompt is empty; give a text or delete the row")
    else:
        fields["text"] = text.strip()
    name = row.get("id")
    if isinstance(name, bool) or not isinstance(name, str | int | None) or name == "":
        wrong.append(f"id is {name!r}; give a text or a whole number, or leave it out")
    elif name is not None:
        fields["id"] = str(name)
    metadata = row.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        wrong.append(f"metadata is {metadata!r}; give an object")
        metadata = {}
    fields["metadata"] = {**metadata, **{key: row[key] for key in METADATA_KEYS if key in row}}
    for key, kind in METADATA_KEYS.items():
        value = fields["metadata"].get(key)
        if key in fields["metadata"] and not isinstance(value, kind):
            wrong.append(f"{key} is {value!r}; give a {'list' if kind is list else 'text'}")
        elif kind is list and not all(isinstance(item, Mapping) for item in value or ()):
            wrong.append(f"{key} is {value!r}; give objects such as {{'class': 'circle', 'count': 1}}")
    source = row.get("source_image")
    if source is not None and not (isinstance(source, str) and (folder / source).is_file()):
        wrong.append(f"source_image is {source!r}; no such file in {folder}")
    elif source is not None:
        fields["source_image"] = str(folder / source)
    return wrong, fields


class PromptCursor:
    """An endless stream over prompts, reshuffled in every epoch, that stops and resumes anywhere.

    Within an epoch every prompt comes once; a batch may span two epochs. The order depends on seed, epoch and
    the number of prompts alone.

        cursor = PromptCursor(load_prompts("prompts.jsonl"), seed=0)
        batch = cursor.next(16)                   # [(0, Prompt), (1, Prompt), ...]
        resumed = PromptCursor(prompts, seed=0)
        resumed.restore(cursor.state())
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 0, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("data.prompts: no prompts to draw from")
        self._prompts = list(prompts)
        self._identity = {"prompts": _content_hash(prompts), "seed": seed, "shuffle": shuffle}
        self._position = 0
        self._epoch = -1
        self._order: np.ndarray = np.arange(0)

    def next(self, n: int) -> list[tuple[int, Prompt]]:
        """The next n prompts, each with its place in the stream, counted from 0 over all epochs."""
        drawn = []
        for _ in range(n):
            epoch, offset = divmod(self._position, len(self._prompts))
            drawn.append((self._position, self._prompts[self._order_of(epoch)[offset]]))
            self._position += 1
        return drawn

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON types: the place in the stream and what identifies the stream."""
        return {**self._identity, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to where a cursor over the same stream stood; another file, seed or order is a PromptError."""
        keys = {"prompts": "data.prompts", "seed": "seed", "shuffle": "data.shuffle"}
        for key, mine in self._identity.items():
            if state[key] != mine:
                raise PromptError(
                    [
                        f"{keys[key]}: {mine} is not the checkpoint's {state[key]}: prompts would be skipped or "
                        f"repeated; resume with the same {keys[key]} or start a new run"
                    ]
                )
        self._position = int(state["position"])

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch = epoch
            count = len(self._prompts)
            # The pair, not the sum: seed 0's second epoch is not seed 1's first.
            generator = np.random.default_rng((self._identity["seed"], epoch))
            self._order = generator.permutation(count) if self._identity["shuffle"] else np.arange(count)
        return self._order


def _content_hash(prompts: Sequence[Prompt]) -> str:
    """Of what the prompts say, not of where their file or images lie."""
    digest = hashlib.sha256()
    for p in prompts:
        image = Path(p.source_image).name if p.source_image else None
        row = [p.id, p.text, dict(p.metadata), image]
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
