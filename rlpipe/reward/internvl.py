"""InternVL: its chat, its tiles and the backend that runs it with transformers; and the judge of one question."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from rlpipe.paths import resolve_path
from rlpipe.reward import judge, tiling
from rlpipe.reward.backend import Answer, Query, distinct, one_ahead
from rlpipe.reward.judge import Judge, missing
from rlpipe.reward.question import check_question, fill
from rlpipe.schema import ScorerSection
from rlpipe.types import Score, ScoreRequest

Question = str | tuple[str, ...]
"""What is asked: a text about one image, which stands before it; or the texts around several images, an image between
each two of them (`question.around_images`)."""


class JudgeFormat:
    """How a question and its images enter an InternVL, and how its answer is read; holds no weights.

        judge = JudgeFormat(tokenizer, model.config)
        ids, mask = judge.encode(questions)                                # [B, T]
        logits = answer_logits(model, ids, mask, judge.pixels(images))     # [B, V]
        p = judge.p_yes(logits)                                            # [B]

    system:    text of a system message; empty leaves it out (InternVL2.5 was trained with one, InternVL3
               without).
    max_tiles: most tiles that `tiles` cuts an image into.
    yes_ids, no_ids: the single-token spellings of the two answers.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: InternVLConfig, system: str = "", max_tiles: int = 12
    ) -> None:
        self.tokenizer, self.max_tiles = tokenizer, max_tiles
        self.image_size: tuple[int, int] = tuple(config.vision_config.image_size)
        self.max_length: int = config.text_config.max_position_embeddings
        self.yes_ids, self.no_ids = judge.answer_ids(tokenizer)
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
        # InternLM2's tokenizer begins every text with <s>, Qwen2's with nothing.
        first = tokenizer.encode("")
        head = [start, *self._text(f"system\n{system}"), end, *self._text("\n")] if system else []
        self._before = [*first, *head, start, *self._text("user\n")]
        self._open, self._tile, self._close = open_, [image] * tokens, close
        self._after = [end, *self._text("\n"), start, *self._text("assistant\n")]
        self._pad: int = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.end = end

    def _token(self, token: str) -> int:
        found = judge.single_token(self.tokenizer, token)
        if found is None:
            raise ValueError(f"tokenizer: {token!r} is not one token; is this the tokenizer of an InternVL?")
        return found

    def _text(self, text: str) -> list[int]:
        # Special tokens inside a user's text are spelt out: a prompt cannot close the turn or add an image.
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode(self, questions: Sequence[Question]) -> tuple[torch.Tensor, torch.Tensor]:
        """`pad` of the `tokens` of questions about images of one tile each."""
        cache = {question: self.tokens(question) for question in dict.fromkeys(questions)}
        return self.pad([cache[question] for question in questions])

    def tokens(self, question: Question, num_tiles: Sequence[int] | None = None) -> list[int]:
        """Token ids of the chat up to the first answer token.

        <|im_start|>user\\n<img><IMG_CONTEXT>...</img>\\n{question}<|im_end|>\\n<|im_start|>assistant\\n
        with image_seq_length times <IMG_CONTEXT> for every tile of an image.

        num_tiles: of each image, its thumbnail included; None is one tile each.
        """
        first, *others = ("", f"\n{question}") if isinstance(question, str) else question
        ids = [*self._before, *self._text(first)]
        for text, count in zip(others, num_tiles or [1] * len(others), strict=True):
            ids += [self._open, *self._tile * count, self._close, *self._text(text)]
        return [*ids, *self._after]

    def pad(self, rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, both int64 [B, T].

        Padded on the right: a causal model never looks at the padding, so batch mates cannot change a result.
        """
        ids = torch.full((len(rows), max(map(len, rows))), self._pad)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return ids, mask

    def num_tiles(self, images: Sequence[np.ndarray]) -> list[int]:
        """How many `tiles` each image has."""
        return [tiling.num_tiles(image.shape[:2], self.image_size, self.max_tiles) for image in images]

    def tiles(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """uint8 [N, H, W, 3] at the model's size, of uint8 [h, w, 3] images of any size, in order."""
        return np.concatenate([tiling.cut(image, self.image_size, self.max_tiles) for image in images])

    def pixels(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """float32 [N, 3, H, W] of uint8 [N, H, W, 3] at the model's size: ImageNet's mean and deviation."""
        if tuple(images.shape[1:3]) != self.image_size:
            raise ValueError(f"images: {tuple(images.shape[1:3])} pixels, not {self.image_size}; cut them into tiles")
        return tiling.normalise(torch.as_tensor(images))

    def p_yes(self, logits: torch.Tensor) -> torch.Tensor:
        """float32 [B], see `judge.p_yes`."""
        return judge.p_yes(logits, self.yes_ids, self.no_ids)


def answer_logits(
    model: InternVLForConditionalGeneration,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor | None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 logits [B, V] of the first answer token, with gradients; no other position meets lm_head.

    input_ids, attention_mask: int64 [B, T], padded on the right. pixel_values: float [N, 3, H, W], the tiles of the
    images of row 0 in order, those of row 1, and so on; None where no row has an image.
    order: int64 [M], where rows share images: the index into `pixel_values` of each tile of row 0, of row 1, and so on.
           The vision tower sees a tile once however many rows ask about it.
    """
    embeds = model.get_input_embeddings()(input_ids)
    if pixel_values is not None:
        features = model.model.get_image_features(pixel_values, return_dict=True).pooler_output.to(embeds.dtype)
        slots = (input_ids == model.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(slots, features if order is None else features[order])
    # The mask only says where rows end: a causal model cannot see the padding on the right, and without an
    # explicit mask attention takes its fast path.
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    last = attention_mask.sum(1) - 1
    return model.lm_head(hidden[torch.arange(len(last), device=hidden.device), last]).float()


def check_folder(path: str | Path | None) -> Path:
    """The absolute path of an InternVL in the transformers layout; ValueError or FileNotFoundError name `path`."""
    if path is None:
        raise ValueError("path: none; give the folder of an InternVL checkpoint")
    path = resolve_path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: no config.json in {path}; give the folder of an InternVL checkpoint")
    kind = json.loads((path / "config.json").read_text()).get("model_type")
    if kind != "internvl":
        raise ValueError(
            f"path: {path} holds a model of type {kind!r}, not 'internvl'; "
            "take the converted checkpoint, whose name ends in -hf"
        )
    return path


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerBase]:
    """Model (evaluation mode) and tokenizer of a local folder in the transformers layout (safetensors)."""
    path = check_folder(path)
    model = InternVLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Queries as the model takes them: int64 ids and mask [B, T], and the tiles of all images.

    places: of the queries among all. tiles: uint8 [N, H, W, 3], each image's once. order: as in `answer_logits`.
    """

    places: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    tiles: torch.Tensor | None
    order: torch.Tensor | None

    def inputs(self, device: str) -> tuple[torch.Tensor | None, ...]:
        """ids, mask, pixel_values and order for `answer_logits`, on a device.

        Bytes go there and become floats there: a quarter of the transfer, and of the memory while they wait.
        """
        moved = [None if t is None else t.to(device) for t in (self.ids, self.mask, self.tiles, self.order)]
        ids, mask, tiles, order = moved
        return ids, mask, None if tiles is None else tiling.normalise(tiles), order


@dataclass(frozen=True, slots=True)
class _Plan:
    """The batches of distinct queries; for every query asked the place of its equal; answers that are there already."""

    places: list[int]
    answers: list[Answer | None]
    batches: Iterable[_Batch]


class InternVLBackend:
    """`rlpipe.reward.backend.Backend` of an InternVL in this process, without settings of its own.

    While one batch is in the model, the next is made ready on another thread.

    prepare_seconds: spent on tokens and tiles, over all threads.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        batch_size: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
    ) -> None:
        found = torch.cuda.is_available()
        if device.startswith("cuda") and not found:
            raise ValueError(f"device: {device!r}, but this process sees no GPU; take auto or cpu, or give it num_gpus")
        self.batch_size = batch_size
        self.device = ("cuda" if found else "cpu") if device == "auto" else device
        self.model, tokenizer = load(path, getattr(torch, dtype), self.device)
        self.format = JudgeFormat(tokenizer, self.model.config, system, max_tiles)
        self.prepare_seconds = 0.0
        self._tokenizing, self._counting = threading.Lock(), threading.Lock()

    @staticmethod
    def check(
        path: str | Path | None,
        *,
        batch_size: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
    ) -> None:
        """ValueError if there is no InternVL in the folder or the device is none."""
        try:
            check_folder(path)
            torch.device("cpu" if device == "auto" else device)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        except RuntimeError:
            raise ValueError(f"device: {device!r} is unknown; take auto, cpu, cuda or cuda:1") from None

    def prepare(self, queries: Sequence[Query]) -> _Plan:
        plan = self._plan(queries)
        return replace(plan, batches=list(plan.batches))

    def answer(self, queries: Sequence[Query], prepared: _Plan | None = None) -> list[Answer]:
        return self._run(prepared or self._plan(queries), self._read)

    def write(self, queries: Sequence[Query], max_tokens: int) -> list[Answer]:
        return self._run(self._plan(queries), partial(self._generate, max_tokens=max_tokens))

    def _plan(self, queries: Sequence[Query]) -> _Plan:
        with self._preparing():
            kept, places = distinct(queries)
            rows = self._tokens(kept)
        answers = [self._too_long(row) for row in rows]
        order = [i for i in _likely_batch_mates(kept, rows) if answers[i] is None]
        parts = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        return _Plan(places, answers, (self._batch(part, rows, kept) for part in parts))

    def _tokens(self, queries: list[Query]) -> list[list[int]]:
        """The tokens of each query; one prompt is usually asked about many images."""
        wanted = [(query.texts, tuple(self.format.num_tiles(query.images))) for query in queries]
        # A tokenizer is no longer the same while it spells special tokens out, so threads take turns.
        with self._tokenizing:
            rows = {key: self.format.tokens(*key) for key in dict.fromkeys(wanted)}
        return [rows[key] for key in wanted]

    def _too_long(self, row: list[int]) -> Answer | None:
        if len(row) <= self.format.max_length:
            return None
        return Answer(error=f"question and tiles are {len(row)} tokens, the judge takes {self.format.max_length}")

    def _batch(self, part: list[int], rows: list[list[int]], queries: list[Query]) -> _Batch:
        with self._preparing():
            ids, mask = self.format.pad([rows[i] for i in part])
            shown = [image for i in part for image in queries[i].images]
            if not shown:
                return _Batch(part, ids, mask, None, None)
            images = {id(image): image for image in shown}
            counts = self.format.num_tiles(list(images.values()))
            ranges = torch.arange(sum(counts)).split(counts)
            indices = dict(zip(images, ranges, strict=True))
            tiles = torch.from_numpy(self.format.tiles(images.values()))
            return _Batch(part, ids, mask, tiles, torch.cat([indices[id(image)] for image in shown]))

    @torch.inference_mode()
    def _run(self, plan: _Plan, step: Callable[[_Batch], list[Answer]]) -> list[Answer]:
        answers = list(plan.answers)
        for batch in one_ahead(iter(plan.batches)):
            for place, answer in zip(batch.places, step(batch), strict=True):
                answers[place] = answer
        return [answers[place] for place in plan.places]

    def _read(self, batch: _Batch) -> list[Answer]:
        logits = answer_logits(self.model, *batch.inputs(self.device))
        return judge.answers(logits, self.format.yes_ids, self.format.no_ids)

    def _generate(self, batch: _Batch, max_tokens: int) -> list[Answer]:
        ids, mask, pixels, order = batch.inputs(self.device)
        # Generation goes on at the right end of a row, so the padding moves to the left.
        shift = (mask.shape[1] - mask.sum(1)).tolist()
        ids, mask = (torch.stack([row.roll(n) for row, n in zip(t, shift, strict=True)]) for t in (ids, mask))
        tokens = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({} if pixels is None else {"pixel_values": pixels[order].to(self.model.dtype)}),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=self.format.end,
            pad_token_id=self.format.end,
        )
        said = tokens[:, ids.shape[1] :]
        with self._tokenizing:
            texts = self.format.tokenizer.batch_decode(said, skip_special_tokens=True)
        ended = (said == self.format.end).any(1).tolist()
        return [Answer(text=text, cut=not end) for text, end in zip(texts, ended, strict=True)]

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        with self._counting:
            self.prepare_seconds += time.perf_counter() - started


def _likely_batch_mates(queries: list[Query], rows: list[list[int]]) -> list[int]:
    """Indices of the queries: those about the same images together, and among these groups like lengths."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, query in enumerate(queries):
        groups.setdefault(tuple(map(id, query.images)), []).append(number)
    by_length = sorted(groups.values(), key=lambda group: max(len(rows[i]) for i in group))
    return [i for group in by_length for i in group]


class InternVLJudge(Judge):
    """Scorer: the probability that the judge answers `question`, a template with `{prompt}`, with yes.

    The other keywords are those of `Judge`. `Score.parts` has `mass`, what yes and no have of the whole vocabulary.

        judge = InternVLJudge("rlpipe/world/assets/judge", 'Does this image match "{prompt}"?')
        scores = judge.score([ScoreRequest(id="0", prompt=prompt, image=image)])
    """

    def __init__(
        self,
        path: str | Path | None = None,
        question: str = ScorerSection.question,
        batch_size: int = 128,
        backend: str = "transformers",
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        self.question = check_question(question)
        super().__init__(path, batch_size, backend, device, dtype, system, max_tiles, engine)

    def queries(self, request: ScoreRequest) -> list[Query]:
        return [Query.about(fill(self.question, request.prompt.text), request.image)]

    def judged(self, request: ScoreRequest, answers: list[Answer]) -> Score:
        failed, (answer,) = missing(request, answers), answers
        return failed or Score(id=request.id, value=answer.p_yes, parts={"mass": answer.mass})
