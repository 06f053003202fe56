"""The original Janus-Pro layout (config.json of model_type `multi_modality`): names, shapes, configuration.

`RULES` is the one table. It maps a transformers name to the original one; reading and writing both go through the
names of a model, so that one is the exact inverse of the other. Three tensors of the vision tower's attention
(queries, keys, values) are one tensor in the original layout; the tower's position table has a leading axis there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

MODEL_TYPE = "multi_modality"

_BLOCK, _TOWER = r"model\.vision_model\.encoder\.layers\.(\d+)\.", "vision_model.vision_tower."


def _linear(prefix: str) -> Callable[[re.Match], str]:
    """Linear layer number n of a projector is entry 2n of a Sequential with activations in between."""
    return lambda match: f"{prefix}.layers.{2 * int(match[1]) + 2}."


RULES: tuple[tuple[str, str | Callable[[re.Match], str]], ...] = (
    (r"lm_head\.", "language_model.lm_head."),
    (r"model\.language_model\.", "language_model.model."),
    (r"model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"model\.aligner\.hidden_layers\.(\d+)\.", _linear("aligner")),
    (r"model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"model\.generation_aligner\.hidden_layers\.(\d+)\.", _linear("gen_aligner")),
    (r"model\.generation_embeddings\.", "gen_embed."),
    (r"model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"model\.generation_head\.vision_head\.", "gen_head.vision_head."),
    (r"model\.vision_model\.embeddings\.patch_embedding\.", _TOWER + "patch_embed.proj."),
    (r"model\.vision_model\.embeddings\.position_embedding\.weight$", _TOWER + "pos_embed"),
    (r"model\.vision_model\.post_layernorm\.", _TOWER + "norm."),
    (_BLOCK + r"layer_norm([12])\.", _TOWER + r"blocks.\1.norm\2."),
    (_BLOCK + r"self_attn\.[qkv]_proj\.", _TOWER + r"blocks.\1.attn.qkv."),
    (_BLOCK + r"self_attn\.projection_layer\.", _TOWER + r"blocks.\1.attn.proj."),
    (_BLOCK + r"mlp\.", _TOWER + r"blocks.\1.mlp."),
    (r"model\.vqmodel\.(encoder\.)down\.(\d+)\.block\.", r"gen_vision_model.\1conv_blocks.\2.res."),
    (r"model\.vqmodel\.(encoder\.)down\.(\d+)\.", r"gen_vision_model.\1conv_blocks.\2."),
    (r"model\.vqmodel\.(decoder\.)up\.(\d+)\.block\.", r"gen_vision_model.\1conv_blocks.\2.res."),
    (r"model\.vqmodel\.(decoder\.)up\.(\d+)\.", r"gen_vision_model.\1conv_blocks.\2."),
    (r"model\.vqmodel\.(encoder|decoder)\.mid\.block_1\.", r"gen_vision_model.\1.mid.0."),
    (r"model\.vqmodel\.(encoder|decoder)\.mid\.attn_1\.", r"gen_vision_model.\1.mid.1."),
    (r"model\.vqmodel\.(encoder|decoder)\.mid\.block_2\.", r"gen_vision_model.\1.mid.2."),
    (r"model\.vqmodel\.", "gen_vision_model."),
)
"""Start of a transformers name and what stands there in the original; the first that fits is used."""

UNUSED: tuple[tuple[str, str], ...] = (
    (r"vision_model\.vision_tower\.attn_pool\.", "pooling head of the vision tower, which is run without its head"),
    (r"gen_vision_model\.quantize\.codebook_used$", "counter of used codes, written only while the VQ trains"),
    (r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$", "computed from rope_theta"),
    (r"model\.language_model\..*rotary_emb\.inv_freq$", "computed from rope_theta"),
)
"""Keys that a checkpoint may hold and the model has no use for, with the reason."""


def is_unused(name: str) -> bool:
    return any(re.match(pattern, name) for pattern, _ in UNUSED)


def original_name(name: str) -> str:
    """The original layout's name of a transformers name, e.g. "lm_head.weight"."""
    for pattern, replacement in RULES:
        renamed, count = re.subn("^" + pattern, replacement, name, count=1)
        if count:
            return renamed
    raise KeyError(f"{name} is no parameter of a Janus model")


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Original name -> the transformers names whose tensors it holds, one or three, in their order there."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(original_name(name), []).append(name)
    # q_proj, k_proj, v_proj in the order of the fused tensor, whatever the order in which a module declares them.
    return {key: sorted(group, key=lambda n: "qkv".find(n.rsplit(".", 2)[-2][0])) for key, group in groups.items()}


def original_shape(key: str, shapes: list[torch.Size]) -> tuple[int, ...]:
    """Shape in the original layout of the tensors of one group."""
    first = sum(shape[0] for shape in shapes)
    leading = (1,) if key.endswith(".pos_embed") else ()
    return (*leading, first, *shapes[0][1:])


def split(key: str, tensor: torch.Tensor, shapes: list[torch.Size]) -> list[torch.Tensor]:
    """Views of an original tensor, one for each transformers name of its group."""
    tensor = tensor[0] if key.endswith(".pos_embed") else tensor
    return list(tensor.split([shape[0] for shape in shapes]))


