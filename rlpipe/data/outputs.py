"""What generation is asked for and what it leaves: the official folder layout, its records, and how it goes on.

    results/samples/0000.png        the first image of a sample (program edit: the edited one)
    results/reason.jsonl            what the policy said of it, one row a sample; samples.jsonl where it says nothing
    results/regen_samples/0000.png  the image that the sample ends with
    results/rounds/0000_2.png       images between the two, if rollout.max_images is above 2
    results/settings.yaml           everything that the samples depend on
    results/parts/                  rows of a run that has not ended; the next one takes them over

A file is there as a whole or not at all. A sample is finished when its row is there, which is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

from rlpipe.data.prompts import PromptError, load_prompts
from rlpipe.paths import resolve_path
from rlpipe.schema import Config
from rlpipe.types import Prompt, Rollout

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_FOLDERS = ("samples", "regen_samples", "rounds")
HOW_FAST = ("workers", "num_cpus", "num_gpus", "threads", "groups_per_call", "rows", "branches", "timeout_s")
"""Keys of `rollout` that change no image of a sample by itself."""
_PROBES, _PROBE_BYTES = 16, 1 << 16


class OutputError(ValueError):
    """A results folder that cannot be used; the message has one line a problem."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Sample `number` of a prompt; `name` is that of its images' files."""

    name: str
    prompt_id: str
    text: str
    source_image: str | None
    number: int
    seed: int

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.prompt_id, self.text, source_image=self.source_image)

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.number


@dataclass(frozen=True, slots=True)
class Remark:
    """What the policy said of one image: its verdict, its words, P(Yes) before any threshold."""

    correct: bool
    reason: str
    yes_score: float


def program_of(config: Config) -> str:
    """introspect, draw or edit; look where images are given that are not to be edited."""
    return "look" if config.generate.images and config.rollout.program != "edit" else config.rollout.program


def generation_prompts(config: Config) -> list[Prompt]:
    """The prompts of generate.caption, generate.images or data.prompts.

    Raises PromptError, whose lines name the key, the value and the way out.
    """
    caption, images = config.generate.caption.strip(), config.generate.images
    if images:
        prompts = _prompts_of_images(resolve_path(images), caption)
    elif caption:
        prompts = [Prompt("caption", caption)]
    else:
        prompts = _load("data.prompts", config.data.prompts)
    if program_of(config) in ("look", "edit"):
        problems = [line for prompt in prompts for line in _source_problems(prompt, bool(images))]
        if problems:
            raise PromptError(problems)
    return prompts


def _prompts_of_images(path: Path, caption: str) -> list[Prompt]:
    if not path.exists():
        raise PromptError([f"generate.images: {path} does not exist; give an image, a folder of images, or prompts"])
    files = [path] if path.suffix.lower() in IMAGE_SUFFIXES else []
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        if caption:
            raise PromptError(
                [f"generate.images: {path} holds no images for generate.caption; leave one of the two out"]
            )
        return _load("generate.images", path)
    if not caption:
        raise PromptError(["generate.caption: empty; images without prompts of their own need one"])
    return [Prompt(file.name, caption, source_image=str(file.absolute())) for file in files]


def _load(key: str, path: str | Path) -> list[Prompt]:
    try:
        return load_prompts(path)
    except PromptError as error:
        raise PromptError([f"{key}: {line}" for line in error.problems]) from error


def _source_problems(prompt: Prompt, given: bool) -> Iterator[str]:
    key = "generate.images" if given else "data.prompts"
    if prompt.source_image is None:
        yield f"{key}: prompt {prompt.id!r} has no source_image; give one, or generate.images and generate.caption"
        return
    try:
        Image.open(prompt.source_image).close()
    except (UnidentifiedImageError, OSError):
        yield f"{key}: {prompt.source_image} cannot be read as an image; give a PNG or JPEG file"


