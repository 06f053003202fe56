"""Small models of the real classes for the tiny world, random until `launch/build_tiny.py` has trained them.

The policy is transformers' Janus, the judge transformers' InternVL; only the configurations are small.
"""

from __future__ import annotations

import math

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.templates import ASSISTANT, BOI, BOS, EOI, EOS, IMAGE, LOOK, PAD, REDRAW, USER, Templates
from rlpipe.world.scenes import IMAGE_SIZE
from rlpipe.world.vocabulary import WORDS

VQ_BLOCK = 8
"""Pixels per side that one VQ code stands for."""
CODE_BITS = 9
JUDGE_QUESTION = 'Does this image match the description "{prompt}"? Please directly respond with yes or no.'

_WORD = Regex(r"\w+|[^\w\s]+")
_UNKNOWN = "<unk>"


def _tokenizer(special: list[str], texts: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's words and those of `texts`, split at spaces and punctuation."""
    split = pre_tokenizers.Split(_WORD, behavior="removed", invert=True)
    words = list(dict.fromkeys([*WORDS, *(w for text in texts for w, _ in split.pre_tokenize_str(text))]))
    vocabulary = {token: i for i, token in enumerate([*special, _UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_UNKNOWN, **roles)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The policy's tokenizer: Janus's special tokens, the templates' words and the world's."""
    return _tokenizer(
        [PAD, BOS, EOS, BOI, EOI, IMAGE, USER, ASSISTANT],
        [":", "Yes No", LOOK, REDRAW],
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
    )


def build_judge_tokenizer() -> PreTrainedTokenizerFast:
    """The judge's tokenizer: InternVL's chat tokens, the question's words and the world's."""
    return _tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"],
        ["user assistant system yes no", JUDGE_QUESTION.replace("{prompt}", " ").replace('"', ' " '), '"?'],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def build_policy(
    seed: int = 0,
    hidden: int = 192,
    layers: int = 4,
    heads: int = 3,
    intermediate: int = 512,
    vision_hidden: int = 128,
    vision_layers: int = 3,
    vq_channels: int = 96,
    vq_latent: int = 64,
) -> JanusPolicy:
    """A randomly initialised Janus for 48 x 48 images: 36 image tokens from 512 codes of 9 bits."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pixels = 3 * VQ_BLOCK**2
    side = IMAGE_SIZE // VQ_BLOCK
    config = JanusConfig(
        text_config=LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=intermediate,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        ).to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=VQ_BLOCK,
            num_image_tokens=side**2,
            projection_dim=hidden,
            mlp_ratio=3.0,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=CODE_BITS,
            num_embeddings=2**CODE_BITS,
            latent_channels=vq_latent,
            base_channels=vq_channels,
            channel_multiplier=[1],
            num_res_blocks=1,
            num_patches=side,
            in_channels=pixels,
            out_channels=pixels,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    janus = JanusForConditionalGeneration(config)
    janus.set_attn_implementation("eager")
    _initialise(janus, layers)
    return JanusPolicy(janus.eval(), Templates(tokenizer))


@torch.no_grad()
def _initialise(janus: JanusForConditionalGeneration, layers: int) -> None:
    """Initialise by fan-in: the usual std of 0.02 is far too small for narrow layers (ten times more steps)."""
    vq = janus.model.vqmodel
    bits = (torch.arange(2**CODE_BITS)[:, None] >> torch.arange(CODE_BITS)) & 1
    vq.quantize.embedding.weight.copy_((bits * 2.0 - 1.0) / math.sqrt(CODE_BITS))
    for module in vq.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    for name, weight in janus.named_parameters():
        if "vqmodel" in name or weight.dim() < 2:
            continue
        if "generation_embeddings" in name:
            weight.copy_(vq.quantize.embedding.weight * math.sqrt(CODE_BITS))
        elif "embed_tokens" in name:
            nn.init.normal_(weight, std=0.5)
        else:
            _fan_in(name, weight, layers)
            if "vision_head" in name or "lm_head" in name:
                weight.mul_(0.5)


def _fan_in(name: str, weight: torch.Tensor, layers: int) -> None:
    if "position_embedding" in name:
        nn.init.normal_(weight, std=0.3)
        return
    residual = any(part in name for part in ("o_proj", "down_proj"))
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5 * ((2 * layers) ** -0.5 if residual else 1.0))


def build_judge(
    seed: int = 0, hidden: int = 128, layers: int = 4, intermediate: int = 320, vision_layers: int = 3
) -> tuple[InternVLForConditionalGeneration, PreTrainedTokenizerFast]:
    """A randomly initialised InternVL for 48 x 48 images (36 image tokens) with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_judge_tokenizer()
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=128,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            intermediate_size=384,
            image_size=IMAGE_SIZE,
            patch_size=VQ_BLOCK,
        ),
        text_config=Qwen2Config(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            intermediate_size=intermediate,
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            tie_word_embeddings=False,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(IMAGE_SIZE // VQ_BLOCK) ** 2,
        downsample_ratio=1.0,
        tie_word_embeddings=False,
    )
    judge = InternVLForConditionalGeneration(config)
    judge.set_attn_implementation("eager")
    with torch.no_grad():
        for name, weight in judge.named_parameters():
            if "embed_tokens" in name:
                nn.init.normal_(weight, std=0.5)
            elif weight.dim() >= 2 and "cls_token" not in name:
                _fan_in(name, weight, layers)
            elif "lambda_" in name:
                weight.fill_(1.0)
            if "lm_head" in name:
                weight.mul_(0.5)
    return judge.eval(), tokenizer
