"""Policies of every size that the benchmarks know, and rows for them of which every second one says No.

tiny   the shipped checkpoint of the tiny world: 4 x 192, 48 px, 36 image tokens of 512 codes
small  12 x 768, 110 M parameters of language model; 384 px, 576 image tokens of 16384 codes
1b, 7b Janus-Pro as published, of configs/models/*.json

All but tiny are random, made on the device, with the tiny world's tokenizer: the same work, other words.
"""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from rlpipe.data.prompts import load_prompts
from rlpipe.paths import ROOT, resolve_path
from rlpipe.policy.checkpoint import read_configs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.policy.original import transformers_config
from rlpipe.policy.templates import Templates
from rlpipe.rollout.sampling import uniforms
from rlpipe.types import Prompt, Sampling

TINY = resolve_path("rlpipe/world/assets/policy")
PROMPTS = resolve_path("rlpipe/world/assets/prompts_test.jsonl")
SIZES = ("tiny", "small", "1b", "7b")
REFLECTION_TOKENS = {"tiny": 24, "small": 80, "1b": 80, "7b": 80}
"""Most tokens of a reflection: of the tiny world, and of the official code. Random weights use them all."""


def build(size: str, dtype: torch.dtype, device: str) -> JanusPolicy:
    """A policy whose every verdict is a fair coin of its row's seed, alike in every engine; see `level_verdicts`."""
    torch.manual_seed(0)
    if size == "tiny":
        policy = JanusPolicy.load(TINY, dtype, device)
    else:
        tokenizer, _, _ = read_configs(TINY)
        templates = Templates(tokenizer)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                janus = JanusForConditionalGeneration(_config(size, templates))
        finally:
            torch.set_default_dtype(before)
        janus.set_attn_implementation("sdpa")
        policy = JanusPolicy(janus.eval(), templates)
    level_verdicts(policy)
    return policy.requires_grad_(False)


def _config(size: str, templates: Templates) -> JanusConfig:
    tokenizer = templates.tokenizer
    ids = {"bos": templates.bos, "eos": templates.eos, "pad": templates.pad, "image": tokenizer.vocab_size - 1}
    if size == "small":
        return _small(ids)
    file = ROOT / "configs" / "models" / f"janus_pro_{size}.json"
    return transformers_config(json.loads(file.read_text("utf-8")), ids)


def _small(ids: dict[str, int]) -> JanusConfig:
    """Janus-Pro narrowed: a language model of LlamaGen-B's shape, a tower and a VQ tokenizer to match."""
    width = 768
    return JanusConfig(
        text_config=LlamaConfig(
            hidden_size=width,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            intermediate_size=2048,
            vocab_size=16384,
            max_position_embeddings=4096,
            bos_token_id=ids["bos"],
            eos_token_id=ids["eos"],
            pad_token_id=ids["pad"],
            tie_word_embeddings=False,
        ).to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=384,
            patch_size=16,
            num_image_tokens=576,
            projection_dim=width,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=16384,
            base_channels=32,
            latent_channels=64,
            num_patches=24,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=ids["image"],
        tie_word_embeddings=False,
    )


@torch.no_grad()
def level_verdicts(policy: JanusPolicy) -> None:
    """Give Yes and No the same row of the text head: P(yes) is one half of every image."""
    head = policy.janus.lm_head.weight
    head[policy.templates.no] = head[policy.templates.yes]


def generation_config(policy: JanusPolicy, guidance: float) -> GenerationConfig:
    """What transformers' own image generation needs to be told: ids, guidance, sampling without truncation."""
    templates = policy.templates
    return GenerationConfig(
        bos_token_id=templates.bos,
        eos_token_id=templates.eos,
        pad_token_id=templates.pad,
        do_sample=True,
        top_k=0,
        guidance_scale=guidance,
        generation_kwargs={"boi_token_id": templates.boi},
    )


def rows(count: int, group: int, sampling: Sampling) -> tuple[list[Prompt], list[Sampling], list[str]]:
    """`count` rows in groups of one prompt each. Rows 0, 2, 4, ... will say No and the others Yes."""
    prompts = load_prompts(str(PROMPTS))
    chosen = [prompts[(row // group) % len(prompts)] for row in range(count)]
    samplings, seed = [], 0
    for row in range(count):
        while not _says(seed, yes=bool(row % 2)):
            seed += 1
        samplings.append(replace(sampling, seed=seed))
        seed += 1
    return chosen, samplings, [f"row{row}" for row in range(count)]


def _says(seed: int, yes: bool) -> bool:
    """Whether the coin of the first reflection falls so, well clear of its edge."""
    chance = uniforms(seed, 1, 1)[0]
    return chance < 0.4 if yes else chance > 0.6