def sample_seed(seed: int, prompt_id: str, number: int) -> int:
    """A sample's seed, non-negative int63: nothing else that runs beside it matters."""
    digest = hashlib.blake2b(json.dumps([seed, prompt_id, number]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def requests_of(config: Config, prompts: Sequence[Prompt]) -> list[SampleRequest]:
    """All samples in the order of their names: those of the first prompt, then those of the second, ...

    Names are running numbers of at least four digits. An image that is looked at has one sample and keeps its name.
    """
    looking = program_of(config) == "look"
    count = 1 if looking else config.generate.samples
    width = max(4, len(str(len(prompts) * count - 1)))
    requests = []
    for i, prompt in enumerate(prompts):
        for number in range(count):
            name = Path(prompt.source_image).name if looking else f"{i * count + number:0{width}d}.png"
            seed = sample_seed(config.seed, prompt.id, number)
            requests.append(SampleRequest(name, prompt.id, prompt.text, prompt.source_image, number, seed))
    return requests


def record_of(request: SampleRequest, remarks: Sequence[Remark] = (), num_images: int = 1) -> dict[str, Any]:
    """A row of the records: the official keys, about the first image, then where it comes from.

    `rounds` has all remarks in order where there are several.
    """
    row = {"prompt": request.text, "filename": request.name, **(asdict(remarks[0]) if remarks else {})}
    row |= {"id": request.prompt_id, "sample": request.number, "seed": request.seed, "images": num_images}
    if request.source_image is not None:
        row["source_image"] = request.source_image
    if len(remarks) > 1:
        row["rounds"] = [asdict(remark) for remark in remarks]
    return row


def files_of(request: SampleRequest, rollout: Rollout) -> dict[str, np.ndarray]:
    """Where the images of a rollout go: path below the results folder -> uint8 [H, W, 3]."""
    trajectory, images = rollout.trajectory, rollout.images
    files = {f"samples/{request.name}": images[0]}
    if trajectory.texts:
        final = trajectory.images.index(trajectory.final_image)
        files[f"regen_samples/{request.name}"] = images[final]
        stem = Path(request.name).stem
        between = [i for i in range(1, len(images)) if i != final]
        files |= {f"rounds/{stem}_{i + 1}.png": images[i] for i in between}
    return files


class Results:
    """A results folder: workers `save`, the driver does the rest.

    results = Results("results", "introspect")
    results.begin(settings)
    results.save(requests, rows, files)
    rows = results.gather(requests)
    """

    def __init__(self, folder: str | Path, program: str) -> None:
        self.folder = Path(folder).absolute()
        self.records = self.folder / ("reason.jsonl" if program in ("introspect", "look") else "samples.jsonl")
        self.settings, self.parts = self.folder / "settings.yaml", self.folder / "parts"

    def problems(self, settings: Mapping[str, Any], resume: str = "auto") -> list[str]:
        """Why samples of these settings cannot go into this folder, as it is now; empty if they can."""
        if self.folder.exists() and not self.folder.is_dir():
            return [f"generate.dir: {self.folder} is a file; give a folder"]
        if not self.settings.is_file():
            # Only what a run could overwrite is in the way: the folder may hold the prompts, or notes.
            names = (self.records.name, *IMAGE_FOLDERS)
            taken = [name for name in names if (self.folder / name).exists()]
            return [f"generate.dir: {self.folder} holds {taken[0]} of something else; give another"] if taken else []
        if resume == "never":
            return [f"resume: 'never', but generate.dir {self.folder} holds samples; give another or set resume=auto"]
        before = yaml.safe_load(self.settings.read_text(encoding="utf-8")) or {}
        now = yaml.safe_load(yaml.safe_dump(dict(settings)))
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if not keys:
            return []
        changed = ", ".join(f"{key} ({before.get(key)!r} -> {now.get(key)!r})" for key in keys)
        return [f"generate.dir: {self.folder} holds samples of other settings: {changed}; give another generate.dir"]

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Make the folder and write down its settings; raises OutputError where `problems` has any."""
        if problems := self.problems(settings):
            raise OutputError("\n".join(problems))
        self.parts.mkdir(parents=True, exist_ok=True)
        if not self.settings.is_file():
            _write_text(self.settings, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))

    def save(
        self,
        requests: Sequence[SampleRequest],
        rows: Sequence[Mapping[str, Any]],
        files: Iterable[Mapping[str, np.ndarray]] = (),
    ) -> None:
        """Write the images of some samples, then their rows as one part."""
        for images in files:
            for path, pixels in images.items():
                _write_image(self.folder / path, pixels)
        # Samples that are saved again are the same samples, so that one part may replace another.
        keys = json.dumps([request.key for request in requests]).encode()
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        _write_text(self.parts / f"{hashlib.blake2b(keys, digest_size=8).hexdigest()}.jsonl", lines)

    def gather(self, requests: Sequence[SampleRequest]) -> dict[tuple[str, int], dict[str, Any]]:
        """Merge all parts into the records, in the order of the requests; the finished rows by `SampleRequest.key`."""
        parts = sorted(self.parts.glob("*.jsonl"))
        found = {}
        for path in [*([self.records] if self.records.is_file() else []), *parts]:
            found |= {(row["id"], row["sample"]): row for row in _read_rows(path)}
        rows = {request.key: found[request.key] for request in requests if request.key in found}
        if parts:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
            _write_text(self.records, "".join(lines))
            for path in parts:
                path.unlink()
        return rows

    def end(self) -> None:
        """Clear away what only an unfinished run needs, with what interrupted writers left."""
        for folder in (self.folder, *(self.folder / name for name in (*IMAGE_FOLDERS, self.parts.name))):
            for path in folder.glob(".*.partial"):
                path.unlink()
        if self.parts.is_dir() and not any(self.parts.iterdir()):
            self.parts.rmdir()


def settings_of(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that the samples depend on, under flat keys."""
    rollout, policy = asdict(config.rollout), asdict(config.policy)
    rows = [[prompt.id, prompt.text, prompt.source_image and Path(prompt.source_image).name] for prompt in prompts]
    values = {"program": program_of(config), "seed": config.seed}
    values["prompts"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    values["samples"] = config.generate.samples
    values["verdict_threshold"] = config.generate.verdict_threshold
    values["policy"] = fingerprint(resolve_path(config.policy.path))
    values["data.long_prompts"] = config.data.long_prompts
    values |= {f"policy.{key}": value for key, value in policy.items() if key not in ("path", "trainable")}
    return values | {f"rollout.{key}": value for key, value in rollout.items() if key not in (*HOW_FAST, "program")}


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's files: names, sizes and probes of their content, so that gigabytes take no time."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".pth")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for probe in range(_PROBES):
                stream.seek(max(size - _PROBE_BYTES, 0) * probe // (_PROBES - 1))
                digest.update(stream.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Split at line feeds only: words may hold the other separators that str.splitlines splits at.
    for i, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            row["id"], row["sample"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise OutputError(f"generate.dir: {path}:{i} is no row of a sample; delete the line") from error
        rows.append(row)
    return rows


def _write_text(path: Path, text: str) -> None:
    with _partial(path).open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
    os.replace(_partial(path), path)


def _write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(_partial(path), format="PNG")
    os.replace(_partial(path), path)


def _partial(path: Path) -> Path:
    """Where a file is written before it takes its name; no two processes share it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
