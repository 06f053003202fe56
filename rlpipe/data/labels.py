"""Label files: images of a prompt with a judge's score and reason, as the official code keeps them.

labels/<source>_<threshold>.jsonl, one object a prompt:
{"promptid": 15, "prompt": "...", "data": [{"id": 0, "img_path": "...", "reason": "Yes, ...", "prob": 0.85,
                                            "state": 4}]}

state  4  high score, the reason says Yes          a right image
       0  low score, the reason says No            a wrong image
       1  high score, but the reason says No       a wrong image
       3  low score, but the reason says Yes       not used
       2  a score between the two bounds, or a reason that says neither; not used
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlpipe.data.edits import load_edits
from rlpipe.data.prompts import LabelError, PromptError, read_jsonl
from rlpipe.paths import resolve_path
from rlpipe.schema import Config, SftSection

RIGHT, WRONG = 4, (0, 1)
STATES = range(5)
TRIES = 3
"""Random pairs tried before a redrawing takes the lowest wrong and the highest right image (official)."""


@dataclass(frozen=True, slots=True)
class Label:
    """One judged image.

    reason: "Yes..." or "No...", whatever case the judge wrote. prob: the judge's P(yes).
    target: whether it is good enough to be drawn. verdict: right, wrong, or None where it is not to be judged.
    """

    promptid: str
    path: str
    reason: str
    prob: float
    target: bool
    verdict: bool | None
    source: str


@dataclass
class Judgements:
    """All images of one prompt that redrawing can use, in increasing order of their scores."""

    right: list[Label] = field(default_factory=list)
    wrong: list[Label] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        """Whether some right image has a higher score than some wrong one."""
        return bool(self.right and self.wrong) and self.right[-1].prob > self.wrong[0].prob


@dataclass(frozen=True)
class LabelSet:
    """What the three sub-tasks choose from.

    targets:  images to draw.  right, wrong: images to judge, not yet balanced.
    rejected: all wrong images, of every source: what may stand before a target.
    redraws:  by prompt, those whose right and wrong images can be paired.
    counts:   what was read and what was not used, to be told.
    """

    prompts: Mapping[str, str]
    targets: list[Label]
    right: list[Label]
    wrong: list[Label]
    rejected: list[Label]
    redraws: dict[str, Judgements]
    counts: dict[str, int]

    def balanced(self, seed: int) -> tuple[list[Label], list[Label]]:
        """Images judged right and wrong, the larger class sampled down to the smaller one, once (official)."""
        size = min(len(self.right), len(self.wrong))
        rng = np.random.default_rng((seed, 1))
        return tuple([labels[i] for i in rng.permutation(len(labels))[:size]] for labels in (self.right, self.wrong))


def pair(judgements: Judgements, rng: np.random.Generator) -> tuple[Label, Label]:
    """A wrong image and a right one of a higher score: at random, after three vain tries the extremes (official)."""
    for _ in range(TRIES):
        wrong = judgements.wrong[rng.integers(len(judgements.wrong))]
        right = judgements.right[rng.integers(len(judgements.right))]
        if right.prob > wrong.prob:
            return wrong, right
    return judgements.wrong[0], judgements.right[-1]


def is_label_data(section: SftSection) -> bool:
    """Whether `sft.data` is in the official layout (the other layout is `launch/build_tiny.py`'s)."""
    return bool(section.labels) or (bool(section.data) and (resolve_path(section.data) / "labels").is_dir())


def label_files(section: SftSection) -> list[Path]:
    """The label files that a configuration names. Raises LabelError if there are none."""
    if section.labels:
        files = [resolve_path(path) for path in section.labels]
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise LabelError([f"sft.labels: {missing[0]} does not exist; give label files"])
        return files
    folder = resolve_path(section.data) / "labels"
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise LabelError([f"sft.data: no label files *.jsonl in {folder}; build them with launch/build_data.py"])
    return files


def load_labels(section: SftSection) -> LabelSet:
    """Read the label files of a configuration. Raises LabelError naming file and line of each bad row.

    Every file is read and every image that can be used is looked for; nothing is decoded.
    """
    problems: list[str] = []
    prompts: dict[str, str] = {}
    labels: list[Label] = []
    for path in label_files(section):
        source = path.stem.rpartition("_")[0] or path.stem
        rows = [(where, *_checked(row)) for where, row in read_jsonl(path)]
        problems += [f"{where}: {line}" for where, wrong, _ in rows for line in wrong]
        good = [(where, row) for where, wrong, row in rows if not wrong]
        root = _root(section, path, good)
        for where, row in good:
            name = str(row["promptid"])
            if prompts.setdefault(name, row["prompt"]) != row["prompt"]:
                problems.append(f"{where}: promptid {name} is another prompt's already; give every prompt its own")
            found, wrong = _labels(row, section, source, root)
            problems += [f"{where}: {line}" for line in wrong]
            labels += found
    if problems:
        raise LabelError(problems)
    return _label_set(prompts, labels, section)


def _checked(row: Any) -> tuple[list[str], Any]:
    """What is wrong with the frame of a row, and the row."""
    if isinstance(row, ValueError):
        return [str(row)], row
    if not isinstance(row, Mapping):
        return [f"a {type(row).__name__}; give an object with promptid, prompt and data"], row
    wrong = []
    if isinstance(row.get("promptid"), bool) or not isinstance(row.get("promptid"), int | str):
        wrong.append(f"promptid is {row.get('promptid')!r}; give a whole number or a text")
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        wrong.append(f"prompt is {row.get('prompt')!r}; give a text")
    if not isinstance(row.get("data"), list):
        wrong.append(f"data is {row.get('data')!r}; give a list of images")
        return wrong, row
    for number, image in enumerate(row["data"]):
        wrong += [f"data[{number}]{line}" for line in _image_problems(image)]
    return wrong, row


def _image_problems(image: Any) -> Iterator[str]:
    if not isinstance(image, Mapping):
        yield f": a {type(image).__name__}; give an object with img_path, reason, prob and state"
        return
    for key in ("img_path", "reason"):
        if not isinstance(image.get(key), str) or (key == "img_path" and not image[key]):
            yield f".{key} is {image.get(key)!r}; give a text"
    prob, state = image.get("prob"), image.get("state")
    if isinstance(prob, bool) or not isinstance(prob, int | float) or not math.isfinite(prob) or not 0 <= prob <= 1:
        yield f".prob is {prob!r}; give a number from 0 to 1"
    if isinstance(state, bool) or state not in STATES:
        yield f".state is {state!r}; give one of 0, 1, 2, 3, 4"


def _root(section: SftSection, path: Path, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Path:
    """The folder that a file's img_path are relative to: sft.root, else the nearest one that has the first image.

    Official paths start at the folder that the official trainer runs in, some levels above the labels.
    """
    if section.root is not None:
        return resolve_path(section.root)
    folder = resolve_path(section.data) if section.data else path.parent.parent
    first = next((image["img_path"] for _, row in rows for image in row["data"]), "")
    return next((above for above in (folder, *folder.parents) if (above / first).is_file()), folder)


def _labels(row: Mapping[str, Any], section: SftSection, source: str, root: Path) -> tuple[list[Label], list[str]]:
    """The images of a row that can be used, and what is wrong with them."""
    labels, problems = [], []
    for number, image in enumerate(row["data"]):
        says_yes = says(image["reason"])
        target, verdict = _use(image, says_yes, section)
        if not target and verdict is None:
            continue
        if section.label_by == "state" and verdict != says_yes:
            word = "Yes" if verdict else "No"
            problems.append(
                f"data[{number}].reason is {image['reason'][:30]!r}, but state {image['state']} is a {word}; "
                f"start it with {word} or set state to 2"
            )
        path = root / image["img_path"]
        if not path.is_file():
            problems.append(
                f"data[{number}].img_path: {path} does not exist; set sft.root to the folder it starts from"
            )
        labels.append(
            Label(str(row["promptid"]), str(path), normalised(image["reason"]), image["prob"], target, verdict, source)
        )
    return labels, problems


def says(reason: str) -> bool | None:
    """Whether a reason starts with Yes or with No; None if it does neither."""
    start = reason[:3].lower()
    if start == "yes":
        return True
    return False if start[:2] == "no" and not reason[2:3].isalpha() else None


def normalised(reason: str) -> str:
    """The reason with its first word spelt Yes or No: "Yes" + reason[3:], "No" + reason[2:] (official)."""
    verdict = says(reason)
    if verdict is None:
        return reason
    return "Yes" + reason[3:] if verdict else "No" + reason[2:]


def _use(image: Mapping[str, Any], says_yes: bool | None, section: SftSection) -> tuple[bool, bool | None]:
    """Whether an image is to be drawn, and whether it is judged right, wrong or not at all."""
    if section.label_by == "state":
        if image["state"] == RIGHT:
            return True, True
        return False, False if image["state"] in WRONG else None
    prob = image["prob"]
    # A reason that contradicts the score would be taught as it stands; such an image is not judged.
    verdict = True if says_yes and prob >= section.positive_prob else None
    if says_yes is False and prob < section.negative_prob:
        verdict = False
    return prob >= section.target_prob, verdict


def _label_set(prompts: Mapping[str, str], labels: Sequence[Label], section: SftSection) -> LabelSet:
    def of(sources: list[str]) -> list[Label]:
        return [label for label in labels if not sources or label.source in sources]

    for key in ("target_sources", "judge_sources"):
        unknown = sorted(set(getattr(section, key)) - {label.source for label in labels})
        if unknown:
            known = ", ".join(sorted({label.source for label in labels})) or "none"
            raise LabelError([f"sft.{key}: {unknown[0]!r} has no labels; the sources are {known}; [] takes all"])
    targets = [label for label in of(section.target_sources) if label.target]
    judged = of(section.judge_sources)
    redraws: dict[str, Judgements] = {}
    for label in sorted(targets, key=lambda label: label.prob):
        redraws.setdefault(label.promptid, Judgements()).right.append(label)
    rejected = [label for label in labels if label.verdict is False]
    for label in sorted(rejected, key=lambda label: label.prob):
        if label.promptid in redraws:
            redraws[label.promptid].wrong.append(label)
    paired = {name: judgements for name, judgements in redraws.items() if judgements.comparable}
    right, wrong = ([label for label in judged if label.verdict is truth] for truth in (True, False))
    counts = {
        "prompts": len(prompts),
        "draw": len(targets),
        "judge_right": len(right),
        "judge_wrong": len(wrong),
        "redraw_prompts": len(paired),
    }
    return LabelSet(prompts, targets, right, wrong, rejected, paired, counts)


def missing_tasks(section: SftSection, counts: Mapping[str, int]) -> list[str]:
    """One line for each sub-task with a ratio for which the labels have no example."""
    lines = []
    have = {
        "draw": (counts["draw"], "no right image"),
        "judge": (min(counts["judge_right"], counts["judge_wrong"]), "not both right and wrong images"),
        "redraw": (counts["redraw_prompts"], "no prompt with a wrong image and a right one of a higher score"),
    }
    for task, (count, lacks) in have.items():
        if getattr(section, task) > 0 and not count:
            lines.append(f"sft.{task}: {getattr(section, task):g}, but sft.data has {lacks}; set sft.{task}=0")
    return lines


def sft_problems(config: Config) -> Iterator[str]:
    """What is wrong with the data of supervised training, one line each; reads every label file."""
    section = config.sft
    if section.data and not resolve_path(section.data).exists():
        yield f'sft.data: {resolve_path(section.data)} does not exist; give a folder or "" (tiny world)'
        return
    if section.label_by == "prob" and section.negative_prob > min(section.positive_prob, section.target_prob):
        yield f"sft.negative_prob: {section.negative_prob:g} is above sft.positive_prob or target_prob; give less"
    if section.max_context_images > 1 and config.rollout.history != "all":
        yield (
            f"sft.max_context_images: {section.max_context_images} images are not seen with rollout.history "
            f"{config.rollout.history!r}; set rollout.history=all"
        )
    try:
        if is_label_data(section):
            yield from missing_tasks(section, load_labels(section).counts)
        elif section.max_context_images > 1:
            yield "sft.max_context_images: the tiny world's examples have one image; give label files as sft.data"
        if section.edit > 0:
            load_edits(section.edits)
    except PromptError as error:
        yield from error.problems


def with_absolute_paths(section: SftSection) -> SftSection:
    """The section as an actor gets it, whatever its working directory is."""
    return replace(
        section,
        data=str(resolve_path(section.data)) if section.data else "",
        labels=[str(resolve_path(path)) for path in section.labels],
        root=None if section.root is None else str(resolve_path(section.root)),
        edits=str(resolve_path(section.edits)) if section.edits else "",
    )


def summary(section: SftSection) -> str:
    """One line of what the sub-tasks have to choose from; reads every file."""
    parts = []
    if is_label_data(section):
        counts = load_labels(section).counts
        parts.append(
            f"sft.data: {counts['prompts']} prompts, {counts['draw']} images to draw, {counts['judge_right']} right "
            f"and {counts['judge_wrong']} wrong ones to judge, {counts['redraw_prompts']} prompts to redraw"
        )
    if section.edit > 0:
        parts.append(f"sft.edits: {len(load_edits(section.edits))} edits")
    return "; ".join(parts)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
