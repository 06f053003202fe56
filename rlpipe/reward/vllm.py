"""InternVL on vLLM, in this process: token ids and pixels are made here, vLLM only computes.

    backend = VLLMBackend("rlpipe/world/assets/judge", kv_cache_memory_bytes=2**28)
    backend.answer([Query.about("Is the circle red?", image)])[0].p_yes          # 0.97
    backend.close()

vLLM's own preprocessing is passed by: the engine gets the ids, tiles and normalisation of `JudgeFormat`, and is asked
for the log-probs of the spellings of yes and no at the first answer token, so that the answer is the transformers
backend's. The engine core runs in this process (with `tensor_parallel_size` above 1 its workers are child processes
that end with it): no answer passes through a socket, and nothing is left when the process is killed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, InternVLConfig, PreTrainedTokenizerBase

from rlpipe.paths import resolve_path
from rlpipe.reward import original
from rlpipe.reward.backend import Answer, Query, distinct
from rlpipe.reward.internvl import JudgeFormat, check_folder
from rlpipe.reward.judge import single_token
from rlpipe.reward.serving import CPU_KV_CACHE_BYTES, engine_environment, serving_folder

OURS = {
    "model": "path",
    "dtype": "dtype",
    "max_num_seqs": "batch_size",
    "logprobs_mode": "always raw_logprobs",
    "generation_config": "always vllm: no setting of the checkpoint's enters an answer",
    "mm_processor_cache_gb": "always 0: images are prepared here",
}
"""Keywords of vLLM's EngineArgs that are not free, and what sets them."""
NO_ANSWER = "the engine ended without an answer"


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Inputs of the engine for distinct queries, or why there is none; for every query the place of its equal."""

    inputs: list[dict[str, Any] | Answer]
    places: list[int]


class VLLMBackend:
    """`rlpipe.reward.backend.Backend`; `engine` are keywords of vLLM's EngineArgs.

    path:   transformers' layout; with `trust_remote_code: true` also the original one (InternVLChatModel).
    engine: e.g. tensor_parallel_size, gpu_memory_utilization, max_model_len, kv_cache_memory_bytes (default 1 GiB
            without a GPU), limit_mm_per_prompt (default {"image": 2, "video": 0}), enforce_eager (default true: one
            pass over each prompt gains little from graphs, and compiling takes minutes).

    Calls from several threads are served one after the other; `prepare` runs beside them.
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
        **engine: Any,
    ) -> None:
        is_original = _is_original(path, engine.get("trust_remote_code", False))
        config, tokenizer = _load(resolve_path(path), is_original)
        self.format = JudgeFormat(tokenizer, config, system, max_tiles)
        self.prepare_seconds = 0.0
        self._config, self._dtype = config, getattr(torch, dtype)
        self._pixels_key = "pixel_values_flat" if is_original else "pixel_values"
        self._tokenizing, self._counting, self._stepping = threading.Lock(), threading.Lock(), threading.Lock()
        self._numbers = itertools.count()
        settings = {
            "enforce_eager": True,
            **engine,
            "limit_mm_per_prompt": {"image": 2, "video": 0} | engine.get("limit_mm_per_prompt", {}),
            "dtype": dtype,
            "max_num_seqs": batch_size,
            "logprobs_mode": "raw_logprobs",
            "generation_config": "vllm",
            "mm_processor_cache_gb": 0,
            "max_num_batched_tokens": self._budget(engine.get("max_num_batched_tokens"), max_tiles),
        }
        self._max_images: int = settings["limit_mm_per_prompt"]["image"]
        with tempfile.TemporaryDirectory(prefix="rlpipe-vllm-") as folder:
            source = resolve_path(path) if is_original else serving_folder(path, folder, max_tiles)
            self._engine = _start(source, config, device, settings)
        self.max_length: int = self._engine.model_config.max_model_len

    @staticmethod
    def check(
        path: str | Path | None,
        *,
        batch_size: int = 128,
        device: str = "auto",
        dtype: str = "float32",
        system: str = "",
        max_tiles: int = 12,
        **engine: Any,
    ) -> None:
        """ValueError if there is no InternVL in the folder, a keyword is not free, or vLLM is not installed."""
        _is_original(path, engine.get("trust_remote_code", False))
        for key, source in OURS.items():
            if key in engine:
                raise ValueError(f"{key}: not a free setting of the engine ({source}); take it out")
        if device.partition(":")[2] not in ("", "0"):
            raise ValueError(f"device: {device!r}; vLLM takes the first visible GPU, so take auto and num_gpus")
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("backend: vllm is not installed here; see docs/vllm.md, or take transformers or http")

    def prepare(self, queries: Sequence[Query]) -> _Prepared:
        """Token ids, tiles and pixels of the distinct queries; images that several share are cut once."""
        with self._preparing():
            kept, places = distinct(queries)
            with self._tokenizing:  # a tokenizer is no longer the same while it spells special tokens out
                rows = [self.format.tokens(q.texts, self.format.num_tiles(q.images)) for q in kept]
            cut: dict[str, Any] = {}
            return _Prepared([self._input(query, ids, cut) for query, ids in zip(kept, rows, strict=True)], places)

    def answer(self, queries: Sequence[Query], prepared: _Prepared | None = None) -> list[Answer]:
        yes, no = self.format.yes_ids, self.format.no_ids

        def read(output: Any) -> Answer:
            if not output.logprobs:
                return Answer(error=f"{NO_ANSWER}: {output.finish_reason}")
            found = output.logprobs[0]
            return Answer.from_logprobs(*([found[i].logprob for i in ids] for ids in (yes, no)))

        return self._run(prepared or self.prepare(queries), read, max_tokens=1, logprob_token_ids=yes + no)

    def write(self, queries: Sequence[Query], max_tokens: int) -> list[Answer]:
        def read(output: Any) -> Answer:
            with self._tokenizing:
                text = self.format.tokenizer.decode(output.token_ids, skip_special_tokens=True)
            return Answer(text=text, cut=output.finish_reason == "length")

        return self._run(self.prepare(queries), read, max_tokens=max_tokens, stop_token_ids=[self.format.end])

    def _budget(self, given: int | None, max_tiles: int) -> int:
        """Tokens of one engine step; a request with an image above it would wait for ever."""
        largest = (max_tiles + (max_tiles > 1)) * self._config.image_seq_length
        if given is not None and given < largest:
            raise ValueError(
                f"max_num_batched_tokens: {given}, but an image of {max_tiles} tiles and a thumbnail is {largest} "
                "tokens; raise it or lower max_tiles"
            )
        return given or max(8192, largest)

    def close(self) -> None:
        """Ends the engine: its memory, and its worker processes if it has any."""
        self._engine.engine_core.shutdown()

    def _input(self, query: Query, ids: list[int], cut: dict[str, Any]) -> dict[str, Any] | Answer:
        """What the engine takes; cut: the images so far by digest, equal ones are one object."""
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        # One position of the context is for the answer.
        if len(ids) >= self.max_length:
            return Answer(error=f"question and tiles are {len(ids)} tokens, the engine takes {self.max_length - 1}")
        if len(query.images) > self._max_images:
            return Answer(
                error=f"{len(query.images)} images in one query, the engine takes {self._max_images}; "
                "raise limit_mm_per_prompt"
            )
        if not query.images:
            return tokens_input(ids)
        digests = [_digest(image) for image in query.images]
        position, ranges, items = 0, [], []
        for digest, image in zip(digests, query.images, strict=True):
            if digest not in cut:
                cut[digest] = self._item(image)
            num_tiles, item = cut[digest]
            length = num_tiles * self._config.image_seq_length
            position = ids.index(self._config.image_token_id, position)
            ranges.append(PlaceholderRange(offset=position, length=length))
            position += length
            items.append(item)
        return mm_input(ids, MultiModalKwargsItems({"image": items}), {"image": digests}, {"image": ranges})

    def _item(self, image: np.ndarray) -> tuple[int, Any]:
        """Number of tiles of an image, and what vLLM's model takes for it."""
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

        pixels = self.format.pixels(self.format.tiles([image])).to(self._dtype)
        counts = torch.tensor([len(pixels)])
        values = {
            self._pixels_key: pixels,
            "image_num_patches": counts,
            "image_token_id": torch.tensor(self._config.image_token_id),
        }
        fields = {
            self._pixels_key: MultiModalFieldConfig.flat_from_sizes("image", counts),
            "image_num_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_token_id": MultiModalFieldConfig.shared("image", 1, keep_on_cpu=True),
        }
        (item,) = MultiModalKwargsItems.from_hf_inputs(values, fields)["image"]
        return len(pixels), item

    def _run(self, prepared: _Prepared, read: Callable[[Any], Answer], **sampling: Any) -> list[Answer]:
        """The answers to prepared queries; read: answer of a vLLM CompletionOutput."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **sampling
        )
        answers = [i if isinstance(i, Answer) else Answer(error=NO_ANSWER) for i in prepared.inputs]
        asked = {p: i for p, i in enumerate(prepared.inputs) if not isinstance(i, Answer)}
        for place, output in self._outputs(asked, parameters).items():
            answers[place] = read(output)
        return [answers[place] for place in prepared.places]

    def _outputs(self, asked: Mapping[int, Any], parameters: Any) -> dict[int, Any]:
        """For each place of an input its CompletionOutput."""
        waiting: dict[str, int] = {}
        outputs = {}
        with self._stepping:
            try:
                for place, engine_input in asked.items():
                    number = str(next(self._numbers))
                    waiting[number] = place
                    self._engine.add_request(number, engine_input, parameters)
                while self._engine.has_unfinished_requests():
                    for output in self._engine.step():
                        if output.finished:
                            outputs[waiting.pop(output.request_id)] = output.outputs[0]
            finally:  # whatever stopped this call, the next one finds an engine without its requests
                self._engine.abort_request(list(waiting))
        return outputs

    @contextmanager
    def _preparing(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        with self._counting:
            self.prepare_seconds += time.perf_counter() - started


def _digest(image: np.ndarray) -> str:
    """Equal for equal pixels: the engine looks at such images once."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _is_original(path: str | Path | None, trust_remote_code: bool) -> bool:
    """Whether the folder has the original layout; ValueError if it has none that can be, or may be, used."""
    try:
        check_folder(path)
    except (FileNotFoundError, ValueError) as error:
        if path is None or not (resolve_path(path) / "config.json").is_file():
            raise ValueError(str(error)) from None
        if json.loads((resolve_path(path) / "config.json").read_text()).get("model_type") != original.MODEL_TYPE:
            raise
        if not trust_remote_code:
            raise ValueError(
                f"path: {path} has the original layout, whose code comes with the checkpoint; convert it with "
                "launch/convert_judge.py, or let that code run here with trust_remote_code: true"
            ) from None
        return True
    return False


