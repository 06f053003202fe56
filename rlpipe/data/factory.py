"""The set that supervised fine-tuning learns from: images of every prompt, a judge's score and reason, label files.

    <out>/images/<source>/<promptid>_<id>.png     an image that was drawn here
    <out>/shards/<source>/00003.jsonl             labels of one shard of prompts: there as a whole or not at all
    <out>/labels/<source>_<threshold>.jsonl       all shards of a source, once they are there (official layout)
    <out>/settings.json                           what the labels depend on

`promptid` is the prompt's place in data.prompts, counted from 0.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlpipe.data.labels import normalised, says, write_rows
from rlpipe.data.prompts import PromptError, load_prompts, read_jsonl
from rlpipe.paths import resolve_path
from rlpipe.schema import Config, FactorySection
from rlpipe.types import Prompt, Score

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CHANGE_NO_LABEL = ("out", "max_failed_share")
"""Keys of `factory` that may differ where a set is gone on with."""


class FactoryError(PromptError):
    """A set that cannot be built; one line a problem."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Some prompts of one source. `files[i]`: images made elsewhere of prompt i; empty where the policy draws."""

    source: str
    index: int
    promptids: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    files: tuple[tuple[str, ...], ...] = ()

    def path(self, out: str | Path) -> Path:
        return Path(out) / "shards" / self.source / f"{self.index:05d}.jsonl"


def state_of(prob: float, verdict: bool | None, section: FactorySection) -> int:
    """The state of a label by its score and what the reason says; see `rlpipe.data.labels`.

    2 where the score lies between the two bounds or the reason says neither Yes nor No.
    """
    if verdict is None or section.negative_prob <= prob < section.positive_prob:
        return 2
    if prob >= section.positive_prob:
        return 4 if verdict else 1
    return 3 if verdict else 0


def label_row(
    shard: Shard,
    number: int,
    paths: Sequence[str],
    scores: Sequence[Score],
    reasons: Sequence[str | None],
    section: FactorySection,
) -> dict[str, Any]:
    """The label of the shard's prompt `number`; images without score or reason are left out."""
    data = [
        {
            "id": i,
            "img_path": path,
            "reason": normalised(reason),
            "prob": round(score.value, 4),
            "state": state_of(score.value, says(reason), section),
        }
        for i, (path, score, reason) in enumerate(zip(paths, scores, reasons, strict=True))
        if not score.missing and reason is not None
    ]
    return {"promptid": shard.promptids[number], "prompt": shard.prompts[number].text, "data": data}


def shards_of(config: Config) -> list[Shard]:
    """All shards: those that the policy draws, then those of images made elsewhere.

    Raises PromptError naming bad prompts and images of unknown prompts.
    """
    section = config.factory
    prompts = load_prompts(config.data.prompts)[: section.limit or None]
    shards: list[Shard] = []
    if section.images_per_prompt:
        shards += _cut(section, section.source, dict(enumerate(prompts)), {})
    if section.images:
        files = images_elsewhere(section.images, prompts)
        shards += _cut(section, section.images_source, {i: prompts[i] for i in sorted(files)}, files)
    return shards


def _cut(
    section: FactorySection, source: str, prompts: Mapping[int, Prompt], files: Mapping[int, tuple[str, ...]]
) -> list[Shard]:
    ids = list(prompts)
    parts = [tuple(ids[start : start + section.shard_size]) for start in range(0, len(ids), section.shard_size)]
    return [
        Shard(source, number, part, tuple(prompts[i] for i in part), tuple(files[i] for i in part if files))
        for number, part in enumerate(parts)
    ]


def images_elsewhere(images: str | Path, prompts: Sequence[Prompt]) -> dict[int, tuple[str, ...]]:
    """Absolute paths of the images of `factory.images`, by the place of their prompt.

    A prompt is named by its id, or by its place. Raises FactoryError naming files of unknown prompts.
    """
    path = resolve_path(images)
    places = {str(i): i for i in range(len(prompts))} | {prompt.id: i for i, prompt in enumerate(prompts)}
    found: dict[int, list[str]] = {}
    problems = []
    for where, name, file in _named_images(path):
        if isinstance(file, ValueError):
            problems.append(f"{where}: {file}")
        elif name not in places:
            problems.append(f"{where}: no prompt {name!r} in data.prompts; name images <prompt id or place>_<number>")
        else:
            found.setdefault(places[name], []).append(str(file))
    if problems or not found:
        raise FactoryError(problems or [f"factory.images: no images in {path}"])
    return {place: tuple(files) for place, files in found.items()}


