"""Checkpoints of the policy on disk: the original Janus-Pro layout, transformers' layout, overlays; both ways.

A folder's config.json says which layout it has: model_type `multi_modality` is the original one
(`rlpipe.policy.original` has the names), `janus` is transformers'. Either holds safetensors or `pytorch_model*.bin`
files, with or without an index. Nothing is unpickled but tensors, and no remote code runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

from rlpipe.paths import resolve_path
from rlpipe.policy import original
from rlpipe.policy.templates import IMAGE, Templates

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files beside the weights that an export hands on as they were."""
FOLDER = "original"
"""Subfolder of a checkpoint in the transformers layout with what only the original layout has a place for."""
SHARD_BYTES = 5_000_000_000


class CheckpointError(ValueError):
    """A checkpoint or overlay that does not fit; one line that names the file and the keys."""


@dataclass(frozen=True)
class Original:
    """What a checkpoint in the original layout holds beside the model: kept so that an export gives it back."""

    config: dict[str, Any]
    unused: dict[str, torch.Tensor]
    files: dict[str, bytes]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", self.config)
        save_file(self.unused, folder / "unused.safetensors")
        self.write_files(folder)

    def write_files(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, folder: Path) -> Original:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        unused = load_file(folder / "unused.safetensors")
        return cls(config, {name: tensor.clone() for name, tensor in unused.items()}, _files(folder))


def load(
    path: Path, dtype: torch.dtype, device: str, overlay: str | Path | None = None
) -> tuple[JanusForConditionalGeneration, Templates, Original | None]:
    """The model in evaluation mode, its templates, and what the original layout has besides (None: it has nothing).

    The model is built without memory and receives one tensor after the other, so that beside it only the page
    cache of the files is needed. `overlay` is a state dict whose tensors replace those of the folder.

    Raises FileNotFoundError, CheckpointError.
    """
    tokenizer, config, kept = read_configs(path)
    janus = build_on_meta(config)
    tensors, unused = _translate(janus, read_tensors(path), str(path))
    _complete(janus, tensors, str(path))
    if overlay is not None:
        over, over_unused = _translate(janus, read_overlay(resolve_path(overlay)), str(overlay), "policy.overlay")
        tensors |= over
        unused |= over_unused
    _fill(janus, tensors, dtype, device)
    if (path / "generation_config.json").is_file():
        janus.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    if kept is not None:
        kept = Original(kept.config, {**kept.unused, **{n: t.clone() for n, t in unused.items()}}, kept.files)
    return janus.eval(), Templates(tokenizer), kept


