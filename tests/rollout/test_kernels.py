from __future__ import annotations

import copy
import logging

import pytest
import torch

from rlpipe.rollout import kernels
from rlpipe.rollout.decoder import Cache, Decoder
from rlpipe.rollout.kernels import Kernels, compiled
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
def test_several_threads_write_what_one_writes():
    torch.manual_seed(0)
    rows, heads, slots, size = 6, 4, 600, 64
    found = Kernels(compiled(), torch.float32)
    qkv, rotation = torch.randn(rows, 3 * heads * size), torch.polar(torch.ones(700, 32), torch.rand(700, 32))
    keys, values = torch.randn(2, rows, heads, slots, size)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(found.attend(qkv, rotation, torch.arange(rows), keys, values, slots - 1, None))
    torch.set_num_threads(before)
    assert torch.equal(*results)


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