def _load(path: Path, is_original: bool) -> tuple[InternVLConfig, PreTrainedTokenizerBase]:
    """Configuration, as transformers has it, and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=is_original)
    if not is_original:
        return InternVLConfig.from_pretrained(path, local_files_only=True), tokenizer
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    raw = json.loads((path / "config.json").read_text())
    return original.transformers_config(raw, ids | {"image": single_token(tokenizer, "<IMG_CONTEXT>")})[0], tokenizer


def _start(folder: Path, config: InternVLConfig, device: str, settings: dict[str, Any]) -> Any:
    """The running LLMEngine of a folder; settings: keywords of EngineArgs."""
    # In this process: vLLM reads this when it makes the engine.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.update(engine_environment() | os.environ)
    from vllm import EngineArgs, LLMEngine
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if device.partition(":")[0] not in ("auto", kind):
        raise ValueError(
            f"device: {device!r}, but the vLLM that is installed here runs on {kind}; take auto"
            + (", and num_gpus: 1" if kind != "cpu" else "")
        )
    if kind == "cpu":
        text = config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if head_dim % 32:
            raise ValueError(
                f"path: attention heads of {head_dim}; vLLM without a GPU takes multiples of 32, "
                "so take backend transformers"
            )
        settings.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE_BYTES)
    alone = settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1) == 1
    settings.setdefault("distributed_executor_backend", "uni" if alone else "mp")
    try:
        arguments = EngineArgs(model=str(folder), **settings)
    except TypeError as error:  # a keyword that vLLM does not have
        raise ValueError(f"engine: {error}") from None
    return LLMEngine.from_engine_args(arguments)
