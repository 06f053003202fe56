"""Small random InternVL checkpoints in the original layout, their tokenizers, and a plain model of their arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers.convert_slow_tokenizer import import_protobuf

WORDS = ["yes", "Yes", "YES", "no", "No", "NO", "user", "assistant", "system", "\u2581red", "\u2581circle", "\u2581the"]
CHAT = ["<|im_start|>", "<|im_end|>"]
IMAGE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]


def config(language: str, **changes: Any) -> dict[str, Any]:
    """A config.json: "internlm2" with the 26B's tower (RMSNorm, normalised queries), "qwen2" with the other one."""
    small = language == "qwen2"
    llm = {
        "architectures": ["Qwen2ForCausalLM" if small else "InternLM2ForCausalLM"],
        "model_type": language,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "hidden_act": "silu",
        "bias": False,
        "tie_word_embeddings": False,
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    }
    vision = {
        "model_type": "intern_vit_6b",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 28,
        "patch_size": 7,
        "hidden_act": "gelu",
        "norm_type": "layer_norm" if small else "rms_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": small,
        "qk_normalization": not small,
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            {"llm": llm, "vision": vision}[section][field] = value
    top = {key: value for key, value in changes.items() if "__" not in key}
    return {
        "model_type": "internvl_chat",
        "auto_map": {"AutoConfig": "configuration.Config"},
        "torch_dtype": "float32",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 28,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "use_thumbnail": True,
        "llm_config": llm,
        "vision_config": vision,
        **top,
    }


def build(folder: Path, language: str, shards: int = 1, kind: str = "safetensors", **changes: Any) -> dict[str, Tensor]:
    """Write a checkpoint; its weights by name. Changes of config.json: field=, llm__field=, vision__field=."""
    folder.mkdir()
    size = spm_tokenizer(folder) if language == "internlm2" else byte_tokenizer(folder)
    raw = config(language, **{"llm__vocab_size": size, **changes})
    (folder / "config.json").write_text(json.dumps(raw))
    weights = random_weights(raw)
    names = list(weights)
    files = [f"model-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)]
    for i, file in enumerate(files):
        part = {name: weights[name] for name in names[i::shards]}
        if kind == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / f"pytorch_{file}")
    return weights


def random_weights(raw: dict[str, Any]) -> dict[str, Tensor]:
    llm, vit = raw["llm_config"], raw["vision_config"]
    width, inner, tower = llm["hidden_size"], llm["intermediate_size"], vit["hidden_size"]
    patches = (vit["image_size"] // vit["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (1, 1, tower),
        "vision_model.embeddings.position_embedding": (1, patches + 1, tower),
        "vision_model.embeddings.patch_embedding.weight": (tower, 3, vit["patch_size"], vit["patch_size"]),
        "vision_model.embeddings.patch_embedding.bias": (tower,),
    }
    for i in range(vit["num_hidden_layers"]):
        block = f"vision_model.encoder.layers.{i}."
        shapes |= {block + "attn.qkv.weight": (3 * tower, tower)}
        shapes |= {block + "attn.qkv.bias": (3 * tower,)} if vit["qkv_bias"] else {}
        shapes |= {block + f"attn.{n}_norm.weight": (tower,) for n in "qk" if vit["qk_normalization"]}
        shapes |= _linear(block + "attn.proj", tower, tower)
        shapes |= _linear(block + "mlp.fc1", vit["intermediate_size"], tower)
        shapes |= _linear(block + "mlp.fc2", tower, vit["intermediate_size"])
        shapes |= {block + name: (tower,) for name in ("norm1.weight", "norm2.weight", "ls1", "ls2")}
        if vit["norm_type"] == "layer_norm":
            shapes |= {block + name: (tower,) for name in ("norm1.bias", "norm2.bias")}
    shapes |= {"mlp1.0.weight": (4 * tower,), "mlp1.0.bias": (4 * tower,)}
    shapes |= _linear("mlp1.1", width, 4 * tower) | _linear("mlp1.3", width, width)
    model, kv = "language_model.model.", width // llm["num_attention_heads"] * llm["num_key_value_heads"]
    internlm = llm["model_type"] == "internlm2"
    shapes[model + ("tok_embeddings" if internlm else "embed_tokens") + ".weight"] = (llm["vocab_size"], width)
    for i in range(llm["num_hidden_layers"]):
        layer = f"{model}layers.{i}."
        if internlm:
            shapes |= {
                layer + "attention.wqkv.weight": (width + 2 * kv, width),
                layer + "attention.wo.weight": (width, width),
            }
            shapes |= {layer + f"feed_forward.w{n}.weight": (inner, width) for n in (1, 3)}
            shapes |= {layer + "feed_forward.w2.weight": (width, inner)}
            shapes |= {layer + f"{name}.weight": (width,) for name in ("attention_norm", "ffn_norm")}
            if llm["bias"]:
                shapes |= {layer + "attention.wqkv.bias": (width + 2 * kv,), layer + "attention.wo.bias": (width,)}
        else:
            for name, rows in (("q", width), ("k", kv), ("v", kv)):
                shapes |= _linear(layer + f"self_attn.{name}_proj", rows, width)
            shapes |= {
                layer + "self_attn.o_proj.weight": (width, width),
                layer + "mlp.down_proj.weight": (width, inner),
            }
            shapes |= {layer + f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            shapes |= {layer + f"{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes[model + "norm.weight"] = (width,)
    if not llm["tie_word_embeddings"]:
        shapes["language_model." + ("output" if internlm else "lm_head") + ".weight"] = (llm["vocab_size"], width)
    generator = torch.Generator().manual_seed(0)
    draw = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # Norms and layer scales around one, the rest by fan-in: every tensor then matters to the logits.
    return {
        name: 1 + 0.3 * w if w.dim() == 1 and not name.endswith("bias") else w * 0.7 * max(1, w[0].numel()) ** -0.5
        for name, w in draw.items()
    }


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


# tokenizers


def spm_tokenizer(folder: Path, prefix: bool = False) -> int:
    """An InternLM2 tokenizer: a SentencePiece model whose two last, spare pieces the chat tokens replace."""
    proto = import_protobuf().ModelProto()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    parts = {c: None for word in WORDS for c in word} | {c: None for c in "abcdefghijklmnopqrstuvwxyz\n.,?\u2581"}
    parts |= {word[:i]: None for i in range(2, 10) for word in WORDS if i <= len(word)}
    pieces += [(part, 1) for part in parts] + [(f"[UNUSED_TOKEN_{i}]", 4) for i in range(3)]
    for index, (text, kind) in enumerate(pieces):
        proto.pieces.add(piece=text, type=kind, score=-float(index) if kind == 1 else 0.0)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = proto.trainer_spec.BPE, True
    proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces = prefix, False
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    special = ["<unk>", "<s>", "</s>"]
    ids = dict(enumerate(special)) | dict(enumerate([*CHAT, *IMAGE], len(pieces) - 2))
    _write_tokenizer_config(folder, ids, "InternLM2Tokenizer", add_bos_token=True)
    return max(ids) + 1


def byte_tokenizer(folder: Path) -> int:
    """A Qwen2 tokenizer: bytes as printable characters, merges, added tokens behind them."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = list(bytes_to_unicode().values())
    merges = []
    for word in (w.replace("\u2581", "\u0120") for w in WORDS):
        for i in range(1, len(word)):
            if word[: i + 1] not in vocabulary:
                vocabulary.append(word[: i + 1])
                merges.append(f"{word[:i]} {word[i]}")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    ids = dict(enumerate(["<|endoftext|>", *CHAT, *IMAGE], len(vocabulary)))
    (folder / "added_tokens.json").write_text(json.dumps({token: i for i, token in ids.items()}))
    _write_tokenizer_config(folder, ids, "Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return max(ids) + 1


def _write_tokenizer_config(folder: Path, ids: dict[int, str], name: str, **settings: Any) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokens = {str(i): {"content": token, **flags} for i, token in ids.items()}
    content = {"added_tokens_decoder": tokens, "tokenizer_class": name, **settings}
    if name.startswith("InternLM2"):
        content["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


# the model


class Plain:
    """What the original code computes, written from the description of its layers: weights by their original names."""

    def __init__(self, raw: dict[str, Any], weights: dict[str, Tensor], image_id: int) -> None:
        self.raw, self.weights, self.image_id = raw, weights, image_id

    def logits(self, ids: Tensor, pixels: Tensor) -> Tensor:
        """[T, V] of one row of ids [T] whose image tokens are those of the tiles [N, 3, H, W]."""
        llm, w = self.raw["llm_config"], self.weights
        internlm = llm["model_type"] == "internlm2"
        model, embed = "language_model.model.", "tok_embeddings" if internlm else "embed_tokens"
        embeddings = w[f"{model}{embed}.weight"]
        x = embeddings[ids].clone()
        x[ids == self.image_id] = self.image(pixels).flatten(0, 1)
        for i in range(llm["num_hidden_layers"]):
            x = (self._internlm2 if internlm else self._qwen2)(f"{model}layers.{i}.", x)
        head = (
            embeddings
            if llm["tie_word_embeddings"]
            else w[f"language_model.{'output' if internlm else 'lm_head'}.weight"]
        )
        return self._rms(x, model + "norm.weight", llm["rms_norm_eps"]) @ head.T

    def image(self, pixels: Tensor) -> Tensor:
        """[N, tokens, width] of tiles [N, 3, H, W]."""
        vit, w = self.raw["vision_config"], self.weights
        heads, eps = vit["num_attention_heads"], vit["layer_norm_eps"]
        stem = "vision_model.embeddings."
        patch = self._affine(stem + "patch_embedding")
        x = functional.conv2d(pixels, *patch, stride=vit["patch_size"]).flatten(2).transpose(1, 2)
        x = torch.cat([w[stem + "class_embedding"].expand(len(x), 1, -1), x], 1) + w[stem + "position_embedding"]
        used = self.raw["select_layer"] % (vit["num_hidden_layers"] + 1)
        for i in range(used):
            block = f"vision_model.encoder.layers.{i}."
            h = self._norm(x, block + "norm1", eps)
            qkv = functional.linear(h, w[block + "attn.qkv.weight"], w.get(block + "attn.qkv.bias"))
            q, k, v = qkv.chunk(3, -1)
            if vit["qk_normalization"]:
                q, k = (self._rms(t, f"{block}attn.{n}_norm.weight", eps) for t, n in ((q, "q"), (k, "k")))
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            a = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
            x = x + w[block + "ls1"] * functional.linear(
                a.transpose(1, 2).flatten(2), *self._affine(block + "attn.proj")
            )
            h = functional.linear(self._norm(x, block + "norm2", eps), *self._affine(block + "mlp.fc1"))
            x = x + w[block + "ls2"] * functional.linear(functional.gelu(h), *self._affine(block + "mlp.fc2"))
        side = int((x.shape[1] - 1) ** 0.5)
        squares = x[:, 1:].unflatten(1, (side // 2, 2, side // 2, 2)).permute(0, 1, 3, 2, 4, 5)
        x = squares.reshape(len(x), (side // 2) ** 2, -1)
        x = functional.layer_norm(x, x.shape[-1:], *self._affine("mlp1.0"))
        x = functional.gelu(functional.linear(x, *self._affine("mlp1.1")))
        return functional.linear(x, *self._affine("mlp1.3"))

    def _internlm2(self, layer: str, x: Tensor) -> Tensor:
        llm, w = self.raw["llm_config"], self.weights
        kv, eps = llm["num_key_value_heads"], llm["rms_norm_eps"]
        group = llm["num_attention_heads"] // kv
        h = self._rms(x, layer + "attention_norm.weight", eps)
        fused = functional.linear(h, w[layer + "attention.wqkv.weight"], w.get(layer + "attention.wqkv.bias"))
        fused = fused.unflatten(-1, (kv, group + 2, -1))
        a = self._attend(fused[:, :, :group].flatten(1, 2), fused[:, :, group], fused[:, :, group + 1])
        x = x + functional.linear(a, w[layer + "attention.wo.weight"], w.get(layer + "attention.wo.bias"))
        h = self._rms(x, layer + "ffn_norm.weight", eps)
        gate, up, down = (w[f"{layer}feed_forward.w{n}.weight"] for n in (1, 3, 2))
        return x + (functional.silu(h @ gate.T) * (h @ up.T)) @ down.T

    def _qwen2(self, layer: str, x: Tensor) -> Tensor:
        llm, w = self.raw["llm_config"], self.weights
        eps, heads = llm["rms_norm_eps"], (llm["num_attention_heads"], *[llm["num_key_value_heads"]] * 2)
        h = self._rms(x, layer + "input_layernorm.weight", eps)
        qkv = (functional.linear(h, *self._affine(f"{layer}self_attn.{n}_proj")) for n in "qkv")
        a = self._attend(*(t.unflatten(-1, (n, -1)) for t, n in zip(qkv, heads, strict=True)))
        x = x + a @ w[layer + "self_attn.o_proj.weight"].T
        h = self._rms(x, layer + "post_attention_layernorm.weight", eps)
        gate, up, down = (w[f"{layer}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return x + (functional.silu(h @ gate.T) * (h @ up.T)) @ down.T

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of queries [T, heads, d] to keys and values [T, kv heads, d]: [T, heads * d]."""
        llm, length, dim = self.raw["llm_config"], len(q), q.shape[-1]
        base, most, scaling = llm["rope_theta"], llm["max_position_embeddings"], llm["rope_scaling"]
        step = 1.0
        if scaling and scaling["type"] == "dynamic" and length > most:
            factor = scaling["factor"]
            base *= (factor * length / most - (factor - 1)) ** (dim / (dim - 2))
        if scaling and scaling["type"] == "linear":
            step = 1 / scaling["factor"]
        angle = torch.outer(torch.arange(length) * step, base ** (-torch.arange(0, dim, 2) / dim))[:, None]
        turn = torch.complex(angle.cos(), angle.sin())

        def rotate(t: Tensor) -> Tensor:
            whole = torch.complex(*(half.contiguous() for half in t.chunk(2, -1))) * turn
            return torch.cat([whole.real, whole.imag], -1)

        group = q.shape[1] // k.shape[1]
        q, k, v = rotate(q), rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        weight = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
        hidden = torch.ones(length, length).triu(1).bool()
        return torch.einsum("hqk,khd->qhd", weight.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)

    def _affine(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[name + ".weight"], self.weights[name + ".bias"]

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        if self.raw["vision_config"]["norm_type"] == "rms_norm":
            return self._rms(x, name + ".weight", eps)
        return functional.layer_norm(x, x.shape[-1:], *self._affine(name), eps)

    def _rms(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * self.weights[name]


def spm_pieces(model: bytes, text: str) -> list[int]:
    """Ids of a text by SentencePiece's rule: join the two neighbours of highest joint score until none have one."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model)
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    parts = list(("\u2581" if proto.normalizer_spec.add_dummy_prefix else "") + text.replace(" ", "\u2581"))
    while pairs := [
        (scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores
    ]:
        i = -max(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[ids[part]] if part in scores else [ids[f"<0x{b:02X}>"] for b in part.encode()] for part in parts]
    return [i for part in known for i in part]
