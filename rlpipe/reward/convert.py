"""An InternVL judge from the original layout to transformers': planned as a whole, then written shard by shard.

    plan = Plan.of(Path("InternVL2_5-26B"))
    print("\\n".join(plan.lines()))
    write(plan, Path("InternVL2_5-26B-hf"))

Weights are mapped from disk and not read before a shard needs them; one shard is let go before the next. Memory is
therefore the copies of the fused tensors of one shard, a part of `SHARD_BYTES`, beside pages that the system may drop.
Nothing is unpickled but tensors, and no code of the checkpoint runs.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import GenerationConfig, InternVLConfig, PreTrainedTokenizerFast

from rlpipe.policy.checkpoint import CheckpointError, read_tensors
from rlpipe.reward.judge import answer_ids
from rlpipe.reward.original import Layout, OriginalError, check_model_type, transformers_config
from rlpipe.reward.serving import CHAT_TEMPLATE, processor_files
from rlpipe.reward.spm import IMAGE, read_tokenizer

SHARD_BYTES = 4_000_000_000
END = "<|im_end|>"


@dataclass(frozen=True)
class Plan:
    """What a conversion does, every tensor and token accounted for.

    tensors: original name -> tensor on disk. shards: file -> original names. unused: original name -> why it is left.
    """

    source: Path
    raw: dict[str, Any]
    config: InternVLConfig
    tokenizer: PreTrainedTokenizerFast
    layout: Layout
    tensors: dict[str, torch.Tensor]
    shards: StateDictSplit
    unused: dict[str, str]

    @classmethod
    def of(cls, source: Path, shard_bytes: int = SHARD_BYTES) -> Plan:
        """The plan of a folder; raises OriginalError or FileNotFoundError where it does not fit together."""
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"{source}: no config.json; give the folder of an InternVL checkpoint")
        raw = json.loads((source / "config.json").read_text("utf-8"))
        check_model_type(raw)
        tokenizer = read_tokenizer(source)
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config, rules = transformers_config(raw, {**ids, "image": tokenizer.convert_tokens_to_ids(IMAGE)})
        _check_tokens(tokenizer, config)
        layout = Layout.of(config, rules)
        try:
            tensors = read_tensors(source)
        except (CheckpointError, FileNotFoundError) as error:
            raise OriginalError(str(error).removeprefix("policy.path: ")) from None
        unused = account(layout, tensors, str(source))
        sizes = {key: tensor.nbytes for key, tensor in tensors.items() if key not in unused}
        shards = split_state_dict_into_shards_factory(
            sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
        )
        dtype = next(tensors[key].dtype for key in sizes)
        for part in (config, config.text_config, config.vision_config):
            part.dtype = dtype
        return cls(source, raw, config, tokenizer, layout, tensors, shards, unused)

    @property
    def bytes(self) -> int:
        return self.shards.metadata["total_size"]

    def lines(self) -> list[str]:
        """What would be done, in words."""
        text, vision = self.config.text_config, self.config.vision_config
        scaling = {k: v for k, v in text.rope_parameters.items() if v != "default"}
        lines = [
            f"language model: {self.raw['llm_config']['architectures'][0]} -> {text.model_type}, "
            f"{text.num_hidden_layers} layers of {text.hidden_size}, {text.num_attention_heads} heads, "
            f"{text.num_key_value_heads} of keys and values, rope {scaling}",
            f"vision tower: {vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.norm_type}"
            f"{', normalised queries and keys' if vision.use_qk_norm else ''}, {vision.image_size[0]} pixels, "
            f"{self.config.image_seq_length} tokens a tile",
            f"tokenizer: {len(self.tokenizer)} tokens, {IMAGE} is {self.config.image_token_id}",
        ]
        left: dict[str, int] = {}
        for reason in self.unused.values():
            left[reason] = left.get(reason, 0) + 1
        lines += [f"left out: {count} tensors, {reason}" for reason, count in left.items()]
        for file, keys in self.shards.filename_to_tensors.items():
            size = sum(self.tensors[key].nbytes for key in keys)
            lines.append(f"{file}: {len(keys)} tensors, {size / 2**30:.2f} GiB, {keys[0]} to {keys[-1]}")
        return lines


def account(layout: Layout, tensors: Mapping[str, torch.Tensor], where: str) -> dict[str, str]:
    """Unused key -> why, of a checkpoint that fits its layout; raises OriginalError that names what does not."""
    unused, unexpected, misshapen = {}, [], []
    for key, tensor in tensors.items():
        if key in layout.shapes:
            found, expected = tuple(tensor.shape), layout.shapes[key]
            if found != expected:
                misshapen.append(f"{key} {list(found)}, not {list(expected)}")
        elif reason := layout.unused(key):
            unused[key] = reason
        else:
            unexpected.append(key)
    missing = [key for key in layout.shapes if key not in tensors]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if keys
    ]
    if problems:
        raise OriginalError(f"{where} does not fit its config.json: {'; '.join(problems)}")
    if layout.tied and layout.tied[0] in tensors:
        head, embeddings = (tensors[key] for key in layout.tied)
        if not torch.equal(head, embeddings):
            raise OriginalError(
                f"{where}: {layout.tied[0]} differs from {layout.tied[1]} though llm_config.tie_word_embeddings is "
                "true; set it to false in config.json if the head is to be kept"
            )
    return unused


def write(plan: Plan, out: Path, report: Callable[[str], None] = print) -> None:
    """Write the converted folder; `out` is there as a whole or, after any failure, not at all.

    Until then the files are in a folder beside it whose name starts with a dot. Raises OriginalError.
    """
    check_target(plan, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write_weights(plan, staging, report)
        _write_files(plan, staging)
        staging.chmod(0o755)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_target(plan: Plan, out: Path) -> None:
    """Refuse a folder that has something in it, and a disk without room."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OriginalError(f"{out}: is there already; give a new folder")
    free = shutil.disk_usage(next(folder for folder in out.absolute().parents if folder.is_dir())).free
    if free < plan.bytes:
        raise OriginalError(
            f"{out}: {plan.bytes / 2**30:.1f} GiB to write and {free / 2**30:.1f} free; make room or give another disk"
        )


