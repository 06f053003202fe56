"""Images that are scored in bulk: what is asked about which, and what is left of the answers.

    <out>/scores.jsonl         a row an image: that of the input with "scores" by scorer and their weighted sum
    <out>/shards/00003.jsonl   scores of one shard of images: there as a whole or not at all
    <out>/settings.json        what the scores depend on

Images are named by a JSONL of {"image": path, "prompt": text or "id" of a row of score.prompts}, with "metadata",
"source_image", "verdict" and "label" where there are some; by a folder of images; or by a results folder of
`rlpipe.data.outputs`. Paths in a JSONL are relative to its folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from rlpipe.data.labels import write_rows
from rlpipe.data.outputs import IMAGE_SUFFIXES, fingerprint
from rlpipe.data.prompts import METADATA_KEYS, PromptError, load_prompts, read_jsonl
from rlpipe.limits import ALSO_SEEN
from rlpipe.paths import resolve_path
from rlpipe.schema import Config, ScorerSection, ScoreSection
from rlpipe.types import Prompt, Score, ScoreRequest

SCORES = "scores.jsonl"
HOW_FAST = ("weight", "rewards", "canary", "replicas", "num_cpus", "num_gpus", "threads", "batch_size", "concurrency")
HOW_PATIENT = ("timeout_s", "retries", "backoff_s", "cache")
"""Keys of a scorer's section that change no score of it."""
WHERE = ("url", "api_key_env", "concurrency", "timeout_s", "retries")
"""Keys of the mappings in a scorer's `options` (engine, writer) that change no score of it."""

Where = tuple[str, Any]


class ScoredError(PromptError):
    """Images or scores that cannot be used; one line a problem."""


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image to score. `fields` is the row it comes from, `image` and `source_image` are absolute paths."""

    image: str
    prompt: Prompt
    source_image: str | None
    verdict: str | None
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """Some images that are scored together and written as one."""

    index: int
    rows: tuple[ImageRow, ...]

    def path(self, out: str | Path) -> Path:
        return Path(out) / "shards" / f"{self.index:05d}.jsonl"


def load_rows(section: ScoreSection) -> list[ImageRow]:
    """The images of `score.images`, in order. Raises ScoredError naming file and line of each bad row.

    Every image is looked for; none is decoded.
    """
    path = resolve_path(section.images)
    if not path.exists():
        raise ScoredError([f"score.images: {path} does not exist; give a folder of images or a .jsonl file"])
    prompts = {}
    if section.prompts:
        try:
            prompts = {prompt.id: prompt for prompt in load_prompts(section.prompts)}
        except PromptError as error:
            raise ScoredError([f"score.prompts: {line}" for line in error.problems]) from error
    rows, problems = [], []
    for number, (where, fields) in enumerate(_named(path, section.which), 1):
        try:
            rows.append(_image_row(fields, path, number, prompts, section.caption.strip()))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems or not rows:
        raise ScoredError(problems or [f"score.images: no images in {path}"])
    return rows[: section.limit or None]


def _named(path: Path, which: str) -> Iterator[Where]:
    """Where an image is named, and its row (or the ValueError that came of it)."""
    if path.is_file():
        if path.suffix != ".jsonl":
            raise ScoredError([f"score.images: {path} is no .jsonl file; give one, or a folder of images"])
        yield from read_jsonl(path)
    elif (path / "settings.yaml").is_file():
        yield from _results(path, which)
    else:
        for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES):
            yield str(file), {"image": str(file.relative_to(path))}


def _results(folder: Path, which: str) -> Iterator[Where]:
    """Rows of a results folder of `launch/generate.py`: its images with what was said of them."""
    records = next((file for name in ("reason", "samples") if (file := folder / f"{name}.jsonl").is_file()), None)
    if records is None:
        raise ScoredError([f"score.images: {folder} holds no reason.jsonl or samples.jsonl; let generation finish"])
    program = (yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8")) or {}).get("program")
    for where, row in read_jsonl(records):
        if isinstance(row, ValueError) or not {"filename", "images", "prompt"} <= set(row):
            yield where, row if isinstance(row, ValueError) else ValueError("no row of a sample; delete the line")
            continue
        common = {key: row[key] for key in ("id", "prompt", "sample") if key in row}
        remarks = row.get("rounds") or ([row] if "correct" in row else [])
        if program == "look":
            yield where, {"image": row["source_image"], **common, "verdict": row["reason"]}
            continue
        if program == "edit":
            common["source_image"] = row["source_image"]
        count = row["images"]
        accepted = next((i for i, remark in enumerate(remarks) if remark["correct"]), count - 1)
        chosen = {"every": range(count), "first": (0,), "final": (accepted,)}[which]
        for i in chosen:
            file = f"rounds/{Path(row['filename']).stem}_{i + 1}.png"
            if i in (0, accepted):
                file = f"{'regen_samples' if i else 'samples'}/{row['filename']}"
            verdict = {"verdict": remarks[i]["reason"]} if i < len(remarks) else {}
            yield where, {"image": file, **common, "round": i + 1, "final": i == accepted, **verdict}


def _image_row(fields: Any, path: Path, number: int, prompts: Mapping[str, Prompt], caption: str) -> ImageRow:
    """A row with its prompt and its files; ValueError says what is wrong with it."""
    if isinstance(fields, ValueError):
        raise fields
    if not isinstance(fields, Mapping):
        raise ValueError(f'a {type(fields).__name__}; give an object such as {{"image": "a.png", "prompt": "a cat"}}')
    folder = path if path.is_dir() else path.parent
    image = _file(fields, "image", folder)
    if image is None:
        raise ValueError("image is missing; give the path of an image")
    verdict = fields.get("verdict")
    if not isinstance(verdict, str | None):
        raise ValueError(f"verdict is {verdict!r}; give a text")
    label = fields.get("label")
    if label is not None and not (isinstance(label, bool | int | float) and math.isfinite(label)):
        raise ValueError(f"label is {label!r}; give true, false or a number")
    prompt = _prompt(fields, f"{path.stem}-{number:05d}", prompts, caption)
    return ImageRow(image, prompt, _file(fields, "source_image", folder), verdict, fields)


def _prompt(fields: Mapping[str, Any], default_id: str, prompts: Mapping[str, Prompt], caption: str) -> Prompt:
    """The row's own text, that of its id, or the caption; metadata is the row's own, or that of its id."""
    name, text = fields.get("id"), fields.get("prompt")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError(f"id is {name!r}; give a text or a whole number, or leave it out")
    if not isinstance(text, str | None):
        raise ValueError(f"prompt is {text!r}; give a text")
    known = prompts.get(str(name))
    if not text and name is not None and known is None and not caption:
        raise ValueError(f"no prompt, and id {name!r} is none of score.prompts; give one of the two")
    if text and known is not None and text.strip() != known.text:
        raise ValueError(f"prompt {text!r} is not that of id {name!r} in score.prompts; give the right file")
    metadata = fields.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata is {metadata!r}; give an object")
    metadata = {**(known.metadata if known else {}), **metadata}
    metadata |= {key: fields[key] for key in METADATA_KEYS if key in fields}
    for key, kind in METADATA_KEYS.items():
        if key in metadata and not isinstance(metadata[key], kind):
            raise ValueError(f"{key} is {metadata[key]!r}; give a {'list' if kind is list else 'text'}")
    text = text.strip() if text else known.text if known else caption
    return Prompt(default_id if name is None else str(name), text, metadata)


def _file(fields: Mapping[str, Any], key: str, folder: Path) -> str | None:
    """The absolute path of a row's file; None if it names none."""
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not (folder / value).is_file():
        raise ValueError(f"{key} is {value!r}; no such file in {folder}")
    return str((folder / value).absolute())


