from __future__ import annotations

import copy

import pytest
import torch

from rlpipe.config import load_config, validate
from rlpipe.rollout.cache import pack, packed_size, unpack
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Prompt, Sampling
from tests.rollout.test_decoder import random_ids


def test_numbers_of_any_size_survive_eight_bits_within_a_sixteenth():
    torch.manual_seed(0)
    numbers = torch.randn(3, 4, 32) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    packed = pack(numbers)
    assert packed.shape == (3, 4, packed_size(32)) and packed.dtype == torch.uint8
    largest = numbers.abs().amax(-1, keepdim=True)
    assert bool(((unpack(packed, torch.float32) - numbers).abs() <= numbers.abs() / 16 + largest / 2**14).all())
    assert not unpack(pack(torch.zeros(2, 32)), torch.float32).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_of_eight_bits_stays_near_one_of_the_policys_type(tiny_policy, dtype):
    policy = copy.deepcopy(tiny_policy).requires_grad_(False)
    policy.janus.to(dtype)
    ids, found = random_ids(policy, 3, 16), []
    for kind in ("auto", "float8_e4m3"):
        decoder = Decoder(policy, cache_dtype=kind)
        cache, _ = decoder.prefill([row[: 6 + number].tolist() for number, row in enumerate(ids)], slots=12)
        assert cache.keys[0, 0, 0, 0].nbytes == decoder.slot_bytes
        for t in range(3):
            hidden = decoder.extend(cache, policy.embed_text(ids[:, t, None]), torch.arange(6, 9)[:, None] + t)
        found.append(hidden.float())
    apart = float((found[0] - found[1]).norm() / found[0].norm())
    assert 0.0 < apart < 0.1


def test_with_eight_bits_too_a_row_is_drawn_alike_in_every_batch(tiny_policy):
    decoder = Decoder(tiny_policy, cache_dtype="float8_e4m3")
    prompts = [Prompt(str(n), text) for n, text in enumerate(["a red circle", "two blue squares", "a green triangle"])]
    samplings = [Sampling(seed=seed, guidance=2.0, max_reflection_tokens=8) for seed in range(3)]
    together = introspect(decoder, prompts, samplings, ["0", "1", "2"])
    (alone,) = introspect(decoder, prompts[1:2], samplings[1:2], ["1"])
    segments = zip(together[1].trajectory.segments, alone.trajectory.segments, strict=True)
    assert all((one.token_ids == other.token_ids).all() for one, other in segments)


def test_eight_bits_without_a_gpu_are_refused_in_one_line():
    with pytest.raises(ValueError, match="rollout.cache_dtype: float8_e4m3 saves memory on a GPU alone; set auto"):
        validate(load_config("configs/tiny_grpo.yaml", ["rollout.cache_dtype=float8_e4m3"]))
