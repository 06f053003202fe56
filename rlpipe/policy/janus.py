"""The unified model: transformers' Janus with its three embeddings and two heads under plain names.

text tokens -> embed_text  \\                               / text_logits
VQ codes    -> embed_codes  -> language model -> hidden ->
pixels      -> embed_pixels /                               \\ image_logits
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import JanusForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlpipe.paths import resolve_path
from rlpipe.policy import checkpoint
from rlpipe.policy.attention import PACKED, Sequences, no_mask
from rlpipe.policy.templates import Templates
from rlpipe.schema import Config

T = TypeVar("T")


class JanusPolicy(nn.Module):
    """A Janus model with its tokenizer's templates.

    Images are uint8 [B, H, W, 3]; codes int64 [B, num_image_tokens]; embeddings and hidden states [B, T, D].

        policy = JanusPolicy.load("rlpipe/world/assets/policy")
        codes = policy.encode_pixels(images)          # [B, N]
        images = policy.decode_codes(codes)           # uint8 [B, H, W, 3]
    """

    def __init__(
        self,
        janus: JanusForConditionalGeneration,
        templates: Templates,
        original: checkpoint.Original | None = None,
    ) -> None:
        super().__init__()
        self.janus = janus
        self.templates = templates
        config = janus.config
        self.image_size: int = config.vision_config.image_size
        self.num_image_tokens: int = config.vq_config.num_patches**2
        self.codebook_size: int = config.vq_config.num_embeddings
        # A VQ tokenizer of 3 * r * r input channels works on r x r pixel blocks; the published models have r = 1.
        self.pixel_unshuffle: int = math.isqrt(config.vq_config.in_channels // 3)
        self.original = original
        janus.model.language_model.set_attn_implementation(PACKED)
        for module in janus.model.language_model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.register_forward_hook(_as_autocast_does)
        # With their channels side by side the VQ tokenizer is a third faster on large images, and not on small ones.
        self.memory_format = torch.channels_last if self.image_size >= 256 else torch.contiguous_format

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        overlay: str | Path | None = None,
    ) -> JanusPolicy:
        """Load a checkpoint folder in the original layout or in transformers'; no remote code, tensors only.

        overlay: file with a state dict whose tensors replace those of the folder (names of either layout).
        Raises FileNotFoundError, checkpoint.CheckpointError.
        """
        return cls(*checkpoint.load(Path(path), dtype, device, overlay))

    @classmethod
    def from_config(
        cls, config: Config, dtype: torch.dtype = torch.float32, device: str = "cpu", path: str | None = None
    ) -> JanusPolicy:
        """The policy that a configuration names, with its overlay and templates, without adapters.

        path: of a checkpoint that is loaded in place of policy.path and policy.overlay, with the same templates.
        """
        overlay = config.policy.overlay if path is None else None
        policy = cls.load(resolve_path(path or config.policy.path), dtype, device, overlay)
        policy.templates = policy.templates.configured(config)
        return policy

    def save(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the transformers layout: config.json, safetensors, tokenizer files."""
        checkpoint.save(path, self.janus, self.templates, self.original, dtype)

    def export(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the original layout; see `checkpoint.export_original`."""
        checkpoint.export_original(path, self.janus, self.templates, self.original, dtype)

    def embedder(self) -> JanusPolicy:
        """This policy cut down, in place, to what makes embeddings: without layers, heads and VQ tokenizer."""
        self.part("language_model").layers = nn.ModuleList()
        self.janus.lm_head = self.janus.model.generation_head = self.janus.model.vqmodel = nn.Identity()
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def part(self, name: str) -> nn.Module:
        """A part by its checkpoint name: language_model, aligner, generation_head, lm_head, ..."""
        return self.janus.lm_head if name == "lm_head" else getattr(self.janus.model, name)

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Let gradients into the named parts and nowhere else."""
        self.requires_grad_(False)
        for name in parts:
            self.part(name).requires_grad_(True)

    def forward(self, function: Callable[..., T], *args, **kwargs) -> T:
        """Run `function(self, ...)` inside this module's forward, where sharding wrappers see every use of a weight."""
        return function(self, *args, **kwargs)

    # embeddings

    def embed_text(self, ids: torch.Tensor) -> torch.Tensor:
        return self.janus.model.language_model.embed_tokens(ids)

    def embed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        model = self.janus.model
        return model.generation_aligner(model.generation_embeddings(codes))

    def embed_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Understanding embeddings [B, N, D] of uint8 [B, H, W, 3] (SigLIP tower, then aligner)."""
        with torch.no_grad():
            features = self.janus.model.vision_model(self.normalise(images)).last_hidden_state
        return self.janus.model.aligner(features)

    # the language model and its heads

    def hidden(
        self, embeddings: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Last hidden states [B, T, D]; `positions` int64 [B, T] may have gaps. Attention is causal.

        lengths: of the sequences that stand behind one another in a single row (B = 1): none sees another. None: B rows
                 of one sequence each, padded on the right, where causality alone keeps the padding out.
        """
        rows, length = embeddings.shape[:2]
        dtype, device = embeddings.dtype, embeddings.device.type
        # What layers add up in bfloat16 parts the learner from the sampler: products are in it, their sum is float32.
        with torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext():
            # Without a mask transformers would take a gap in the positions for the border of a packed sequence.
            hidden = self.janus.model.language_model(
                inputs_embeds=embeddings.reshape(1, rows * length, -1).float(),
                attention_mask=no_mask(embeddings),
                position_ids=positions.reshape(1, rows * length),
                use_cache=False,
                sequences=Sequences([length] * rows if lengths is None else lengths),
            ).last_hidden_state
        return hidden.view_as(embeddings).to(dtype)

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [.., V]."""
        return _in_float32(self.janus.lm_head, hidden)

    def image_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [.., K]."""
        head = self.janus.model.generation_head
        return _in_float32(head.vision_head, head.activation_fn(head.proj_out(hidden)))

    # pixels

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [-1, 1] of uint8 [B, H, W, 3], as tower and VQ tokenizer take them."""
        dtype = self.janus.model.vision_model.dtype
        return (images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(dtype)

    @torch.no_grad()
    def encode_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """VQ codes [B, N] of uint8 [B, H, W, 3]: nearest codebook vector after l2-normalisation of both sides."""
        vq = self.janus.model.vqmodel
        pixels = F.pixel_unshuffle(self.normalise(images), self.pixel_unshuffle)
        pixels = pixels.contiguous(memory_format=self.memory_format)
        latents = F.normalize(vq.quant_conv(vq.encoder(pixels)).float(), dim=1)
        # The original VQ compares unit vectors; transformers' own `encode` leaves the lengths in.
        codebook = F.normalize(vq.quantize.embedding.weight.float(), dim=-1)
        similarity = torch.einsum("bdhw,kd->bhwk", latents, codebook)
        return similarity.argmax(-1).flatten(1)

    @torch.no_grad()
    def decode_floats(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 [B, 3, H, W] of VQ codes [B, N], what the VQ tokenizer makes of them; black is -1, white 1."""
        vq = self.janus.model.vqmodel
        latents = vq.quantize.get_codebook_entry(codes.to(self.device))
        pixels = vq.decoder(vq.post_quant_conv(latents.contiguous(memory_format=self.memory_format)))
        return F.pixel_shuffle(pixels.float(), self.pixel_unshuffle)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] of VQ codes [B, N]; truncated, not rounded, as in the official code."""
        pixels = self.decode_floats(codes).clamp(-1, 1)
        return ((pixels + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _as_autocast_does(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A norm's output in the type of the products behind it, once and not by each of them."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def _in_float32(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer before it is rounded to the layer's type.

    Logits rounded to bfloat16 part the sampler from the learner more than all layers before them. Under autocast
    weights and inputs are rounded, as the sampler has them.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if dtype == torch.float32:
        return layer(x)
    weights = {name: weight.to(dtype).float() for name, weight in layer.named_parameters()}
    with torch.autocast(device, enabled=False):
        return torch.func.functional_call(layer, weights, (x.to(dtype).float(),))
