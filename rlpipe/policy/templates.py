"""The strings that frame a trajectory, and their token ids (official code, section "prompt strings").

draw    [BOS] <|User|>: {caption} \\n\\n <|Assistant|>: [BOI]            then image tokens
look    [EOI] \\nLet me think Does this image match the prompt...        then Yes|No, reason [EOS]
redraw  [EOS] \\nNext, I will draw a new image [BOI]                     then image tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
LOOK = "\nLet me think Does this image match the prompt..."
REDRAW = "\nNext, I will draw a new image"


@dataclass(frozen=True)
class Templates:
    """Token ids of every fixed string, looked up in the checkpoint's own tokenizer, never constants."""

    tokenizer: PreTrainedTokenizerBase

    def _single(self, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1 or self.tokenizer.unk_token_id in ids:
            raise ValueError(f"tokenizer: {token!r} is not one token (got ids {ids}); is this a Janus tokenizer?")
        return ids[0]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

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
        return [self.eoi, *self._ids(LOOK)]

    @cached_property
    def redraw(self) -> list[int]:
        """What follows a reflection (without its end-of-sentence token) and precedes the next image."""
        return [self.eos, *self._ids(REDRAW), self.boi]

    def prompt(self, caption: str) -> list[int]:
        """Ids of the drawing prompt, from begin-of-sentence to begin-of-image."""
        return [self.bos, *self._ids(f"{USER}: {caption.strip()}\n\n{ASSISTANT}:"), self.boi]

    def blank(self, prompt_ids: list[int]) -> list[int]:
        """The unconditional prompt: everything between begin-of-sentence and begin-of-image is pad.

        The pads are attended, as in the official code.
        """
        return [prompt_ids[0], *[self.pad] * (len(prompt_ids) - 2), prompt_ids[-1]]

    def reflection(self, answer: str) -> list[int]:
        """Ids of a supervised answer such as "No, there is one red circle, not two.", end-of-sentence included."""
        return [*self._ids(answer), self.eos]

    def text(self, token_ids) -> str:
        """The words of a reflection, without special tokens."""
        return self.tokenizer.decode([int(i) for i in token_ids], skip_special_tokens=True).strip()
