"""Batched decoding with a key/value cache over the language model of a `JanusPolicy`.

Plain functional code over fused copies of the weights: transformers' Llama up to rounding, at less cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.cache import Cache, pack, packed_size, unpack
from rlpipe.rollout.kernels import Kernels
from rlpipe.rollout.linear import Linear

CODES = 1 << 40
"""Added to a VQ code where a sequence mixes codes with vocabulary ids."""


@dataclass
class _Layer:
    """Fused copies of one layer's weights."""

    norm: torch.Tensor
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Decodes with a policy's language model. Call `refresh` after every change of the policy's weights.

    Holds a second copy of the language model's layers. Rows are independent: what a row yields depends
    neither on its batch mates nor on its padding.

        decoder = Decoder(policy)
        cache, hidden = decoder.prefill([prompt_ids, other_prompt_ids], slots=64)
        hidden = decoder.extend(cache, policy.embed_text(tokens)[:, None], positions[:, None])   # [B, D]
    """

    def __init__(
        self, policy: JanusPolicy, kernels: bool = True, graphs: bool = False, cache_dtype: str = "auto"
    ) -> None:
        """How it runs; what it yields depends on the type of the cache alone.

        kernels:     use those of `kernels.py` where there are any; without them the same in plain torch.
        graphs:      draw images in static shapes, see `graphs.py`.
        cache_dtype: auto, the policy's own, or float8_e4m3: half of bfloat16's memory, so twice the rows. Raises
                     ValueError for a GPU that does not have it.
        """
        self.policy, self.graphs, self.packed = policy, graphs, cache_dtype == "float8_e4m3"
        if self.packed and policy.device.type == "cuda" and torch.cuda.get_device_capability(policy.device) < (8, 9):
            name = torch.cuda.get_device_name(policy.device)
            raise ValueError(f"rollout.cache_dtype: {name} has no float8_e4m3; set auto")
        self.model = policy.janus.model.language_model
        config = self.model.config
        if config.attention_bias or config.mlp_bias:
            raise ValueError("policy.path: attention_bias and mlp_bias are unknown here; Janus has neither")
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps
        self.activation = ACT2FN[config.hidden_act]
        self.max_positions: int = config.max_position_embeddings
        self.device, self.dtype = policy.device, self.model.embed_tokens.weight.dtype
        self.kernels = Kernels.load(config, self.head_dim, self.dtype, self.device) if kernels else None
        with torch.inference_mode():
            self.layers = [
                _Layer(**{name: self._held(weight) for name, weight in self._fused(layer).items()})
                for layer in self.model.layers
            ]
            self.norm = self.model.norm.weight.clone()
            self.project, self.classify, self.speak = (
                Linear(module.weight, module.bias, wide, self.kernels) for module, wide in self._heads()
            )
            self.code_table = self._code_embeddings().clone()  # [codes, D]
            self.rotation = self._rotation()
            self.compiled = self._compiled()

    @torch.inference_mode()
    def refresh(self) -> None:
        """Copy the policy's present weights, in place where the device's form of them allows."""
        for held, layer in zip(self.layers, self.model.layers, strict=True):
            for name, weight in self._fused(layer).items():
                place = getattr(held, name)
                place.refresh(weight) if isinstance(place, Linear) else place.copy_(weight)
        self.norm.copy_(self.model.norm.weight)
        for held, (module, _) in zip((self.project, self.classify, self.speak), self._heads(), strict=True):
            held.refresh(module.weight, module.bias)
        self.code_table.copy_(self._code_embeddings())

    def _held(self, weight: torch.Tensor) -> Linear | torch.Tensor:
        return Linear(weight, kernels=self.kernels) if weight.ndim == 2 else weight.clone()

    def _compiled(self) -> object | None:
        """The model as the kernels' own step takes it; None without kernels."""
        if self.kernels is None:
            return None
        matrices = [[getattr(layer, field.name) for field in fields(layer)] for layer in self.layers]
        layers = [[part.weight if isinstance(part, Linear) else part for part in layer] for layer in matrices]
        inner = self.model.config.intermediate_size
        sizes = {"heads": self.heads, "kv_heads": self.kv_heads, "size": self.head_dim, "eps": self.eps}
        return self.kernels.model(
            layers, self.norm, rotation=self.rotation.data_ptr(), width=len(self.norm), inner=inner, **sizes
        )

    def _heads(self) -> tuple[tuple[nn.Linear, bool], ...]:
        """The linear layers behind the language model, and whether what they yield are logits."""
        head = self.policy.part("generation_head")
        return (head.proj_out, False), (head.vision_head, True), (self.policy.janus.lm_head, True)

    def _code_embeddings(self) -> torch.Tensor:
        return self.policy.embed_codes(torch.arange(self.policy.codebook_size, device=self.device))

    def _rotation(self) -> torch.Tensor:
        """complex64 [positions, head size / 2]."""
        positions = torch.arange(self.max_positions, device=self.device)[None]
        turns = self.model.rotary_emb(torch.empty(1, device=self.device), positions)
        return torch.complex(*(turn[0, :, : self.head_dim // 2].float() for turn in turns))

    def _fused(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of `_Layer`, matrices [out, in]."""
        attention, mlp = layer.self_attn, layer.mlp
        queries_keys = [self._interleave(attention.q_proj.weight), self._interleave(attention.k_proj.weight)]
        return {
            "norm": layer.input_layernorm.weight,
            "qkv": torch.cat([*queries_keys, attention.v_proj.weight]),
            "out": attention.o_proj.weight,
            "mlp_norm": layer.post_attention_layernorm.weight,
            "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
            "down": mlp.down_proj.weight,
        }

    def _interleave(self, weight: torch.Tensor) -> torch.Tensor:
        """Reorder each head's channels so that the two of a rotary pair are neighbours, one complex number.

        Queries and keys are reordered alike, which leaves their products as they were.
        """
        halves = weight.view(-1, 2, self.head_dim // 2, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape)

    def prefill(self, sequences: Sequence[Sequence[int]], slots: int) -> tuple[Cache, torch.Tensor]:
        """Decode token sequences of any lengths, left-padded: their cache and last hidden states [B, D].

        A VQ code of an image in a sequence stands in it as `CODES` + code.
        """
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        valid = torch.zeros(len(sequences), width, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            valid[row, width - len(sequence) :] = True
        positions = (valid.cumsum(1) - 1).clamp_(min=0)
        padded = not bool(valid.all())
        ids, valid, positions = ids.to(self.device), valid.to(self.device), positions.to(self.device)
        cache = self.new_cache(len(sequences), slots)
        hidden = self.extend(cache, self._embed(ids), positions, valid if padded else None)
        return cache, hidden

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, D] of vocabulary ids and of codes that have `CODES` added."""
        codes = ids >= CODES
        if not bool(codes.any()):
            return self.policy.embed_text(ids)
        embedded = self.policy.embed_text(ids.masked_fill(codes, 0))
        embedded[codes] = self.code_table[ids[codes] - CODES]
        return embedded

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot's keys, or values, of one layer and head."""
        return packed_size(self.head_dim) if self.packed else self.head_dim * self.dtype.itemsize

    def new_cache(self, rows: int, slots: int) -> Cache:
        size, dtype = (packed_size(self.head_dim), torch.uint8) if self.packed else (self.head_dim, self.dtype)
        empty = torch.empty(len(self.layers), rows, self.kv_heads, slots, size, dtype=dtype, device=self.device)
        return Cache(empty, torch.empty_like(empty))

    @torch.inference_mode()
    def extend(
        self,
        cache: Cache,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Decode a block of inputs into the cache; each row's last hidden state [B, D] after the final norm.

        embeddings [B, T, D]; positions int64 [B, T], not counting padding; valid bool [B, T] or None, False
        where the block is padding. Padding may stand anywhere but at the end.
        """
        rows, width, size = embeddings.shape
        start, end = cache.length, cache.length + width
        if end > cache.slots:
            raise ValueError(f"decoder: {end} slots asked of a cache of {cache.slots}")
        if valid is not None:
            cache.mark(valid)
        cache.length = end
        positions, x, delta = positions.contiguous(), _residual(embeddings), None
        if width == 1 and self.kernels is not None and not self.packed:
            return self.kernels.decode(self.compiled, x, positions, cache.keys, cache.values, start, cache.bias)
        bias = self._bias(cache, width)
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, delta, layer.norm))
            keys, values = cache.keys[index], cache.values[index]
            last = width > 1 and index + 1 == len(self.layers)
            if last:  # nobody reads the last layer's output anywhere but at the last position
                x = x.view(rows, width, size)[:, -1].contiguous()
                bias = None if bias is None else bias[:, :, -1:]
            queries = self._write(qkv.view(rows, width, -1, self.head_dim), positions, keys, values, start)
            queries = queries[:, -1:] if last else queries
            delta = layer.out(self._attend(queries, keys[:, :, :end], values[:, :, :end], bias))
            delta = layer.down(self._gate(layer.gate_up(self._norm(x, delta, layer.mlp_norm))))
        return self._norm(x, delta, self.norm)

    @torch.inference_mode()
    def extend_at(
        self, cache: Cache, embeddings: torch.Tensor, positions: torch.Tensor, slot: torch.Tensor, limit: int
    ) -> torch.Tensor:
        """`extend` by one input per row, in shapes that no step changes: for `graphs.py`.

        slot: int64 [1], where it goes; cache.length is neither read nor changed. limit: slots that are looked at,
        of which those behind `slot` are masked.
        """
        unwritten = torch.arange(limit, device=self.device) > slot
        written = embeddings.new_zeros(limit).masked_fill_(unwritten, torch.finfo(self.dtype).min)
        bias = written if cache.bias is None else torch.minimum(cache.bias[..., :limit], written)
        bias = bias.expand(len(embeddings), 1, 1, limit)
        x, delta = _residual(embeddings), None
        for index, layer in enumerate(self.layers):
            qkv = layer.qkv(self._norm(x, delta, layer.norm)).view(len(x), 1, -1, self.head_dim)
            keys, values = cache.keys[index], cache.values[index]
            rotated = self._rotate(qkv[:, :, : self.heads + self.kv_heads], self.rotation[positions].unsqueeze(2))
            keys.index_copy_(2, slot, self._kept(rotated[:, :, self.heads :]))
            values.index_copy_(2, slot, self._kept(qkv[:, :, self.heads + self.kv_heads :]))
            queries = rotated[:, :, : self.heads]
            delta = layer.out(self._attend(queries, keys[:, :, :limit], values[:, :, :limit], bias))
            delta = layer.down(self._gate(layer.gate_up(self._norm(x, delta, layer.mlp_norm))))
        return self._norm(x, delta, self.norm)

    @torch.inference_mode()
    def image_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, K] of hidden states [R, D]."""
        return self.classify(self.policy.part("generation_head").activation_fn(self.project(hidden)))

    @torch.inference_mode()
    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [R, V] of hidden states [R, D]."""
        return self.speak(hidden)

    def _norm(self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """Add `delta` to x [R, D] in place, where there is one; the norm of the sum."""
        if self.kernels is not None:
            return self.kernels.normalise(x, delta, weight, self.eps)
        normed = F.rms_norm(x if delta is None else x.add_(delta), weight.shape, weight.float(), self.eps)
        return normed.to(self.dtype)

    def _gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.kernels is not None:
            return self.kernels.gate(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate).mul_(up)

    def _write(
        self, qkv: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int
    ) -> torch.Tensor:
        """Keys and values of qkv [B, T, heads + 2 kv heads, head size] into the slots from `start`; its queries."""
        end, rotation = start + qkv.shape[1], self.rotation[positions].unsqueeze(2)  # [B, T, 1, head size / 2]
        qk = self._rotate(qkv[:, :, : self.heads + self.kv_heads], rotation)
        keys[:, :, start:end] = self._kept(qk[:, :, self.heads :])
        values[:, :, start:end] = self._kept(qkv[:, :, self.heads + self.kv_heads :])
        return qk[:, :, : self.heads]

    def _kept(self, new: torch.Tensor) -> torch.Tensor:
        """Keys or values [B, T, heads, head size] as the cache has them, [B, heads, T, ..]."""
        return (pack(new) if self.packed else new).transpose(1, 2)

    def _bias(self, cache: Cache, width: int) -> torch.Tensor | None:
        """What is added to the scores: [B or 1, 1, T, slots so far]; None if every query sees every slot."""
        bias = None if cache.bias is None else cache.bias[..., : cache.length]
        if width == 1:
            return bias
        low = torch.finfo(self.dtype).min
        causal = torch.full((width, cache.length), low, dtype=self.dtype, device=self.device)
        causal = causal.triu_(cache.length - width + 1)[None, None]
        return causal if bias is None else torch.minimum(causal, bias)

    def _rotate(self, qk: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """Rotary positions of [B, T, heads, head size], in float32."""
        pairs = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs.mul_(rotation)).flatten(-2).to(self.dtype)

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Queries [B, T, heads, head_dim] over keys and values [B, kv heads, S, head_dim]: [B * T, D]."""
        rows, width = queries.shape[:2]
        if self.packed:
            keys, values = unpack(keys, self.dtype), unpack(values, self.dtype)
            bias = None if bias is None else bias.to(self.dtype)
        if width == 1:
            # the queries of one key head stand in the place of time: no key is repeated
            grouped = queries.reshape(rows, self.kv_heads, -1, self.head_dim)
            if self.dtype == torch.float32 and self.device.type == "cpu":
                return _attend_by_products(grouped, keys, values, bias).view(rows, -1)
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias).reshape(rows, -1)
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=bias, enable_gqa=self.heads != self.kv_heads
        )
        return attended.transpose(1, 2).reshape(rows * width, -1)


def _residual(embeddings: torch.Tensor) -> torch.Tensor:
    """The residual stream, float32 [B * T, D]: what is added up in bfloat16 parts the sampler from the learner."""
    return embeddings.flatten(0, 1).to(torch.float32, copy=True)


def _attend_by_products(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scaled dot-product attention as two batched products, a fifth faster on a CPU for single queries.

    Rows and heads are merged by hand, for `matmul` would copy the strided keys.
    """
    rows, heads, width, size = queries.shape
    scores = torch.bmm(queries.reshape(-1, width, size), keys.flatten(0, 1).transpose(1, 2))
    scores = scores.mul_(size**-0.5).view(rows, heads, width, -1)
    if bias is not None:
        scores += bias
    return torch.bmm(scores.softmax(-1).flatten(0, 1), values.flatten(0, 1))
