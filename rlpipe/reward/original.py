"""The original InternVL layout (config.json of model_type `internvl_chat`): names, shapes, configuration.

The rules map a transformers name to the original one, so that the expected keys and shapes of a checkpoint follow from
the transformers model of its config.json. Two original tensors hold three each: `attn.qkv` of the vision tower
(queries, keys, values one after the other) and `attention.wqkv` of InternLM2 (for each key-value head the queries of
its group, then its key, then its value). With these taken apart InternLM2 is a Llama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

MODEL_TYPE = "internvl_chat"

_BLOCK, _VIT = r"model\.vision_tower\.encoder\.layer\.(\d+)\.", r"vision_model.encoder.layers.\1."
_LAYER, _LM = r"model\.language_model\.layers\.(\d+)\.", r"language_model.model.layers.\1."
Rules = tuple[tuple[str, str], ...]

VISION: Rules = (
    (r"model\.multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"model\.multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"model\.vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"model\.vision_tower\.embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding"),
    (r"model\.vision_tower\.embeddings\.patch_embeddings\.projection\.", "vision_model.embeddings.patch_embedding."),
    (_BLOCK + r"attention\.[qkv]_proj\.", _VIT + "attn.qkv."),
    (_BLOCK + r"attention\.projection_layer\.", _VIT + "attn.proj."),
    (_BLOCK + r"attention\.([qk])_norm\.", _VIT + r"attn.\2_norm."),
    (_BLOCK + r"layernorm_before\.", _VIT + "norm1."),
    (_BLOCK + r"layernorm_after\.", _VIT + "norm2."),
    (_BLOCK + r"lambda_([12])$", _VIT + r"ls\2"),
    (_BLOCK + r"mlp\.", _VIT + "mlp."),
)
"""Start of a transformers name and what stands there in the original; the first that fits is used."""
QWEN2: Rules = ((r"lm_head\.", "language_model.lm_head."), (r"model\.language_model\.", "language_model.model."))
INTERNLM2: Rules = (
    (r"lm_head\.", "language_model.output."),
    (r"model\.language_model\.embed_tokens\.", "language_model.model.tok_embeddings."),
    (_LAYER + r"self_attn\.[qkv]_proj\.", _LM + "attention.wqkv."),
    (_LAYER + r"self_attn\.o_proj\.", _LM + "attention.wo."),
    (_LAYER + r"mlp\.gate_proj\.", _LM + "feed_forward.w1."),
    (_LAYER + r"mlp\.down_proj\.", _LM + "feed_forward.w2."),
    (_LAYER + r"mlp\.up_proj\.", _LM + "feed_forward.w3."),
    (_LAYER + r"input_layernorm\.", _LM + "attention_norm."),
    (_LAYER + r"post_attention_layernorm\.", _LM + "ffn_norm."),
    (r"model\.language_model\.norm\.", "language_model.model.norm."),
)


class OriginalError(ValueError):
    """A checkpoint that cannot be converted; one line that names the key or field."""


@dataclass(frozen=True)
class Layout:
    """Where every tensor of an original checkpoint goes.

    shapes: original name -> its shape. names: original name -> the transformers names whose tensors it holds, one or
    three. tied: (head, embeddings), original names, where the head is the embeddings. blocks: of the vision tower that
    are used. kv_heads, head_dim: of the language model.
    """

    shapes: dict[str, tuple[int, ...]]
    names: dict[str, list[str]]
    tied: tuple[str, str] | None
    blocks: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: InternVLConfig, rules: Rules) -> Layout:
        """The layout whose converted form is the model of this configuration."""
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
        found, names = model.state_dict(), {}
        for name in found:
            names.setdefault(original_name(name, rules), []).append(name)
        # q_proj, k_proj, v_proj in the order of the fused tensors, whatever the order in which a module declares them.
        names = {key: sorted(group, key=lambda n: "qkv".find(n.rsplit(".", 2)[-2][0])) for key, group in names.items()}
        shapes = {
            key: (sum(found[n].shape[0] for n in group), *found[group[0]].shape[1:]) for key, group in names.items()
        }
        tied = None
        if config.tie_word_embeddings:
            tied = tuple(
                original_name(n, rules) for n in ("lm_head.weight", "model.language_model.embed_tokens.weight")
            )
            del names[tied[0]], shapes[tied[0]]
        text = config.text_config
        head_dim = text.hidden_size // text.num_attention_heads
        return cls(shapes, names, tied, config.vision_config.num_hidden_layers, text.num_key_value_heads, head_dim)

    def parts(self, key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """An original tensor as transformers tensors by name, contiguous; copied only where it holds three."""
        names = self.names[key]
        if len(names) == 1:
            return {names[0]: tensor.contiguous()}
        if ".wqkv." in key:
            heads = tensor.unflatten(0, (self.kv_heads, -1, self.head_dim))
            parts = (heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1))
        else:
            parts = tensor.chunk(3)
        return {name: part.contiguous() for name, part in zip(names, parts, strict=True)}

    def unused(self, key: str) -> str | None:
        """Why a key that a checkpoint may hold is not converted; None if there is no such reason."""
        if key.endswith(".rotary_emb.inv_freq"):
            return "computed from rope_theta"
        block = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key)
        if block and int(block[1]) >= self.blocks:
            return "behind the layer that select_layer takes"
        if self.tied and key == self.tied[0]:
            return "equal to the embeddings"
        return None


def original_name(name: str, rules: Rules) -> str:
    """The original layout's name of a transformers name, e.g. "lm_head.weight"."""
    for pattern, replacement in (*VISION, *rules):
        renamed, count = re.subn("^" + pattern, replacement, name, count=1)
        if count:
            return renamed
    raise KeyError(f"{name} is no parameter of an InternVL model")


