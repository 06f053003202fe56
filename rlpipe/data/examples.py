"""Supervised examples from label files and edit pairs; images are read and encoded when a batch asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rlpipe.config import Config, SftSection
from rlpipe.data.codes import ImageStore
from rlpipe.data.edits import EditPair, load_edits
from rlpipe.data.labels import Label, LabelSet, load_labels, missing_tasks, pair
from rlpipe.data.prompts import LabelError
from rlpipe.data.sft import Rejected, draw_item, edit_item, judge_item, redraw_item
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.templates import Templates, check_prompts
from rlpipe.types import Prompt, Sampling, TrainItem


def open_store(config: Config, folder: Path, device: str) -> tuple[ImageStore, Templates]:
    """The store of a configuration's policy, in float32: a narrower type makes nearby codes a matter of rounding."""
    policy = JanusPolicy.from_config(config, torch.float32, "cpu")
    # Encoding needs the VQ tokenizer alone; the rest is most of the checkpoint.
    policy.janus.model.language_model = policy.janus.lm_head = nn.Identity()
    store = ImageStore(policy.to(device), folder, config.sft.pixel_cache, config.sft.threads)
    return store, policy.templates


class LabelExamples:
    """Draws, judgements (classes balanced) and redraws of label files.

    Earlier images, up to `sft.max_context_images` - 1 of them, are wrong images of the prompt with lower scores, in
    increasing order; how many is drawn evenly.
    """

    def __init__(
        self,
        labels: LabelSet,
        store: ImageStore,
        templates: Templates,
        sampling: Sampling,
        section: SftSection,
        seed: int,
    ) -> None:
        self.labels, self.store, self.templates, self.sampling = labels, store, templates, sampling
        self.section = section
        self.right, self.wrong = labels.balanced(seed)
        self.redraw_ids = sorted(labels.redraws)
        self.rejected: dict[str, list[Label]] = {}
        for label in sorted(labels.rejected, key=lambda label: label.prob):
            self.rejected.setdefault(label.promptid, []).append(label)

    @classmethod
    def prepare(
        cls, section: SftSection, store: ImageStore, templates: Templates, sampling: Sampling, seed: int
    ) -> LabelExamples:
        """Read the labels. Raises PromptError naming bad rows, too long prompts, sub-tasks without examples."""
        labels = load_labels(section)
        lacking = missing_tasks(section, labels.counts)
        if lacking:
            raise LabelError(lacking)
        check_prompts([Prompt(name, text) for name, text in labels.prompts.items()], templates)
        return cls(labels, store, templates, sampling, section, seed)

    def _prompt(self, label: Label, roles: str = "chat") -> Prompt:
        metadata = {} if roles == "chat" else {"roles": roles}
        return Prompt(f"label-{label.promptid}", self.labels.prompts[label.promptid], metadata)

    def _answer(self, label: Label) -> np.ndarray:
        """Token ids of a reason with its end-of-sentence, cut at the length limit (official: 184)."""
        return np.array(self.templates.reflection(label.reason))[: self.sampling.max_reflection_tokens]

    def _earlier(self, rng: np.random.Generator, label: Label, below: float) -> list[Label]:
        """Wrong images of the same prompt with scores below a bound, in increasing order."""
        room = self.section.max_context_images
        wanted = int(rng.integers(1, room + 1)) - 1 if room > 1 else 0
        others = [r for r in self.rejected.get(label.promptid, ()) if r.prob < below and r.path != label.path]
        chosen = rng.permutation(len(others))[:wanted] if wanted and others else []
        return [others[i] for i in sorted(chosen)]

    def draw(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        labels = [self.labels.targets[i] for i in rng.integers(len(self.labels.targets), size=count)]
        codes = self.store.codes([label.path for label in labels])
        return [draw_item(self._prompt(label), c, self.sampling) for label, c in zip(labels, codes, strict=True)]

    def judge(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        right = [self.right[i] for i in rng.integers(len(self.right), size=count // 2)]
        wrong = [self.wrong[i] for i in rng.integers(len(self.wrong), size=count - count // 2)]
        rows = [(label, self._earlier(rng, label, label.prob)) for label in right + wrong]
        paths = [seen.path for label, earlier in rows for seen in (*earlier, label)]
        pixels = iter(self.store.pixels(paths, "pad"))
        # Nothing is drawn here, so the codes of these images are never read.
        unread = np.zeros(self.store.policy.num_image_tokens, np.int64)
        items = []
        for label, earlier in rows:
            seen = [Rejected(unread, self._answer(e), next(pixels)) for e in earlier]
            answer, image = self._answer(label), next(pixels)
            cut = answer[-1] != self.templates.eos
            prompt = self._prompt(label)
            items.append(judge_item(prompt, unread, image, answer, label.verdict, self.sampling, seen, bool(cut)))
        return items

    def redraw(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        rows = []
        for index in rng.integers(len(self.redraw_ids), size=count):
            wrong, right = pair(self.labels.redraws[self.redraw_ids[index]], rng)
            rejected = [*self._earlier(rng, wrong, right.prob), wrong]
            rows.append((sorted(rejected, key=lambda label: label.prob), right))
        codes = iter(self.store.codes([label.path for rejected, right in rows for label in (*rejected, right)]))
        items = []
        for rejected, right in rows:
            *earlier, last = [Rejected(next(codes), self._answer(label)) for label in rejected]
            prompt = self._prompt(right, self.section.redraw_roles)
            items.append(redraw_item(prompt, last.codes, last.answer, next(codes), self.sampling, earlier))
        return items


class EditExamples:
    """Edits: source image, instruction, edited image."""

    def __init__(self, pairs: Sequence[EditPair], store: ImageStore, sampling: Sampling) -> None:
        self.pairs, self.store, self.sampling = pairs, store, sampling

    @classmethod
    def prepare(cls, section: SftSection, store: ImageStore, templates: Templates, sampling: Sampling) -> EditExamples:
        """Read the pairs. Raises PromptError naming bad rows and instructions that are too long."""
        pairs = load_edits(section.edits)
        check_prompts([Prompt(e.id, e.instruction, source_image=e.source) for e in pairs], templates, "edit")
        return cls(pairs, store, sampling)

    def edit(self, rng: np.random.Generator, count: int) -> list[TrainItem]:
        pairs = [self.pairs[i] for i in rng.integers(len(self.pairs), size=count)]
        codes = self.store.codes([path for edit in pairs for path in (edit.source, edit.target)])
        prompts = [Prompt(edit.id, edit.instruction, source_image=edit.source) for edit in pairs]
        return [edit_item(prompt, codes[2 * i], codes[2 * i + 1], self.sampling) for i, prompt in enumerate(prompts)]
