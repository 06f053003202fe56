"""How many rows a worker can draw at once: what a row takes, of shapes alone, against the memory that is free.

A row's own memory is its keys and values: of the image being drawn, of those that wait to be drawn again, of a look.
Beside them stand the widest block of hidden states, the logits of one token, and the pixels. What rows share is taken
off first: the prompts of a call, and the working memory of the VQ tokenizer for one chunk of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlpipe.learn.saver import free_host_bytes
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.batch import chunk_size
from rlpipe.rollout.decoder import Decoder
from rlpipe.types import Sampling

GPU_SHARE, HOST_SHARE = 0.9, 0.5
"""Of the free memory that rows may take. On a host other roles grow meanwhile: the learner, judges, stored images."""
_COPIES = 4
"""Hidden states, or pixels in the VQ tokenizer, that are there at once, as multiples of the widest."""
MIB = 1 << 20


@dataclass(frozen=True)
class RowMemory:
    """Bytes of one row, and of what all rows of a worker share.

    memory = RowMemory.of(decoder, sampling, prompt_tokens=200)
    rows = rows_that_fit("auto", memory, free_bytes(device))
    """

    cache: int
    hidden: int
    logits: int
    pixels: int
    shared: int

    @property
    def row(self) -> int:
        return self.cache + self.hidden + self.logits + self.pixels

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        sampling: Sampling,
        prompt_tokens: int,
        prompts: int = 1,
        reflects: bool = True,
        branches: int = 1,
    ) -> RowMemory:
        """For calls with so many `prompts`, the longest of `prompt_tokens`, frame and source image included.

        reflects: whether images are looked at. branches: rows of each first image.
        """
        policy, config = decoder.policy, decoder.model.config
        lengths = _Lengths.of(policy, sampling, prompt_tokens, reflects)
        twins = 1 if sampling.guidance == 1.0 else 2
        item = torch.finfo(decoder.dtype).bits // 8
        slot = 2 * len(decoder.layers) * decoder.kv_heads * decoder.slot_bytes
        # Fewer than one row waits for each that is drawn, and as many again when that one has been looked at; with
        # `history: all`, where branches have images of their own before them, as many as branches.
        kept = twins * lengths.kept + (lengths.look if sampling.history == "all" else 0)
        waits = 1 + (branches if sampling.history == "all" else 1)
        looking = twins * lengths.first + kept + 2 * lengths.look  # twice: rows that still speak are copied
        slots = max(waits * kept + twins * lengths.last, looking if reflects else 0)
        width = (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim + 3 * config.intermediate_size
        block = max(twins * lengths.block, lengths.seen)
        return cls(
            cache=slot * slots,
            hidden=block * item * (width + _COPIES * config.hidden_size + max(lengths.last, lengths.look)),
            # Float32 logits, log-probs, and their sums in float64.
            logits=max((4 * twins + 24) * policy.codebook_size, 28 * config.vocab_size * reflects),
            pixels=2 * sampling.max_images * 3 * policy.image_size**2,
            shared=chunk_size(policy) * policy.image_size**2 * _vq_width(policy) * item * _COPIES
            + twins * prompts * prompt_tokens * slot,
        )


@dataclass(frozen=True)
class _Lengths:
    """Slots of a row's caches: of its first image, of its last, of what is kept while it waits, of a look.

    block, seen: inputs that are decoded at once before a redraw, and at a look.
    """

    first: int
    last: int
    kept: int
    look: int
    block: int
    seen: int

    @classmethod
    def of(cls, policy: JanusPolicy, sampling: Sampling, prompt: int, reflects: bool) -> _Lengths:
        image, templates = policy.num_image_tokens, policy.templates
        vision = policy.janus.config.vision_config
        pixels = (vision.image_size // vision.patch_size) ** 2
        text = len(templates.look) + sampling.max_reflection_tokens + len(templates.redraw)
        everything, reencoded = sampling.history == "all", sampling.redraw_context == "reencoded"
        again = sampling.max_images - 1 if reflects else 0
        earlier = again if everything else min(again, 1)
        looked = max(again - 1, 0) if everything else 0
        # From the third image on, `history: last` has nothing left of the sampled codes but themselves.
        codes = image if reencoded or again > 1 and not everything else 1
        return cls(
            first=prompt + image,
            last=prompt + earlier * (image + text) + image,
            kept=prompt + looked * (image + text) + image if again and (everything or not reencoded) else 0,
            look=(prompt + (1 + looked) * (pixels + text)) if reflects else 0,
            block=max(prompt, codes + text if again else 0),
            seen=pixels + text + (text if looked else 0) if reflects else 0,
        )


def _vq_width(policy: JanusPolicy) -> int:
    """Numbers per pixel of the VQ tokenizer's widest layer at full size."""
    config = policy.janus.config.vq_config
    return max(config.base_channels // policy.pixel_unshuffle**2, 3) * 2


def free_bytes(device: torch.device, gpu_share: float = 1.0, workers: int = 1) -> int:
    """Memory that one worker's rows may take now.

    gpu_share: of its GPU that is its own, where actors share one. workers: those that share a host's memory.
    """
    if device.type != "cuda":
        return int(free_host_bytes() * HOST_SHARE / workers)
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - own  # torch keeps what it has freed
    return int(min(free, total * gpu_share - own) * GPU_SHARE)


def rows_that_fit(wanted: str, memory: RowMemory, free: int) -> int:
    """Rows drawn at once: `auto`, as many as fit into `free` bytes, or the number that is wanted if it fits.

    Raises ValueError with the number that fits.
    """
    fit = (free - memory.shared) // memory.row
    told = f"{free / MIB:.0f} MiB are free for rows, of which one takes {memory.row / MIB:.1f} MiB"
    if fit < 1:
        raise ValueError(
            f"rollout.rows: {wanted}, but not one row fits: {told} beside {memory.shared / MIB:.0f} MiB for all; "
            "give workers more memory, or lower rollout.max_reflection_tokens or rollout.max_images"
        )
    if wanted == "auto":
        return fit
    if int(wanted) > fit:
        raise ValueError(f"rollout.rows: {wanted} rows do not fit: {told}; give {fit} or fewer, or auto")
    return int(wanted)