# configuration

_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_VISION = {
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
"""Key of vision_config and InternVLVisionConfig's name for it."""
_ONLY = {"ps_version": ("v1", "v2"), "template": (None, "internvl2_5"), "pad2square": (False, False)}
"""Field of config.json, its value where config.json is silent, and the only value that can be converted."""


def check_model_type(raw: Mapping[str, Any]) -> None:
    """OriginalError if a config.json is of another kind of model."""
    if raw.get("model_type") != MODEL_TYPE:
        raise OriginalError(
            f"config.json: model_type {raw.get('model_type')!r} is not {MODEL_TYPE!r}; give an InternVL2.5 or "
            "InternVL3 in the original layout (one of type 'internvl' needs no conversion)"
        )


def transformers_config(raw: Mapping[str, Any], ids: Mapping[str, int | None]) -> tuple[InternVLConfig, Rules]:
    """InternVLConfig of an original config.json, and the rules of its language model's names.

    ids: of the tokenizer: bos, eos, pad, image. Raises OriginalError.
    """
    check_model_type(raw)
    for field, (default, only) in _ONLY.items():
        if raw.get(field, default) != only:
            raise OriginalError(f"config.json: {field} {raw.get(field, default)!r} is not {only!r}; not supported")
    text, rules = _text_config(_section(raw, "llm_config"), ids)
    vision = _vision_config(_section(raw, "vision_config"), _value(raw, "select_layer", -1))
    size, patch = vision.image_size[0], vision.patch_size[0]
    if raw.get("force_image_size") not in (None, size):
        raise OriginalError(
            f"config.json: force_image_size {raw['force_image_size']} is not vision_config.image_size {size}; "
            "not supported"
        )
    ratio = float(_value(raw, "downsample_ratio", 0.5))
    side = size / patch * ratio
    if not side.is_integer() or not (1 / ratio).is_integer():
        raise OriginalError(f"config.json: downsample_ratio {ratio} does not divide {size / patch:g} patches of a side")
    config = InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image"],
        image_seq_length=int(side**2),
        downsample_ratio=ratio,
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["InternVLForConditionalGeneration"],
    )
    return config, rules


def _text_config(llm: Mapping[str, Any], ids: Mapping[str, int | None]) -> tuple[PreTrainedConfig, Rules]:
    architecture = (llm.get("architectures") or [None])[0]
    values = {
        **{key: _value(llm, key, where="llm_config.") for key in _TEXT},
        "hidden_act": llm.get("hidden_act", "silu"),
        "tie_word_embeddings": bool(llm.get("tie_word_embeddings", False)),
        "rope_parameters": _rope(llm),
        **{f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")},
    }
    if architecture == "InternLM2ForCausalLM":
        return LlamaConfig(**values, attention_bias=bool(_value(llm, "bias", where="llm_config."))), INTERNLM2
    if architecture == "Qwen2ForCausalLM":
        window = {key: llm[key] for key in ("use_sliding_window", "sliding_window", "max_window_layers") if key in llm}
        return Qwen2Config(**values, **window), QWEN2
    raise OriginalError(
        f"config.json: llm_config.architectures {architecture!r} is not InternLM2ForCausalLM or Qwen2ForCausalLM; "
        "not supported"
    )


def _rope(llm: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters of transformers: theta, and linear or dynamic scaling, which are the same there."""
    parameters = {"rope_type": "default", "rope_theta": float(_value(llm, "rope_theta", where="llm_config."))}
    scaling = llm.get("rope_scaling")
    if scaling is None:
        return parameters
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ("linear", "dynamic") or "factor" not in scaling:
        raise OriginalError(
            f"config.json: llm_config.rope_scaling {dict(scaling)} is not a linear or dynamic one with a factor; "
            "not supported"
        )
    return {**parameters, "rope_type": kind, "factor": float(scaling["factor"])}


def _vision_config(vision: Mapping[str, Any], select_layer: int) -> InternVLVisionConfig:
    """The tower up to the layer that `select_layer` takes: engines other than transformers read its last layer."""
    layers = _value(vision, "num_hidden_layers", where="vision_config.")
    used = select_layer if select_layer >= 0 else layers + 1 + select_layer
    if not 1 <= used <= layers:
        raise OriginalError(f"config.json: select_layer {select_layer} is none of the {layers} layers of the tower")
    values = {name: _value(vision, key, where="vision_config.") for key, name in _VISION.items()}
    if values["norm_type"] not in ("layer_norm", "rms_norm"):
        raise OriginalError(
            f"config.json: vision_config.norm_type {values['norm_type']!r} is not 'layer_norm' or 'rms_norm'"
        )
    if values["use_qk_norm"] and values["layer_norm_eps"] != 1e-6:
        raise OriginalError(
            f"config.json: vision_config.layer_norm_eps {values['layer_norm_eps']} with qk_normalization; "
            "transformers normalises queries and keys with 1e-06 only"
        )
    return InternVLVisionConfig(**values, num_hidden_layers=used, num_channels=vision.get("num_channels", 3))


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name)
    if not isinstance(section, Mapping):
        raise OriginalError(f"config.json: {name} is {section!r}; it should describe a model")
    return section


def _value(section: Mapping[str, Any], key: str, default: Any = None, where: str = "") -> Any:
    value = section.get(key, default)
    if value is None:
        raise OriginalError(f"config.json: no {where}{key}; complete it")
    return value
