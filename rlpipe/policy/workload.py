"""How long a trajectory's sequences are, from a configuration alone: nothing is drawn and no tokenizer is needed.

`learn/layout.py` lays out real trajectories; here is the same arithmetic for those that a run will draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlpipe.schema import Config

EXPECTED_PROMPT, FRAME = 40, 16
"""Tokens: of a usual prompt with its frame; of each of the two strings around a reflection (official: at most 15)."""
SHARE_NO = 0.5
"""Images that are said not to match, so that another is drawn."""


@dataclass(frozen=True)
class Workload:
    """What a training step of a configuration computes. Counts of tokens but for `trajectories`.

    image:  of an image. prompt: of a prompt with its frame. words: of a reflection. frame: of look and of redraw each.
    """

    config: Config
    image: int
    prompt: int
    words: int
    frame: int = FRAME

    @classmethod
    def expected(cls, config: Config, image: int) -> Workload:
        """With prompts of a usual length."""
        return cls(config, image, min(EXPECTED_PROMPT, config.policy.max_prompt_tokens), _words(config))

    @classmethod
    def longest(cls, config: Config, image: int) -> Workload:
        """With the longest prompts that the configuration admits."""
        return cls(config, image, config.policy.max_prompt_tokens, _words(config))

    @property
    def trajectories(self) -> int:
        return self.config.train.prompts_per_step * self.config.train.group_size

    @property
    def rounds(self) -> int:
        """Most images of a trajectory."""
        return self.config.rollout.max_images if self.config.rollout.program == "introspect" else 1

    @property
    def paired(self) -> bool:
        """Whether the learner replays the unconditional twins of image tokens too."""
        return self.config.rollout.guidance != 1.0 and self.config.loss.logits != "conditional"

    @property
    def before(self) -> int:
        """What stands before the first image; an edit's source image is in it."""
        return self.prompt + self.image * (self.config.rollout.program == "edit")

    @property
    def between(self) -> int:
        """What stands between two images."""
        return self.words + 2 * self.frame

    def looks(self, images: int) -> int:
        """Reflections of a trajectory with so many images; the last one that may be drawn is not looked at."""
        if self.config.rollout.program != "introspect":
            return 0
        return images if images < self.rounds or self.rounds == 1 else self.rounds - 1

    def drawing(self, image: int) -> int:
        """Length of the sequence that ends with an image, which counts from 1."""
        earlier = image - 1 if self.config.rollout.history == "all" else min(image - 1, 1)
        return self.before + earlier * (self.image + self.between) + self.image

    def looking(self, look: int) -> int:
        """Length of the sequence that ends with a reflection, which counts from 1."""
        earlier = look - 1 if self.config.rollout.history == "all" else 0
        return self.before + earlier * (self.image + self.between) + self.image + self.frame + self.words

    def replayed(self, images: int) -> list[int]:
        """Lengths of the sequences in which the learner sees a trajectory with so many images."""
        looks, everything = self.looks(images), self.config.rollout.history == "all"
        live = self.config.loss.context == "live"
        drawings = [self.drawing(image) for image in range(1, images + 1)]
        if live and self.config.rollout.redraw_context == "sampled":
            drawings = drawings[-1:] if everything else drawings[1:] or drawings
        lookings = [self.looking(look) for look in range(1, looks + 1)]
        if live and everything:
            lookings = lookings[-1:]
        return drawings * (1 + self.paired) + lookings

    def mean(self, value: Callable[[int], float]) -> float:
        """Mean over trajectories of what depends on their number of images."""
        again = 1.0 if self.config.rollout.redraw == "always" else SHARE_NO
        total, left = 0.0, 1.0
        for images in range(1, self.rounds):
            total += left * (1 - again) * value(images)
            left *= again
        return total + left * value(self.rounds)

    @property
    def tokens(self) -> float:
        """Inputs of the learner's language model per trajectory, mean."""
        return self.mean(lambda images: sum(self.replayed(images)))

    @property
    def longest_trajectory(self) -> int:
        return sum(self.replayed(self.rounds))


def _words(config: Config) -> int:
    return config.rollout.max_reflection_tokens
