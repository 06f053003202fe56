from __future__ import annotations

import copy
import logging

import pytest
import torch

from rlpipe.policy.guidance import guide
from rlpipe.rollout import kernels
from rlpipe.rollout.cache import Cache
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.kernels import Kernels, compiled
from rlpipe.rollout.linear import Linear
from rlpipe.rollout.sampling import choose
from tests.rollout.test_decoder import random_ids, with_language_model

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C++ compiler")


def decoded(decoder: Decoder, ids: torch.Tensor) -> tuple[torch.Tensor, Cache]:
    """Hidden states of six single steps behind prompts of unequal lengths, float32 [6, B, D]; the cache."""
    lengths = torch.tensor([4 + row % 3 for row in range(len(ids))])
    cache, _ = decoder.prefill([row[:n].tolist() for row, n in zip(ids, lengths, strict=True)], slots=40)
    table = decoder.policy.janus.model.language_model.embed_tokens.weight
    hidden = [decoder.extend(cache, table[ids[:, t], None], lengths[:, None] + t) for t in range(20)]
    return torch.stack(hidden).float(), cache


@needs_compiler
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_the_kernels_do_what_plain_torch_does(tiny_policy, head_dim, kv_heads):
    policy = with_language_model(
        tiny_policy, num_attention_heads=2, num_key_value_heads=kv_heads, head_dim=head_dim, num_hidden_layers=2
    )
    fast, plain = Decoder(policy), Decoder(policy, kernels=False)
    assert fast.kernels is not None and plain.kernels is None
    ids = random_ids(policy, 5, 24)
    (one, cache), (other, expected) = decoded(fast, ids), decoded(plain, ids)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    length = cache.length
    torch.testing.assert_close(cache.keys[..., :length, :], expected.keys[..., :length, :], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.values[..., :length, :], expected.values[..., :length, :], atol=1e-5, rtol=1e-5)


@needs_compiler
def test_bfloat16_kernels_are_as_near_to_float32_as_plain_torch(tiny_policy):
    ids = random_ids(tiny_policy, 5, 24)
    exact, _ = decoded(Decoder(tiny_policy, kernels=False), ids)
    low = copy.deepcopy(tiny_policy)
    low.janus.to(torch.bfloat16)
    away = [(decoded(Decoder(low, kernels=k), ids)[0] - exact).norm() / exact.norm() for k in (True, False)]
    assert away[0] < 1.2 * away[1] < 0.1


@needs_compiler
def test_several_threads_write_what_one_writes(tiny_policy):
    decoder, ids = Decoder(tiny_policy), random_ids(tiny_policy, 5, 24)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(decoded(decoder, ids)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [16, 30, 32, 80, 112])
def test_products_are_those_of_torch_whatever_the_sizes(dtype, outputs):
    torch.manual_seed(outputs)
    found = Kernels(compiled(), dtype)
    for rows in (1, 7, 8, 13, 200):
        x, weight, bias = torch.randn(rows, 48).to(dtype), torch.randn(outputs, 48).to(dtype), torch.randn(outputs)
        expected = (x.double() @ weight.double().t() + bias).float()
        wide = Linear(weight, bias.to(dtype), wide=True, kernels=found)(x)
        torch.testing.assert_close(wide, expected + (bias.to(dtype).float() - bias), atol=1e-5, rtol=1e-5)
        narrow = Linear(weight, kernels=found)(x)
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow, (expected - bias).to(dtype), atol=1e-5, rtol=1e-2)


@needs_compiler
def test_a_row_is_multiplied_alike_in_every_batch():
    torch.manual_seed(0)
    found = Kernels(compiled(), torch.bfloat16)
    x, weight = torch.randn(205, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    project = Linear(weight, kernels=found)
    alone = torch.cat([project(row[None]) for row in x])
    assert torch.equal(project(x), alone)


@needs_compiler
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_tokens_are_drawn_as_in_plain_torch(guidance, temperature):
    torch.manual_seed(0)
    logits, chance = 3 * torch.randn(2 * 500, 512), torch.rand(500)
    chance[:2] = torch.tensor([0.0, 1.0 - 2**-24])
    if guidance == 1.0:
        logits = logits[:500]
    halves = logits.chunk(2) if guidance != 1.0 else (logits, None)
    expected = choose(guide(*halves, guidance), chance, temperature)
    tokens, logprobs = Kernels(compiled(), torch.float32).choose(logits, chance, guidance, temperature)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logprobs, expected[1], atol=2e-5, rtol=1e-5)


def test_sizes_that_the_kernels_do_not_know_are_left_to_torch(tiny_policy):
    policy = with_language_model(tiny_policy, head_dim=24)
    assert Decoder(policy).kernels is None


def test_without_a_compiler_a_warning_says_what_to_do(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert kernels.compiled.__wrapped__() is None
    assert "install g++ or set CXX" in caplog.text


def test_a_library_is_compiled_once(monkeypatch, tmp_path):
    if compiled() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.compiled.__wrapped__() is not None
    (library,) = (tmp_path / "rlpipe").iterdir()
    written = library.stat().st_mtime_ns
    assert kernels.compiled.__wrapped__() is not None
    assert library.stat().st_mtime_ns == written