def _named_images(path: Path) -> Iterator[tuple[str, str, Path | ValueError]]:
    """Where an image is named, its prompt, its file (or what is wrong with it)."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
        order = {
            file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.stem)] for file in files
        }
        for file in sorted(files, key=lambda file: order[file]):
            yield str(file), file.stem.rpartition("_")[0], file.absolute()
        return
    if not path.is_file():
        raise FactoryError([f"factory.images: {path} does not exist; give a folder of images or a .jsonl file"])
    for where, row in read_jsonl(path):
        if isinstance(row, ValueError):
            yield where, "", row
        elif not isinstance(row, Mapping) or "id" not in row or not isinstance(row.get("images"), list):
            yield where, "", ValueError('give an object such as {"id": "prompt-1", "images": ["a.png"]}')
        else:
            for name in row["images"]:
                file = (path.parent / str(name)).absolute()
                yield where, str(row["id"]), file if file.is_file() else ValueError(f"{file} does not exist")


def settings_of(config: Config) -> dict[str, Any]:
    """What the labels depend on, as JSON: another run may go on with a set only if all of it is the same."""
    section, judge = config.factory, config.reward[0]
    prompts = load_prompts(config.data.prompts)
    digest = hashlib.sha256(json.dumps([[p.id, p.text] for p in prompts]).encode()).hexdigest()[:16]
    rollout = {k: getattr(config.rollout, k) for k in ("guidance", "image_temperature", "image_top_k", "image_top_p")}
    factory = {key: value for key, value in asdict(section).items() if key not in CHANGE_NO_LABEL}
    return {
        "seed": config.seed,
        "prompts": digest,
        "policy": [_absolute(config.policy.path), _absolute(config.policy.overlay)],
        "judge": [judge.scorer, _absolute(judge.path), judge.question],
        **{f"rollout.{key}": value for key, value in rollout.items()},
        **{f"factory.{key}": value for key, value in factory.items()},
        "factory.images": _absolute(section.images),
    }


def _absolute(path: str | None) -> str | None:
    return str(resolve_path(path)) if path else path


def factory_problems(config: Config) -> Iterator[str]:
    """What keeps the set from being built, one line each."""
    section = config.factory
    if not section.out:
        yield "factory.out: empty; give the folder of the set"
    if section.negative_prob > section.positive_prob:
        yield f"factory.negative_prob: {section.negative_prob:g} is above factory.positive_prob; give at most that"
    if not section.images_per_prompt and not section.images:
        yield "factory.images_per_prompt: 0, and no factory.images: there is nothing to label; give one of them"
    for key in ("source", "images_source"):
        if not re.fullmatch(r"[\w.-]+", getattr(section, key)):
            yield f"factory.{key}: {getattr(section, key)!r} is no name of a file; give letters, digits, - and ."
    if section.images and section.images_per_prompt and section.source == section.images_source:
        yield f"factory.images_source: {section.images_source!r} is factory.source too; give another name"
    if len(config.reward) != 1:
        yield f"reward: {len(config.reward)} scorers; a label has one score, give one"
    elif section.question is not None and "{prompt}" not in section.question:
        yield f"factory.question: {section.question!r} does not ask about the prompt; put {{prompt}} in it"
    try:
        if section.images:
            images_elsewhere(section.images, load_prompts(config.data.prompts)[: section.limit or None])
        settings = Path(section.out) / "settings.json"
        if section.out and settings.is_file() and len(config.reward) == 1:
            yield from _changed(json.loads(settings.read_text("utf-8")), settings_of(config), section.out)
    except PromptError as error:
        yield from error.problems


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], out: str) -> Iterator[str]:
    changed = [f"{key} ({before.get(key)!r} -> {after[key]!r})" for key in after if before.get(key) != after[key]]
    if changed:
        yield f"factory.out: {out} holds a set made with other settings: {', '.join(changed)}; give another folder"


def begin(config: Config) -> None:
    """Make the set's folder and note its settings."""
    write_rows(Path(config.factory.out) / "settings.json", [settings_of(config)])


def join_shards(shards: Sequence[Shard], section: FactorySection) -> list[tuple[Path, dict[str, int]]]:
    """Write the label file of each source, all of whose shards are there; its path, and its images by state."""
    written = []
    for source in dict.fromkeys(shard.source for shard in shards):
        rows = [row for shard in shards if shard.source == source for _, row in read_jsonl(shard.path(section.out))]
        path = Path(section.out) / "labels" / f"{source}_{section.positive_prob:g}.jsonl"
        write_rows(path, rows)
        states = [image["state"] for row in rows for image in row["data"]]
        counts = {"images": len(states), "right": states.count(4), "wrong": states.count(0) + states.count(1)}
        written.append((path, counts))
    return written
