"""Stage 1: the VQ tokenizer. 36 codes of 9 sign bits for a 48 x 48 image, learned without a codebook.

The codebook is fixed: all 512 corners of the 9-cube, as unit vectors. The encoder learns to point at a corner
(straight-through signs), so that no code can die, and nearest-by-cosine is nearest corner.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F

from rlpipe.policy.janus import JanusPolicy
from rlpipe.world.build.progress import Meter, optimise, require
from rlpipe.world.checker import check
from rlpipe.world.prompts import sample_spec
from rlpipe.world.render import render
from rlpipe.world.scenes import BACKGROUND, near_miss, sample_scene

NUM_IMAGES = 24_000
FOREGROUND_WEIGHT = 4.0
COMMITMENT = 0.05
ENTROPY = 0.02


def random_images(seed: int, count: int) -> np.ndarray:
    """uint8 [count, 48, 48, 3]: scenes of all prompts, three in ten a near miss."""
    rng = random.Random(seed)
    images = []
    for _ in range(count):
        spec = sample_spec(rng, "all")
        images.append(render(near_miss(rng, spec) if rng.random() < 0.3 else sample_scene(rng, spec)))
    return np.stack(images)


def round_trip_accuracy(policy: JanusPolicy, seed: int, count: int) -> float:
    """Share of clean renders that the checker still accepts after encoding and decoding."""
    rng = random.Random(seed)
    specs = [sample_spec(rng, "all") for _ in range(count)]
    images = torch.from_numpy(np.stack([render(sample_scene(rng, spec)) for spec in specs]))
    decoded = torch.cat([policy.decode_codes(policy.encode_pixels(part)) for part in images.split(200)]).numpy()
    return float(np.mean([check(spec.metadata, image).correct for spec, image in zip(specs, decoded, strict=True)]))


def train_vq(policy: JanusPolicy, steps: int = 3600, batch: int = 32, lr: float = 2e-3, seed: int = 1) -> None:
    """Train encoder and decoder in place; the codebook stays the corners of the cube."""
    vq, unshuffle = policy.janus.model.vqmodel, policy.pixel_unshuffle
    vq.requires_grad_(True).train()
    vq.quantize.embedding.weight.requires_grad_(False)
    parameters = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    images = torch.from_numpy(random_images(seed, NUM_IMAGES)).permute(0, 3, 1, 2)
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    meter = Meter("vq", steps, every=200)
    bits = vq.quantize.embedding.weight.shape[1]
    for step in range(1, steps + 1):
        pixels = images[torch.randint(len(images), (batch,), generator=generator)].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents = vq.quant_conv(vq.encoder(F.pixel_unshuffle(pixels, unshuffle)))
        latents = F.normalize(latents.float(), dim=1)
        corners = torch.where(latents > 0, 1.0, -1.0) / bits**0.5
        straight_through = latents + (corners - latents).detach()
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vq.decoder(vq.post_quant_conv(straight_through))
        decoded = F.pixel_shuffle(decoded.float(), unshuffle)
        foreground = ((pixels - background).abs().amax(1, keepdim=True) > 0.15).float()
        weight = 1 + (FOREGROUND_WEIGHT - 1) * foreground
        weight = weight / weight.mean()
        reconstruction = (weight * ((decoded - pixels).abs() + (decoded - pixels).pow(2))).mean()
        usage = torch.sigmoid(latents * bits**0.5 * 4).mean((0, 2, 3)).clamp(1e-6, 1 - 1e-6)
        entropy = -(usage * usage.log() + (1 - usage) * (1 - usage).log()).mean()
        loss = reconstruction + COMMITMENT * F.mse_loss(latents, corners.detach()) - ENTROPY * entropy
        rate = lr * min(1.0, step / 50) * (1 - 0.97 * step / steps)
        optimise(loss, optimizer, rate)
        meter.update(step, reconstruction=reconstruction.item())
        if step % 1200 == 0 and step < steps:
            vq.eval()
            print(f"[vq] round trips accepted {round_trip_accuracy(policy, 777, 200):.3f}", flush=True)
            vq.train()
    vq.requires_grad_(False).eval()
    require("vq", "round trips accepted", round_trip_accuracy(policy, 778, 1000), 0.95)