def _write_weights(plan: Plan, folder: Path, report: Callable[[str], None]) -> None:
    index: dict[str, str] = {}
    files = plan.shards.filename_to_tensors
    for number, (file, keys) in enumerate(files.items(), 1):
        shard: dict[str, torch.Tensor] = {}
        for key in keys:
            shard |= plan.layout.parts(key, plan.tensors[key])
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        report(f"{number}/{len(files)} {file}: {len(shard)} tensors")
    if plan.shards.is_sharded:
        _write_json(folder / "model.safetensors.index.json", {"metadata": plan.shards.metadata, "weight_map": index})


def _write_files(plan: Plan, folder: Path) -> None:
    """Configuration, tokenizer, and what transformers' processor (and so vLLM) wants to know of images."""
    plan.config.save_pretrained(folder)
    tokenizer = plan.tokenizer
    # InternLM2's tokenizer begins every text with <s>; servers leave that to the template.
    tokenizer.chat_template = ("{{- bos_token -}}\n" if tokenizer.encode("") else "") + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    ends = dict.fromkeys((tokenizer.convert_tokens_to_ids(END), tokenizer.eos_token_id))
    generation = GenerationConfig(
        eos_token_id=[i for i in ends if i is not None],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generation.save_pretrained(folder)
    most = plan.raw.get("max_dynamic_patch", 12) if plan.raw.get("dynamic_image_size", True) else 1
    for name, content in processor_files(plan.config.to_dict(), most).items():
        _write_json(folder / name, content)


def _check_tokens(tokenizer: PreTrainedTokenizerFast, config: InternVLConfig) -> None:
    last = max(tokenizer.get_vocab().values())
    if last >= config.text_config.vocab_size:
        raise OriginalError(
            f"tokenizer: token {tokenizer.convert_ids_to_tokens(last)!r} is {last}, but llm_config.vocab_size is "
            f"{config.text_config.vocab_size}; tokenizer and weights are of different checkpoints"
        )
    try:
        answer_ids(tokenizer)
    except ValueError as error:
        raise OriginalError(str(error)) from None


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
