"""Scorer: what a detector finds in an image, judged by GenEval's rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from rlpipe.reward.geneval import Detection, Thresholds, judge, metadata_problems
from rlpipe.types import Prompt, Score, ScoreRequest
from rlpipe.world.detection import detect as detect_shapes
from rlpipe.world.scenes import COLORS, SHAPES

RULES = ("strict", "graded")
DETECTORS = ("mask2former", "tiny")


class Detector(Protocol):
    """Finds objects of the classes `labels`, and names their colours among `colors` (none if it cannot).

    thresholds: which of its scores count, unless the configuration says otherwise.
    """

    labels: tuple[str, ...]
    colors: tuple[str, ...]
    thresholds: Thresholds

    def detect(self, images: Sequence[np.ndarray], colored: Sequence[Collection[str]]) -> list[list[Detection]]:
        """The objects of each uint8 image [H, W, 3]; `colored`: per image the classes whose objects need a colour."""
        ...


class TinyDetector:
    """The exact detection of the tiny world; a blob that is no clear shape is left out.

    Its scores are overlaps with a template, by which it has decided already what is a shape: no threshold is put to
    them, not even GenEval's for counting.
    """

    labels = SHAPES
    colors = tuple(COLORS)
    thresholds = Thresholds(score=0.0, counting=0.0)

    def detect(self, images: Sequence[np.ndarray], colored: Sequence[Collection[str]]) -> list[list[Detection]]:
        return [[self._object(d) for d in detect_shapes(image) if d.shape is not None] for image in images]

    @staticmethod
    def _object(found: Any) -> Detection:
        x, y, width, height = found.box
        corners = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        return Detection(found.shape, found.score, corners, found.color)


class DetectorScorer:
    """Scorer: 1 or 0 by GenEval's rules (`strict`), or how much of the prompt is fulfilled, in [0, 1] (`graded`).

    path:       checkpoint of the detector; "tiny" needs none.
    detector:   "mask2former", or "tiny" for the embedded world.
    rules:      which of the two is the value; both are parts, beside "count", "color", "position" and "exclude": how
                much of such demands is fulfilled, for prompts that have them.
    clip:       checkpoint of the CLIP that names colours.
    thresholds: some of `geneval.Thresholds` by name, in place of the detector's own.
    micro_batch: images in one forward pass, whatever the size of a call.

        scorer = DetectorScorer("/models/mask2former-swin-small-coco-instance", clip="/models/clip-vit-large-patch14")
        score = scorer.score([ScoreRequest("0", prompt, image)])[0]
        score.parts                                # {"strict": 0.0, "graded": 0.75, "count": 1.0, "color": 0.5}
    """

    paths: ClassVar = {"clip": None}

    def __init__(
        self,
        path: str | Path | None = None,
        detector: str = "mask2former",
        rules: str = "strict",
        clip: str | Path | None = None,
        thresholds: Mapping[str, float] | None = None,
        micro_batch: int = 8,
        device: str = "auto",
    ) -> None:
        self.check_keywords(
            path=path, detector=detector, rules=rules, clip=clip, thresholds=thresholds, micro_batch=micro_batch
        )
        self.rules = rules
        if detector == "tiny":
            self.detector: Detector = TinyDetector()
            self.thresholds = replace(self.detector.thresholds, **(thresholds or {}))
        else:
            from rlpipe.reward.mask2former import Mask2FormerDetector

            self.thresholds = replace(Mask2FormerDetector.thresholds, **(thresholds or {}))
            least = min(self.thresholds.score, self.thresholds.counting)
            self.detector = Mask2FormerDetector(path, clip, micro_batch, device, least)

    @staticmethod
    def check_keywords(
        path: str | Path | None = None,
        detector: str = "mask2former",
        rules: str = "strict",
        clip: str | Path | None = None,
        thresholds: Mapping[str, float] | None = None,
        micro_batch: int = 8,
        **others: Any,
    ) -> None:
        """ValueError "key: value ..., way out" for settings that no scorer can be built of."""
        for key, value, known in (("detector", detector, DETECTORS), ("rules", rules, RULES)):
            if value not in known:
                raise ValueError(f"{key}: {value!r} is none of {', '.join(known)}")
        if detector == "mask2former" and path is None:
            raise ValueError("path: null; give the folder of a Mask2Former, or detector: tiny")
        if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
            raise ValueError(f"micro_batch: {micro_batch!r}; give a whole number from 1")
        if thresholds is not None and not isinstance(thresholds, Mapping):
            raise ValueError(f"thresholds: {thresholds!r} is no mapping; give e.g. {{counting: 0.8}}")
        names = [f.name for f in fields(Thresholds)]
        for key, value in (thresholds or {}).items():
            if key not in names:
                raise ValueError(f"thresholds: {key!r} is none of {', '.join(names)}")
            kind = int if key == "max_objects" else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not value >= 0:
                raise ValueError(f"thresholds: {key} is {value!r}; give a number from 0")
        if detector == "mask2former":
            from rlpipe.reward.mask2former import check_folders

            check_folders(path, clip)

    def check(self, prompts: Sequence[Prompt]) -> list[str]:
        """One line for each prompt whose metadata the rules cannot be applied to."""
        return [f"prompt {prompt.id!r}: {problem}" for prompt in prompts if (problem := self._problem(prompt))]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score per request, in order; missing where a prompt has no GenEval metadata."""
        problems = [self._problem(r.prompt) for r in requests]
        asked = [r for r, problem in zip(requests, problems, strict=True) if problem is None]
        colored = [{e["class"] for e in r.prompt.metadata["include"] if "color" in e} for r in asked]
        found = iter(self.detector.detect([r.image for r in asked], colored) if asked else [])
        return [
            self._score(r, next(found)) if problem is None else Score(id=r.id, value=None, error=problem)
            for r, problem in zip(requests, problems, strict=True)
        ]

    def _score(self, request: ScoreRequest, detections: Sequence[Detection]) -> Score:
        verdict = judge(request.prompt.metadata, detections, self.thresholds)
        values = {"strict": float(verdict.correct), "graded": verdict.graded}
        return Score(id=request.id, value=values[self.rules], parts=values | verdict.shares())

    def _problem(self, prompt: Prompt) -> str | None:
        """Why the rules cannot be applied to a prompt, in one line, or None."""
        problems = metadata_problems(prompt.metadata, self.detector.labels, self.detector.colors)
        return "; ".join(problems) or None
