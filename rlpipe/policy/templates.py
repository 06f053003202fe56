"""The strings that frame a trajectory, and their token ids (official code, section "prompt strings").

draw    [BOS] <|User|>: {caption} \\n\\n <|Assistant|>: [BOI]            then image tokens
look    [EOI] \\nLet me think Does this image match the prompt...        then Yes|No, reason [EOS]
redraw  [EOS] \\nNext, I will draw a new image [BOI]                     then image tokens
edit    [BOS] <|User|>: [BOI] source image [EOI] {instruction} Please generate an image.\\n\\n<|Assistant|>: [BOI]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rlpipe.data.prompts import PromptError
from rlpipe.schema import Config, TemplateSection
from rlpipe.types import Prompt

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
LOOK = TemplateSection.look.removeprefix(EOI)
REDRAW = TemplateSection.redraw.removeprefix(EOS).removesuffix(BOI)
"""The words of the default templates, without special tokens."""


@dataclass(frozen=True)
class Templates:
    """Token ids of every fixed string, looked up in the checkpoint's own tokenizer, never constants.

    max_prompt_tokens: most ids of a prompt with its frame. cut: whether the end of a longer caption is left out
    instead of refused; its frame always stays whole.
    """

    tokenizer: PreTrainedTokenizerBase
    strings: TemplateSection = field(default_factory=TemplateSection)
    max_prompt_tokens: int = 200
    cut: bool = False

    def configured(self, config: Config) -> Templates:
        """The same tokenizer with the strings and limits of a configuration."""
        limit, cut = config.policy.max_prompt_tokens, config.data.long_prompts == "cut"
        return replace(self, strings=config.policy.templates, max_prompt_tokens=limit, cut=cut)

    @cached_property
    def plain(self) -> Templates:
        """The same with "User" and "Assistant" in place of the role tokens (the official redraw examples)."""
        prompt = self.strings.prompt.replace(USER, "User").replace(ASSISTANT, "Assistant")
        return replace(self, strings=replace(self.strings, prompt=prompt))

    def _single(self, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1 or self.tokenizer.unk_token_id in ids:
            raise ValueError(f"tokenizer: {token!r} is not one token (got ids {ids}); is this a Janus tokenizer?")
        return ids[0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _parts(self, name: str, *fields: str) -> list[str]:
        """A template cut at its fields, which stand in this order."""
        parts, rest = [], getattr(self.strings, name)
        for text in fields:
            before, found, rest = rest.partition(text)
            if not found:
                raise ValueError(
                    f"policy.templates.{name}: {getattr(self.strings, name)!r} lacks {' then '.join(fields)}; put it in"
                )
            parts.append(before)
        return [*parts, rest]

    def _ends_with_boi(self, name: str, ids: list[int]) -> list[int]:
        if ids[-1:] != [self.boi]:
            raise ValueError(f"policy.templates.{name}: does not end with {BOI}; an image has to follow it")
        return ids

    @cached_property
    def bos(self) -> int:
        return self._single(BOS)

    @cached_property
    def eos(self) -> int:
        return self._single(EOS)

    @cached_property
    def pad(self) -> int:
        return self._single(PAD)

    @cached_property
    def boi(self) -> int:
        return self._single(BOI)

    @cached_property
    def eoi(self) -> int:
        return self._single(EOI)

    @cached_property
    def yes(self) -> int:
        return self._ids("Yes")[-1]

    @cached_property
    def no(self) -> int:
        return self._ids("No")[-1]

    @cached_property
    def look(self) -> list[int]:
        """What follows an image that is looked at."""
        return self._ids(self.strings.look)

    @cached_property
    def redraw(self) -> list[int]:
        """What follows a reflection (without its end-of-sentence token) and precedes the next image."""
        return self._ends_with_boi("redraw", self._ids(self.strings.redraw))

    def prompt(self, caption: str) -> list[int]:
        """Ids of the drawing prompt, from begin-of-sentence to begin-of-image. Raises ValueError if it is too long."""
        caption = caption.strip()
        ids = self._framed(caption)
        if len(ids) <= self.max_prompt_tokens:
            return ids
        self._refuse_unless_cut(caption, len(ids))
        words = self._ids(caption)
        keep = len(words) - (len(ids) - self.max_prompt_tokens)
        while keep >= 0:
            # Cut words may merge with the frame into other tokens, so the whole is tokenised again.
            ids = self._framed(self.tokenizer.decode(words[:keep]).strip())
            if len(ids) <= self.max_prompt_tokens:
                return ids
            keep -= 1
        raise self._too_small(len(ids))

    def _framed(self, caption: str) -> list[int]:
        before, after = self._parts("prompt", "{caption}")
        return self._ends_with_boi("prompt", [self.bos, *self._ids(f"{before}{caption}{after}")])

    def edit(self, instruction: str) -> tuple[list[int], list[int]]:
        """Ids before and after the source image's codes; the last is begin-of-image.

        The instruction is tokenised alone and raw, as in the official code. Raises ValueError if it is too long.
        """
        head, middle, tail = self._edit_frame
        words = self._ids(instruction)
        room = self.max_prompt_tokens - len(head) - len(middle) - len(tail)
        if len(words) > room:
            self._refuse_unless_cut(instruction, len(words) + self.max_prompt_tokens - room)
            if room < 0:
                raise self._too_small(self.max_prompt_tokens - room)
        return head, [*middle, *words[: max(room, 0)], *tail]

    @cached_property
    def _edit_frame(self) -> tuple[list[int], list[int], list[int]]:
        head, middle, tail = map(self._ids, self._parts("edit", "{source}", "{instruction}"))
        return [self.bos, *head], middle, self._ends_with_boi("edit", tail)

    def _refuse_unless_cut(self, text: str, count: int) -> None:
        if not self.cut:
            raise ValueError(
                f"prompt {text[:40]!r}... is {count} tokens with its frame, policy.max_prompt_tokens is "
                f"{self.max_prompt_tokens}; shorten it, raise the limit, or set data.long_prompts=cut"
            )

    def _too_small(self, count: int) -> ValueError:
        return ValueError(
            f"policy.max_prompt_tokens: {self.max_prompt_tokens} is less than the frame's own {count}; raise it"
        )

    def blank(self, prompt_ids: list[int]) -> list[int]:
        """The unconditional prompt: everything between begin-of-sentence and begin-of-image is pad.

        The pads are attended, as in the official code.
        """
        return [prompt_ids[0], *[self.pad] * (len(prompt_ids) - 2), prompt_ids[-1]]

    def blank_edit(self, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
        """The unconditional frame of an edit: the instruction's tokens are pads; frame and image stay."""
        _, middle, tail = self._edit_frame
        count = len(after) - len(middle) - len(tail)
        return before, [*middle, *[self.pad] * count, *tail]

    def reflection(self, answer: str) -> list[int]:
        """Ids of a supervised answer such as "No, there is one red circle, not two.", end-of-sentence included."""
        return [*self._ids(answer), self.eos]

    def text(self, token_ids) -> str:
        """The words of a reflection, without special tokens."""
        return self.tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True).strip()


def check_prompts(prompts: Iterable[Prompt], templates: Templates, program: str = "introspect") -> None:
    """Raise PromptError naming the prompts that a program cannot take.

    They are too long for policy.max_prompt_tokens with this tokenizer, or (program "edit", which frames instructions
    where the others frame captions) lack a source image.
    """
    frame = templates.edit if program == "edit" else templates.prompt
    problems = []
    for prompt in prompts:
        if program == "edit" and prompt.source_image is None:
            problems.append(f"{prompt.id}: no source_image; rollout.program=edit needs the image to edit")
        try:
            frame(prompt.text)
        except ValueError as error:
            problems.append(f"{prompt.id}: {error}")
    if problems:
        raise PromptError(problems)