def shards_of(rows: Sequence[ImageRow], size: int) -> list[Shard]:
    return [Shard(i, tuple(rows[start : start + size])) for i, start in enumerate(range(0, len(rows), size))]


def read_requests(rows: Sequence[ImageRow], with_sources: bool) -> tuple[dict[int, str], list[ScoreRequest]]:
    """Per unreadable row, by its place, the reason; and the requests of the others, whose ids are their places."""
    unreadable: dict[int, str] = {}
    requests: list[ScoreRequest] = []
    for i, row in enumerate(rows):
        try:
            image = _pixels(row.image)
            source = _pixels(row.source_image) if row.source_image and with_sources else None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unreadable[i] = f"image cannot be read: {' '.join(str(error).split())}"
        else:
            requests.append(ScoreRequest(str(i), row.prompt, image, source, row.verdict))
    return unreadable, requests


def _pixels(path: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def scores_row(row: ImageRow, scores: Mapping[str, Score]) -> dict[str, Any]:
    """What a shard keeps of one image: its scores by scorer, to six digits, a missing one as null with the reason."""
    answers = {
        name: {"value": _short(s.value), "parts": {k: _short(v) for k, v in s.parts.items()}, "error": s.error}
        for name, s in scores.items()
    }
    return {"image": row.image, "id": row.prompt.id, "scores": answers}


def _short(value: float | None) -> float | None:
    # Beyond six digits a float32 score depends on what else is in its batch.
    return None if value is None else float(f"{value:.6g}")


def read_shard(shard: Shard, out: str | Path, scorers: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows of a finished shard; None if it is not there, torn, or another's."""
    path = shard.path(out)
    try:
        rows = [row for _, row in read_jsonl(path)]
    except (OSError, UnicodeDecodeError):
        return None
    if len(rows) != len(shard.rows):
        return None
    for row, wanted in zip(rows, shard.rows, strict=True):
        if not isinstance(row, Mapping) or (row.get("image"), row.get("id")) != (wanted.image, wanted.prompt.id):
            return None
        scores = row.get("scores")
        if not isinstance(scores, Mapping) or set(scores) != set(scorers):
            return None
        if not all(isinstance(score, Mapping) and "value" in score for score in scores.values()):
            return None
    return rows


def is_missing(row: Mapping[str, Any]) -> bool:
    """Whether any scorer's value of this row is missing."""
    return any(score["value"] is None for score in row["scores"].values())


def weighted_sum(sections: Sequence[ScorerSection], scores: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Sum over the scorers of the reward `generation`, by weight; None without any, or if one of them is missing."""
    pairs = [(s.weight, scores[s.name]["value"]) for s in sections if s.weight and "generation" in s.rewards]
    if not pairs or any(value is None for _, value in pairs):
        return None
    return float(sum(weight * value for weight, value in pairs))


def join_shards(shards: Sequence[Shard], sections: Sequence[ScorerSection], out: str | Path) -> Path:
    """Write scores.jsonl of all shards, which are all there; its path."""
    path, names = Path(out) / SCORES, [section.name for section in sections]

    def joined() -> Iterator[dict[str, Any]]:
        for shard in shards:
            for row, answer in zip(shard.rows, read_shard(shard, out, names) or (), strict=True):
                fields = {key: value for key, value in row.fields.items() if key not in METADATA_KEYS}
                fields |= {"image": row.image, "id": row.prompt.id, "prompt": row.prompt.text}
                fields |= {"source_image": row.source_image} if row.source_image else {}
                fields |= {"metadata": dict(row.prompt.metadata)} if row.prompt.metadata else {}
                # Images that come with other scorers' scores, from an earlier scores.jsonl, keep them.
                fields["scores"] = {**(fields.get("scores") or {}), **answer["scores"]}
                yield {**fields, "reward": weighted_sum(sections, answer["scores"])}

    write_rows(path, joined())
    return path


def settings_of(config: Config, rows: Sequence[ImageRow]) -> dict[str, Any]:
    """What the scores depend on, as JSON: another run may go on with them only if all of it is the same."""
    settings: dict[str, Any] = {
        "images": _digest([(file, *_stamp(file)) for file in (r.image, r.source_image) if file] for r in rows),
        "prompts": _digest([r.prompt.id, r.prompt.text, dict(r.prompt.metadata)] for r in rows),
        "verdicts": _digest(r.verdict for r in rows),
        "score.shard_size": config.score.shard_size,
    }
    for section in config.reward:
        values = {key: value for key, value in asdict(section).items() if key not in (*HOW_FAST, *HOW_PATIENT)}
        path = resolve_path(section.path) if section.path else None
        values["path"] = None if path is None else f"{path} {fingerprint(path) if path.is_dir() else ''}".strip()
        values["sees"] = [value for value in ALSO_SEEN if value in section.sees]
        for key, option in values["options"].items():
            if isinstance(option, Mapping):
                values["options"][key] = {name: value for name, value in option.items() if name not in WHERE}
        settings |= {f"reward[{section.name}].{key}": value for key, value in values.items() if key != "name"}
    return json.loads(json.dumps(settings, default=str))


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _stamp(file: str) -> tuple[int, int]:
    """Size in bytes and time of the last change: whether a file is still the one that was scored."""
    stat = Path(file).stat()
    return stat.st_size, stat.st_mtime_ns


def changed_settings(out: str | Path, now: Mapping[str, Any]) -> str | None:
    """Why scores of these settings cannot go into a folder as it is; None if they can."""
    path = Path(out) / "settings.json"
    if not path.is_file():
        taken = Path(out) / SCORES
        return f"score.out: {taken} is there without settings.json; give another folder" if taken.exists() else None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return f"score.out: {path} is not JSON; delete it or give another folder"
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not keys:
        return None
    changed = ", ".join(f"{key} ({before.get(key)!r} -> {now.get(key)!r})" for key in keys)
    return f"score.out: {out} holds scores of other settings: {changed}; give another folder"


def begin(out: str | Path, settings: Mapping[str, Any]) -> None:
    """Make the folder and note its settings; raises ScoredError where it holds scores of others."""
    if problem := changed_settings(out, settings):
        raise ScoredError([problem])
    write_rows(Path(out) / "settings.json", [settings])


def score_problems(config: Config) -> Iterator[str]:
    """What keeps images from being scored, one line each."""
    section = config.score
    if not section.images:
        yield "score.images: empty; give a folder of images or a .jsonl file"
        return
    if not section.out or Path(section.out).is_file():
        yield f"score.out: {section.out!r} is no folder; give the folder of the scores"
        return
    if not config.reward:
        yield "reward: no scorers; give one, e.g. `- name: judge`"
    if section.world and not resolve_path(section.images).exists():
        if not section.images.endswith(".jsonl"):
            yield f"score.images: {section.images} is no .jsonl file, which score.world has to write; name one"
        return
    missing = [s.path for s in config.reward if s.path is not None and not resolve_path(s.path).exists()]
    try:
        rows = load_rows(section)
        problem = None if missing else changed_settings(section.out, settings_of(config, rows))
        yield from [problem] if problem else []
    except PromptError as error:
        yield from error.problems
