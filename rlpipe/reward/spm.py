"""The tokenizer of an original InternVL as one tokenizer.json, without the code that such a checkpoint brings along.

InternLM2's is a SentencePiece BPE model (`tokenizer.model`), Qwen2's is byte-level BPE (`vocab.json`, `merges.txt`) and
needs no translation. Both have their chat and image tokens in `tokenizer_config.json` or `added_tokens.json`, at ids
that the weights were trained with: InternLM2's replace spare pieces of the model, or follow its last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from rlpipe.reward.original import OriginalError

IMAGE = "<IMG_CONTEXT>"
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE,
    # InternVLProcessor wants a token for videos as well. This one every InternVL has, and a judge never uses it.
    "video_token": "</quad>",
}
"""Tokens that transformers' InternVLProcessor asks its tokenizer for."""
CHAT = ("<|im_start|>", "<|im_end|>", *NAMED.values())
_SPACE = "\u2581"
_NORMAL, _USER_DEFINED = 1, 4
"""Types of pieces in a SentencePiece model."""


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder, with every added token at its id. Raises OriginalError."""
    settings = _json(folder / "tokenizer_config.json")
    added = _added(folder, settings)
    if (folder / "tokenizer.model").is_file():
        roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
        roles |= {role: _content(settings[role]) for role in roles if settings.get(role)}
        inner = from_sentencepiece((folder / "tokenizer.model").read_bytes(), added)
        begins = settings.get("add_bos_token", True)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        qwen2 = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
        roles = {role: getattr(qwen2, role) for role in ("unk_token", "eos_token", "pad_token")}
        inner, begins = qwen2.backend_tokenizer, False
    else:
        raise OriginalError(f"{folder}: no tokenizer.model and no vocab.json with merges.txt; complete the download")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, add_bos_token=begins, extra_special_tokens=NAMED, **roles
    )
    vocabulary = tokenizer.get_vocab()
    for index, token in added.items():
        if vocabulary.get(token.content) != index:
            raise OriginalError(
                f"{folder}: added token {token.content!r} is at {vocabulary.get(token.content)}, not {index}"
            )
    missing = [token for token in CHAT if token not in {t.content for t in added.values()}]
    if missing:
        raise OriginalError(f"{folder}: tokenizer_config.json has no token {', '.join(missing)}; is this an InternVL?")
    return tokenizer


def from_sentencepiece(model: bytes, added: dict[int, AddedToken]) -> Tokenizer:
    """A tokenizer that splits texts as a SentencePiece BPE model does, with added tokens at their ids."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE or proto.trainer_spec.treat_whitespace_as_suffix:
        raise OriginalError(
            "tokenizer.model: it is no SentencePiece BPE model that marks spaces in front; not supported"
        )
    prefix = proto.normalizer_spec.add_dummy_prefix
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces) if index not in added}
    merges = _merges({p.piece: p.score for i, p in enumerate(proto.pieces) if p.type == _NORMAL and i not in added})
    clash = [token.content for index, token in added.items() if vocabulary.get(token.content, index) != index]
    if clash:
        raise OriginalError(f"tokenizer.model: {', '.join(clash)} is a piece of another id than the added token's")
    vocabulary |= {token.content: index for index, token in added.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    words = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*words, decoders.Strip(" ", 1, 0)] if prefix else words)
    whole = [p.piece for i, p in enumerate(proto.pieces) if p.type == _USER_DEFINED and i not in added]
    # SentencePiece looks for them in the normalised text; here that would put the prefix into them, too.
    tokenizer.add_tokens([AddedToken(piece, normalized=not prefix) for piece in whole])
    tokenizer.add_special_tokens([added[index] for index in sorted(added)])
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the piece of the highest score first: the order of SentencePiece."""
    pairs = [(score, piece[:i], piece[i:]) for piece, score in scores.items() for i in range(1, len(piece))]
    known = [pair for pair in pairs if pair[1] in scores and pair[2] in scores]
    return [(left, right) for _, left, right in sorted(known, key=lambda pair: -pair[0])]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """What SentencePiece does to a text before it splits it."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _added(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, of both files that may hold them."""
    tokens = {}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {
            key: token[key] for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in token
        }
        tokens[int(index)] = AddedToken(token["content"], **{"normalized": False, "special": True, **flags})
    for content, index in _json(folder / "added_tokens.json").items():
        known = tokens.setdefault(index, AddedToken(content, normalized=False, special=True))
        if known.content != content:
            raise OriginalError(
                f"{folder}: token {index} is {content!r} in added_tokens.json, elsewhere {known.content!r}"
            )
    return tokens


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}
