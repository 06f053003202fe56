"""The data that crosses a process boundary, and nothing else.

A `Trajectory` is a prompt and the segments that followed it: image, text, image, ... Images alternate with
texts and the first segment is always an image. Everything needed to replay a trajectory exactly is in it;
nothing that can be computed again is. Pixels travel beside it (`Rollout`), never through the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

SegmentKind = Literal["image", "text"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt file.

    `metadata` is GenEval's schema (`tag`, `include`, `exclude`) where the row has it, else empty.

        Prompt(id="test-0007", text="a photo of two red circles", metadata={"tag": "counting", ...})
    """

    id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source_image: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a trajectory was drawn; with `seed` and the policy version, enough to draw it again.

    guidance:    classifier-free guidance scale of image tokens; 1.0 draws from the conditional alone.
    top_k/top_p: 0 and 1.0 switch truncation off (the official rollouts use none).
    max_reflection_tokens: length limit of one reflection, end-of-sentence included.
    max_images:  most images of a trajectory; 1 ends with the reflection on the only image.
    redraw:      "on_no" draws again only after "No"; "always" draws again whatever the verdict (credit v3).
    redraw_context: how an earlier image enters while the next is drawn: as its sampled codes, or as the codes of its
                 decoded pixels ("reencoded", official code).
    history:     what a reflection and a redraw look back at: the "last" image and what was said of it, or "all"
                 images and reflections before (paper, appendix).
    reflection_room: positions that a reflection takes while the next image is drawn. "fixed": max_reflection_tokens.
                 "exact": those of its tokens without end-of-sentence. "group": those of the longest reflection,
                 end-of-sentence included, among the rows of the same prompt (official code).
    first_seed:  seed of the first image where it is not `seed`: rows of one call that share it and the prompt are
                 branches of one first image, which is drawn once.
    verdict_threshold: None samples the verdict. Otherwise it is Yes exactly if P(Yes) among {Yes, No} is above the
                 threshold; nobody sampled it then, so such a trajectory cannot be trained on.
    """

    seed: int = 0
    guidance: float = 1.0
    image_temperature: float = 1.0
    image_top_k: int = 0
    image_top_p: float = 1.0
    text_temperature: float = 1.0
    text_top_k: int = 0
    text_top_p: float = 1.0
    max_reflection_tokens: int = 24
    max_images: int = 2
    redraw: Literal["on_no", "always"] = "on_no"
    redraw_context: Literal["sampled", "reencoded"] = "sampled"
    history: Literal["last", "all"] = "last"
    reflection_room: Literal["fixed", "exact", "group"] = "fixed"
    verdict_threshold: float | None = None
    first_seed: int | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One image or one reflection.

    token_ids: int64 [T]. VQ codes for an image, vocabulary ids for a text (end-of-sentence included if produced).
    logprobs:  float32 [T], the sampler's log-prob of each token under the distribution it was drawn from,
               or None where nobody sampled it (supervised examples, contexts).
    context_ids: int64 [T] or None. For an image of `redraw_context: reencoded`, the codes of its decoded pixels,
               which stand in for `token_ids` when a later segment looks back at it.
    room:      for a reflection, the positions it takes where a later image looks back at it, if that is not what
               `Sampling.reflection_room` alone tells ("group"); None otherwise.
    """

    kind: SegmentKind
    token_ids: np.ndarray
    logprobs: np.ndarray | None = None
    context_ids: np.ndarray | None = None
    room: int | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt and what the policy made of it: image [, text [, image [, text ...]]].

    `verdicts[i]` is True where text segment number i says "Yes". `truncated[i]` is True where it met the length
    limit before its end-of-sentence token. `source_codes` int64 [N] are the VQ codes of the image that an edit
    starts from; its only segment is then the edited image.
    """

    id: str
    prompt: Prompt
    segments: tuple[Segment, ...]
    sampling: Sampling = Sampling()
    policy_version: int = 0
    verdicts: tuple[bool, ...] = ()
    truncated: tuple[bool, ...] = ()
    source_codes: np.ndarray | None = None

    @property
    def images(self) -> tuple[int, ...]:
        """Indices into `segments` of the images, in order."""
        return tuple(i for i, s in enumerate(self.segments) if s.kind == "image")

    @property
    def texts(self) -> tuple[int, ...]:
        """Indices into `segments` of the reflections, in order."""
        return tuple(i for i, s in enumerate(self.segments) if s.kind == "text")

    @property
    def final_image(self) -> int:
        """Index into `segments` of the image the trajectory ends with: the first image that was said to match,
        else the last one drawn."""
        for position, verdict in zip(self.images, self.verdicts, strict=False):
            if verdict:
                return position
        return self.images[-1]


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trajectory with its decoded pixels: one uint8 [H, W, 3] array per image segment, in order.

    source: uint8 [H, W, 3], the image that an edit starts from; None without one.
    texts:  the words of its reflections, in order; empty where nobody wrote them out.
    """

    trajectory: Trajectory
    images: tuple[np.ndarray, ...]
    source: np.ndarray | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One question to a scorer: does `image` (uint8 [H, W, 3]) show `prompt`?

    source:  uint8 [H, W, 3] where the prompt is an instruction and `image` the edited source; None otherwise.
    verdict: what the policy said of the image, such as "No, the circle is blue."; None where it said nothing or the
             scorer is not to see it (`reward.*.sees`).
    """

    id: str
    prompt: Prompt
    image: np.ndarray
    source: np.ndarray | None = None
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A value with its parts, or the reason why there is none. A failed score is missing, never zero.

    Score(id="...", value=0.93, parts={"judge": 0.93})
    Score(id="...", value=None, error="timeout after 30 s")
    """

    id: str
    value: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def missing(self) -> bool:
        return self.value is None


