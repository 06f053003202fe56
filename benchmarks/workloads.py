"""What runs beside the rollouts on a GPU: one step of the learner, and a judge of 8B that answers yes or no."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from engines import Engines
from learning import RandomLearner
from sizes import REFLECTION_TOKENS, rows
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from rlpipe.learn.layout import lay_out
from rlpipe.policy.janus import JanusPolicy
from rlpipe.reward.internvl import JudgeFormat, answer_logits
from rlpipe.schema import Config
from rlpipe.types import Rollout, Sampling, SegmentCredit, TrainItem
from rlpipe.world.models import build_judge, build_judge_tokenizer

QUESTION = "Does this image match the description? Please directly respond with yes or no."


def learner_step(size: str, count: int, device: str, peak: float) -> dict:
    """Steps over `count` trajectories that were drawn by the same policy, guided: both rows of a pair have gradients.

    tokens: of the rows that the language model sees, without padding. mfu: 6 operations per parameter and token, and
    12 x layers x width per token and half its row for attention, over `peak` operations per second. Recomputed
    activations do not count.
    """
    config = Config()
    config.policy.dtype = "bfloat16" if device == "cuda" else "float32"
    config.loss.max_mismatch = float("inf")
    config.learner.activation_checkpointing = "full" if device == "cuda" else "none"
    config.learner.micro_batch = 4
    learner = RandomLearner(config, size, device)
    items = [_item(rollout) for rollout in _drawn(learner.policy, size, count)]
    replay = lay_out(items, learner.policy.templates, learner.options)
    lengths = np.array(replay.lengths)
    text = learner.policy.janus.config.text_config
    weights = sum(p.numel() for p in learner.policy.part("language_model").layers.parameters())
    attention = 12 * text.num_hidden_layers * text.hidden_size * lengths / 2
    operations = float((lengths * (6 * weights + attention)).sum())
    step = iter(range(100))
    seconds, memory = _seconds(lambda: learner.step(items, len(items), next(step), 100, fresh=False), device)
    tokens = int(lengths.sum())
    return {
        "size": size,
        "trajectories_per_second": count / seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "mfu": operations / seconds / peak,
        "seconds": seconds,
        "memory_bytes": memory,
    }


def _drawn(policy: JanusPolicy, size: str, count: int) -> list[Rollout]:
    sampling = Sampling(guidance=5.0, max_reflection_tokens=REFLECTION_TOKENS[size])
    return Engines(policy).run("native", rows(count, 7, sampling))


def _item(rollout: Rollout) -> TrainItem:
    segments = rollout.trajectory.segments
    looked_at = rollout.images[: sum(segment.kind == "text" for segment in segments)]
    return TrainItem(rollout.trajectory, looked_at, (SegmentCredit(advantage=1.0),) * len(segments))


@torch.inference_mode()
def judge_step(size: str, count: int, device: str, peak: float) -> dict:
    """`count` images of one tile in one batch. mfu: 2 operations per token and parameter, tower and words."""
    if size == "tiny":
        model, tokenizer = build_judge()
        model = model.to(device)
    else:
        tokenizer = build_judge_tokenizer()
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = InternVLForConditionalGeneration(_judge_8b(tokenizer)).eval()
            finally:
                torch.set_default_dtype(torch.float32)
        model.set_attn_implementation("sdpa")
    form = JudgeFormat(tokenizer, model.config)
    ids, mask = (tensor.to(device) for tensor in form.encode([QUESTION] * count))
    images = torch.randint(0, 256, (count, *form.image_size, 3), dtype=torch.uint8, device=device)
    pixels = form.pixels(images).to(model.dtype)
    seconds, memory = _seconds(lambda: form.p_yes(answer_logits(model, ids, mask, pixels)), device)
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    words = sum(p.numel() for p in model.model.language_model.layers.parameters())
    patches = (form.image_size[0] // model.config.vision_config.patch_size[0]) ** 2
    operations = 2 * count * (tower * patches + words * ids.shape[1])
    return {
        "size": size,
        "batch": count,
        "images_per_second": count / seconds,
        "mfu": operations / seconds / peak,
        "seconds": seconds,
        "memory_bytes": memory,
    }


def _judge_8b(tokenizer) -> InternVLConfig:
    """InternVL3-8B: InternViT-300M in front of Qwen2.5-7B, one 448 px tile is 256 tokens."""
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=448
        ),
        text_config=Qwen2Config(
            hidden_size=3584,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            intermediate_size=18944,
            vocab_size=151674,
            tie_word_embeddings=False,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=256,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _seconds(function: Callable[[], object], device: str, repeats: int = 3) -> tuple[float, int | None]:
    """The median of `repeats` calls behind a warm-up, and the GPU's highest memory meanwhile."""
    cuda, times = device == "cuda", []
    for number in range(repeats + 1):
        if number == 1 and cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[repeats // 2], torch.cuda.max_memory_allocated() if cuda else None
