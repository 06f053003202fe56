"""InternVL as a judge: P(yes) of a question about one or several images, one forward pass (R_QA of the paper)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from rlpipe.paths import resolve_path
from rlpipe.reward.judge import answer_ids, p_yes, single_token
from rlpipe.reward.question import check_question, fill
from rlpipe.types import Score, ScoreRequest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Question = str | tuple[str, ...]
"""What is asked: a text about one image, which stands before it; or the texts around several images, an image between
each two of them (`question.around_images`)."""


class JudgeFormat:
    """How a question and its images enter an InternVL, and how its answer is read; holds no weights.

        judge = JudgeFormat(tokenizer, model.config)
        ids, mask = judge.encode(questions)                                # [B, T]
        logits = answer_logits(model, ids, mask, judge.pixels(images))     # [B, V]
        p = judge.p_yes(logits)                                            # [B]

    system: text of a system message; empty leaves it out (InternVL2.5 was trained with one, InternVL3
            without).
    yes_ids, no_ids: the single-token spellings of the two answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: InternVLConfig, system: str = "") -> None:
        self.tokenizer = tokenizer
        self.image_size: tuple[int, int] = tuple(config.vision_config.image_size)
        self.yes_ids, self.no_ids = answer_ids(tokenizer)
        start, end, image, open_, close = map(
            self._token, ("<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>")
        )
        if image != config.image_token_id:
            raise ValueError(
                f"tokenizer: <IMG_CONTEXT> is token {image}, but config.json has image_token_id "
                f"{config.image_token_id}; tokenizer and weights are of different checkpoints"
            )
        patches = math.prod(s // p for s, p in zip(self.image_size, config.vision_config.patch_size, strict=True))
        tokens = round(patches * config.downsample_ratio**2)
        if tokens != config.image_seq_length:
            raise ValueError(
                f"config.json: image_seq_length is {config.image_seq_length}, but an image of "
                f"{self.image_size} pixels makes {tokens} tokens"
            )
        head = [start, *self._text(f"system\n{system}"), end, *self._text("\n")] if system else []
        self._before = [*head, start, *self._text("user\n")]
        self._image = [open_, *[image] * tokens, close]
        self._after = [end, *self._text("\n"), start, *self._text("assistant\n")]
        self._pad: int = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def _token(self, token: str) -> int:
        found = single_token(self.tokenizer, token)
        if found is None:
            raise ValueError(f"tokenizer: {token!r} is not one token; is this the tokenizer of an InternVL?")
        return found

    def _text(self, text: str) -> list[int]:
        # Special tokens inside a user's text are spelt out: a prompt cannot close the turn or add an image.
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both int64 [B, T], of the chat up to the first answer token.

        <|im_start|>user\\n<img><IMG_CONTEXT>...</img>\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
        with image_seq_length times <IMG_CONTEXT> for every image. Padded on the right: a causal model never looks
        at the padding, so batch mates cannot change a result.
        """
        cache = {q: [*self._before, *self._user(q), *self._after] for q in dict.fromkeys(questions)}
        length = max(map(len, cache.values()))
        ids = torch.full((len(questions), length), self._pad)
        mask = torch.zeros_like(ids)
        for row, question in enumerate(questions):
            tokens = cache[question]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def _user(self, question: Question) -> list[int]:
        first, *others = ("", f"\n{question}") if isinstance(question, str) else question
        ids = self._text(first)
        for text in others:
            ids += [*self._image, *self._text(text)]
        return ids

    def fit(self, image: np.ndarray) -> np.ndarray:
        """A uint8 [H, W, 3] image at the model's size: one tile, bicubic with antialiasing."""
        if image.shape[:2] == self.image_size:
            return image
        height, width = self.image_size
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))

    def pixels(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] of uint8 [B, h, w, 3]: resized if need be, ImageNet mean and deviation."""
        if tuple(images.shape[1:3]) != self.image_size:
            images = np.stack([self.fit(image) for image in np.asarray(images)])
        scaled = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255.0
        mean, std = (scaled.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        return (scaled - mean) / std

    def p_yes(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [B], see `judge.p_yes`."""
        return p_yes(logits, self.yes_ids, self.no_ids)