def join(key: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """The inverse of `split`."""
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole[None] if key.endswith(".pos_embed") else whole


# configuration

_TOWERS = {
    "siglip_large_patch16_384": {"patch_size": 16, "width": 1024, "layers": 24, "heads": 16, "mlp_ratio": 4.0},
}
"""Vision towers by name. A config.json may give the same keys itself and so name a tower of another size."""
_VQ = {
    "ch": ("base_channels", 128),
    "ch_mult": ("channel_multiplier", [1, 1, 2, 2, 4]),
    "z_channels": ("latent_channels", 256),
    "num_res_blocks": ("num_res_blocks", 2),
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
}
"""VQ-16: key that a config.json may give, JanusVQVAEConfig's name for it, value of the published models."""


class ConfigError(ValueError):
    """A config.json that does not describe a model of the Janus-Pro family."""


def _params(config: dict[str, Any], section: str, *names: str) -> dict[str, Any]:
    params = (config.get(section) or {}).get("params") or {}
    missing = [name for name in names if name not in params]
    if missing:
        raise ConfigError(f"config.json: {section}.params lacks {', '.join(missing)}")
    return params


def transformers_config(config: dict[str, Any], ids: dict[str, int]) -> JanusConfig:
    """JanusConfig of an original config.json; `ids` are the tokenizer's (bos, eos, pad, image). Raises ConfigError."""
    aligner = _params(config, "aligner_config", "n_embed", "depth")
    gen_aligner = _params(config, "gen_aligner_config", "n_embed", "depth")
    head = _params(config, "gen_head_config", "n_embed", "image_token_embed", "image_token_size")
    vq = _params(config, "gen_vision_config", "n_embed", "image_token_size")
    vision = _params(config, "vision_config", "image_size", "model_name")
    tower = {**_TOWERS.get(vision["model_name"], {}), **vision}
    if "width" not in tower:
        raise ConfigError(
            f"config.json: vision_config.params.model_name {vision['model_name']!r} is none of {', '.join(_TOWERS)}"
        )
    language = dict(config.get("language_config") or {})
    hidden = LlamaConfig(**_llama(language)).hidden_size
    widths = {aligner["n_embed"], gen_aligner["n_embed"], head["n_embed"], head["image_token_embed"], hidden}
    if len(widths) > 1:
        raise ConfigError(f"config.json: aligners, image head and language model differ in width: {sorted(widths)}")
    if vision.get("select_layer", -1) != -1 or vision.get("select_feature", "same") != "same":
        raise ConfigError("config.json: vision_config selects other features than the tower's last layer")
    text = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    side = tower["image_size"] // tower["patch_size"]
    return JanusConfig(
        text_config=LlamaConfig(**{**_llama(language), **text, "tie_word_embeddings": False}).to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=tower["width"],
            num_hidden_layers=tower["layers"],
            num_attention_heads=tower["heads"],
            mlp_ratio=tower["mlp_ratio"],
            image_size=tower["image_size"],
            patch_size=tower["patch_size"],
            num_image_tokens=side**2,
            projection_dim=aligner["n_embed"],
            depth=aligner["depth"],
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            num_patches=side,
            projection_dim=gen_aligner["n_embed"],
            num_hidden_layers=gen_aligner["depth"],
            image_token_embed_dim=head["n_embed"],
            **{name: vq.get(key, default) for key, (name, default) in _VQ.items()},
        ),
        image_token_id=ids["image"],
        tie_word_embeddings=False,
    )


def _llama(language: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in language.items() if k not in ("model_type", "torch_dtype", "_attn_implementation")}


def original_config(config: JanusConfig, dtype: torch.dtype) -> dict[str, Any]:
    """An original config.json for a model that did not come from one."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    width, dtype_name = text.hidden_size, str(dtype).removeprefix("torch.")
    language = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    language += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    tower = {
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_ratio": float(vision.mlp_ratio),
    }
    names = [name for name, published in _TOWERS.items() if published == tower]
    vision_params = {"model_name": names[0]} if names else {"model_name": "siglip", **tower}
    vq_params = {key: getattr(vq, name) for key, (name, default) in _VQ.items() if _list(getattr(vq, name)) != default}

    def section(model_type: str, cls: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": model_type, "params": params}

    def aligner(model_type: str, depth: int, input_dim: int) -> dict[str, Any]:
        projector = {"depth": depth, "input_dim": input_dim, "n_embed": width, "projector_type": "mlp_gelu"}
        return section(model_type, "MlpProjector", **projector)

    head = {"image_token_embed": width, "image_token_size": vq.num_embeddings, "n_embed": width}
    features = {"image_size": vision.image_size, "select_feature": "same", "select_layer": -1}
    vq_params = {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim, **vq_params}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype_name,
        "aligner_config": aligner("aligner", vision.depth, vision.hidden_size),
        "gen_aligner_config": aligner("gen_aligner", vq.num_hidden_layers, vq.embed_dim),
        "gen_head_config": section("gen_head", "vision_head", **head),
        "gen_vision_config": section("gen_vision", "VQ-16", **vq_params),
        "vision_config": section("vision", "CLIPVisionTower", **vision_params, **features),
        "language_config": {
            "model_type": "llama",
            "torch_dtype": dtype_name,
            "rope_theta": text.rope_parameters["rope_theta"],
            **{name: getattr(text, name) for name in language},
        },
    }


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