@dataclass(frozen=True, slots=True)
class ImageScore(Score):
    """What all scorers together say of one image of a trajectory; a field is None where a score it needs is missing.

    value: its reward wherever in the trajectory it stands; 0 where no scorer looks at such an image.
    final: its reward as the image that the trajectory ends with; None for every other image.
    match: probability that it shows the prompt; the verdict on it is rewarded for agreeing with that.
    """

    final: float | None = None
    match: float | None = None


@dataclass(frozen=True, slots=True)
class SegmentCredit:
    """What the learner does with one segment; each weight is that of the segment's token mean.

    advantage: multiplies the policy gradient; already weighted, and summed where a rule credits a segment twice.
    kl:        weight of the KL term (2.0 where credit v1 counts an accepted first image twice).
    ce:        weight of the cross-entropy term (supervised examples).
    entropy:   weight of the entropy term; 0 where none is asked.
    """

    advantage: float = 0.0
    kl: float = 0.0
    ce: float = 0.0
    entropy: float = 0.0

    @property
    def trained(self) -> bool:
        return self.advantage != 0.0 or self.kl != 0.0 or self.ce != 0.0 or self.entropy != 0.0


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One trajectory as the learner takes it.

    images:       uint8 [H, W, 3] pixels of the image segments that a text segment looks at, in segment order.
    credits:      one per segment.
    ref_logprobs: per segment float32 [T] under the reference policy, or None where no KL is asked.
    blank_prompt: the prompt is replaced by pad tokens (10 % of supervised drawings: guidance dropout).
    """

    trajectory: Trajectory
    images: tuple[np.ndarray, ...]
    credits: tuple[SegmentCredit, ...]
    ref_logprobs: tuple[np.ndarray | None, ...] = ()
    blank_prompt: bool = False


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What one optimiser step consumes, over all ranks and micro-batches.

    denominator: what the sum of all weighted token means is divided by (official: number of trajectories times
                 the number of spans). Global, so that the split over ranks and micro-batches does not matter.
    """

    items: tuple[TrainItem, ...]
    denominator: float

    def __len__(self) -> int:
        return len(self.items)