def read_configs(path: Path) -> tuple[PreTrainedTokenizerFast, JanusConfig, Original | None]:
    """Tokenizer and configuration of a checkpoint folder of either layout; no weights."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"policy.path: no config.json in {path.resolve()}; give a Janus checkpoint folder")
    raw = json.loads((path / "config.json").read_text("utf-8"))
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(f"policy.path: no tokenizer.json in {path}; copy the checkpoint's own")
    # Not by the class that tokenizer_config.json names: tokenizer.json is complete, that class may rewrite it.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if raw.get("model_type") == original.MODEL_TYPE:
        templates = Templates(tokenizer)
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        ids = {"bos": templates.bos, "eos": templates.eos, "pad": templates.pad, "image": image}
        try:
            config = original.transformers_config(raw, ids)
        except original.ConfigError as error:
            raise CheckpointError(f"policy.path: {path}: {error}") from None
        return tokenizer, config, Original(raw, {}, _files(path))
    if raw.get("model_type") != "janus":
        raise CheckpointError(
            f"policy.path: {path / 'config.json'} has model_type {raw.get('model_type')!r}; give a Janus checkpoint "
            f"({original.MODEL_TYPE!r}: original layout, 'janus': transformers layout)"
        )
    config = JanusConfig.from_pretrained(path, local_files_only=True)
    # Janus has a head of its own. transformers' default is to tie it, and a config.json may be silent about it.
    config.tie_word_embeddings = False
    kept = Original.load(path / FOLDER) if (path / FOLDER / "config.json").is_file() else None
    return tokenizer, config, kept


def stored_dtype(path: Path) -> torch.dtype:
    """The type that a folder's config.json says its weights have; float32 if it says nothing."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"policy.path: no config.json in {path.resolve()}; give a Janus checkpoint folder")
    config = json.loads((path / "config.json").read_text("utf-8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")


def build_on_meta(config: JanusConfig) -> JanusForConditionalGeneration:
    """The model of a configuration with shapes and no storage."""
    with torch.device("meta"):
        janus = JanusForConditionalGeneration(config)
    janus.set_attn_implementation("sdpa")
    return janus


# reading


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by the names in its files, mapped from disk and not yet read."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        for name, tensor in _read_file(file).items():
            if name in tensors:
                raise CheckpointError(f"policy.path: {name} is in {file.name} and in another file of {path}")
            tensors[name] = tensor
    return tensors


def weight_files(path: Path) -> list[Path]:
    """Files that hold a folder's weights: those of its index if it has one; safetensors before .bin."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = path / f"{stem}.{suffix}.index.json"
        if index.is_file():
            files = [path / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(
                    f"policy.path: {path} lacks {', '.join(missing)}, which {index.name} names; complete the download"
                )
            return files
        files = sorted(path.glob(f"{stem}*.{suffix}"))
        if files:
            return files
    raise FileNotFoundError(f"policy.path: no model*.safetensors and no pytorch_model*.bin in {path}")


def read_overlay(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a .safetensors file, or of a torch file, where it may lie under "ema" or "module"."""
    if not file.is_file():
        raise FileNotFoundError(f"policy.overlay: no file {file.resolve()}; give a state dict (.pth, .safetensors)")
    state = _read_file(file, "policy.overlay")
    for key in ("ema", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    strangers = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strangers or not state:
        raise CheckpointError(
            f"policy.overlay: {file} is no state dict; entries that are no tensors: {_some(strangers) or 'none at all'}"
        )
    return state


def _read_file(file: Path, field: str = "policy.path") -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
    except Exception as error:  # a pickle that holds more than tensors, with several pages of advice
        reason = f"holds more than tensors ({type(error).__name__})"
    raise CheckpointError(f"{field}: {file} cannot be read as tensors: {reason}")


def _translate(
    janus: nn.Module, state: dict[str, torch.Tensor], where: str, field: str = "policy.path"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors by transformers name, and those of known keys without use. Raises CheckpointError."""
    shapes = {name: tensor.shape for name, tensor in janus.state_dict().items()}
    groups = original.grouped(shapes)
    tensors, unused, unexpected, misshapen = {}, {}, [], []
    for key, tensor in state.items():
        if key in shapes:
            found, expected = tuple(tensor.shape), tuple(shapes[key])
            parts = {key: tensor} if found == expected else {}
        elif key in groups:
            found = tuple(tensor.shape)
            expected = original.original_shape(key, [shapes[name] for name in groups[key]])
            parts = {}
            if found == expected:
                views = original.split(key, tensor, [shapes[name] for name in groups[key]])
                parts = dict(zip(groups[key], views, strict=True))
        elif original.is_unused(key):
            unused[key] = tensor
            continue
        else:
            unexpected.append(key)
            continue
        if not parts:
            misshapen.append(f"{key} {list(found)}, not {list(expected)}")
        tensors |= parts
    if unexpected or misshapen:
        raise CheckpointError(
            f"{field}: {where} does not fit its config.json: {_count(unexpected, 'unexpected')}"
            f"{'; ' if unexpected and misshapen else ''}{_count(misshapen, 'of another shape')}"
        )
    return tensors, unused


def _complete(janus: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    missing = [name for name in janus.state_dict() if name not in tensors]
    if missing:
        raise CheckpointError(f"policy.path: {where} is not complete: {_count(missing, 'missing')}")


def _count(names: list[str], what: str) -> str:
    return f"{len(names)} {what} ({_some(names)})" if names else ""


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _fill(janus: JanusForConditionalGeneration, tensors: dict[str, torch.Tensor], dtype: torch.dtype, device: str):
    """Give a model without storage its tensors, each copied once, and the buffers that are computed."""
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        # Always a copy: a parameter that is a view of a mapped file would change when the file is overwritten.
        value = tensors.pop(name).to(device, dtype, copy=True)
        setattr(janus.get_submodule(module), leaf, nn.Parameter(value))
    language_model, embeddings = janus.model.language_model, janus.model.vision_model.embeddings
    language_model.rotary_emb = type(language_model.rotary_emb)(janus.config.text_config).to(device)
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).expand((1, -1))
    left = [name for name, t in (*janus.named_parameters(), *janus.named_buffers()) if t.is_meta]
    if left:
        raise CheckpointError(f"policy.path: this transformers release has tensors of unknown origin: {_some(left)}")
    for config in (janus.config, janus.config.text_config, janus.config.vision_config, janus.config.vq_config):
        config.dtype = dtype


# writing


def save(
    path: str | Path, janus: JanusForConditionalGeneration, templates: Templates, kept: Original | None, dtype=None
) -> None:
    """Write the transformers layout; floating-point tensors as `dtype` (None: as they are)."""
    path = Path(path)
    types = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in janus.state_dict().items()}
    state = {name: t.detach().to(types[name]).cpu().contiguous() for name, t in janus.state_dict().items()}
    janus.save_pretrained(path, state_dict=state)
    templates.tokenizer.save_pretrained(path)
    if kept is not None:
        kept.save(path / FOLDER)


def export_original(
    path: str | Path,
    janus: JanusForConditionalGeneration,
    templates: Templates,
    kept: Original | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the original layout: config.json, safetensors files, tokenizer files.

    dtype: of the weights; None: what the original config.json says, else the model's. Tensors that training did
    not touch are bit for bit those of the checkpoint that was loaded if this is its type.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise CheckpointError(f"export: {path} is not empty; give a new folder")
    stored = kept.config.get("torch_dtype") if kept is not None else None
    dtype = dtype or (getattr(torch, stored) if stored else janus.dtype)
    if kept is None:
        kept = Original(original.original_config(janus.config, dtype), {}, {})
        templates.tokenizer.save_pretrained(path)
    state, groups = janus.state_dict(), original.grouped(janus.state_dict())
    sizes = {key: sum(state[name].numel() for name in names) * dtype.itemsize for key, names in groups.items()}
    sizes |= {key: tensor.nbytes for key, tensor in kept.unused.items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for file, keys in plan.filename_to_tensors.items():
        shard = {key: kept.unused[key] for key in keys if key in kept.unused}
        for key in keys:
            if key in groups:
                parts = [state[name].detach().to("cpu", dtype) for name in groups[key]]
                shard[key] = original.join(key, parts).contiguous()
        save_file(shard, path / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(path / "model.safetensors.index.json", index)
    name = str(dtype).removeprefix("torch.")
    _write_json(path / "config.json", {**kept.config, "torch_dtype": name})
    kept.write_files(path)


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