def answer_logits(
    model: InternVLForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor,
) -> torch.Tensor:
    """float32 logits [B, V] of the first answer token, with gradients; no other position meets lm_head.

    input_ids, attention_mask: int64 [B, T], padded on the right. pixel_values: float [N, 3, H, W], the images of
    row 0 in order, those of row 1, and so on.
    """
    # The mask only says where rows end: a causal model cannot see the padding on the right, and without an
    # explicit mask attention takes its fast path.
    hidden = model.model(input_ids=input_ids, pixel_values=pixel_values, use_cache=False).last_hidden_state
    last = attention_mask.sum(1) - 1
    return model.lm_head(hidden[torch.arange(len(last), device=hidden.device), last]).float()


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerBase]:
    """Model (evaluation mode) and tokenizer of a local folder in the transformers layout (safetensors)."""
    path = resolve_path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: no config.json in {path}; give the folder of an InternVL checkpoint")
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind != "internvl":
        raise ValueError(
            f"path: {path} holds a model of type {kind!r}, not 'internvl'; "
            "take the converted checkpoint, whose name ends in -hf"
        )
    model = InternVLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


class InternVLScorer:
    """A loaded InternVL that answers questions about images; scorers are made of it.

    path:       checkpoint folder of transformers' InternVLForConditionalGeneration.
    batch_size: rows of one forward pass.
    dtype:      "float32" or "bfloat16". device: "auto" is a GPU if there is one.
    """

    def __init__(
        self,
        path: str | Path,
        batch_size: int = 128,
        dtype: str = "float32",
        device: str = "auto",
        system: str = "",
    ) -> None:
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if dtype not in dtypes:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(dtypes)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is below 1")
        self.batch_size = batch_size
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model, tokenizer = load(path, dtypes[dtype], self.device)
        self.format = JudgeFormat(tokenizer, self.model.config, system)

    def answers(self, rows: Sequence[tuple[Question, tuple[np.ndarray, ...]]]) -> list[float]:
        """P(yes) of each (question, its images uint8 [H, W, 3]), in order; equal rows are computed once."""
        distinct, keys = {}, []
        for question, images in rows:
            images = tuple(map(np.ascontiguousarray, images))
            key = (question, *(hashlib.sha256(image).digest() + repr(image.shape).encode() for image in images))
            distinct.setdefault(key, (question, images))
            keys.append(key)
        values = dict(zip(distinct, self._probabilities(list(distinct.values())), strict=True))
        return [values[key] for key in keys]

    @torch.inference_mode()
    def _probabilities(self, rows: list[tuple[Question, tuple[np.ndarray, ...]]]) -> list[float]:
        """P(yes) of each row; rows of like length share a batch."""
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i][0])))
        values = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            ids, mask = self.format.encode([rows[i][0] for i in batch])
            pixels = self.format.pixels(np.stack([self.format.fit(image) for i in batch for image in rows[i][1]]))
            logits = answer_logits(self.model, *(t.to(self.device) for t in (ids, mask, pixels)))
            for i, value in zip(batch, self.format.p_yes(logits).tolist(), strict=True):
                values[i] = value
        return values


class InternVLJudge(InternVLScorer):
    """Scorer: the probability that the judge answers `question`, a template with `{prompt}`, with yes.

    judge = InternVLJudge("rlpipe/world/assets/judge", 'Does this image match "{prompt}"?')
    scores = judge.score([ScoreRequest(id="0", prompt=prompt, image=image)])
    """

    def __init__(
        self,
        path: str | Path,
        question: str,
        batch_size: int = 128,
        dtype: str = "float32",
        device: str = "auto",
        system: str = "",
    ) -> None:
        self.question = check_question(question)
        super().__init__(path, batch_size, dtype, device, system)

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One score in [0, 1] per request, in order."""
        values = self.answers([(fill(self.question, r.prompt.text), (r.image,)) for r in requests])
        return [Score(id=r.id, value=value) for r, value in zip(requests, values, strict=True)]
