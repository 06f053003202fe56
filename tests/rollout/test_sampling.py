from __future__ import annotations

import torch

from rlpipe.rollout.sampling import choose, draw, noise, truncate, uniforms


def test_truncate_keeps_the_k_largest_and_exactly_k_of_equals():
    kept = truncate(torch.tensor([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0]]), top_k=2)
    assert kept[0].tolist() == [-torch.inf, 3.0, 2.0, -torch.inf]
    assert int(kept[1].isfinite().sum()) == 2


def test_truncate_keeps_the_fewest_tokens_that_reach_top_p():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    assert truncate(logits, top_p=0.5).isfinite().tolist() == [[False, True, False]]
    assert truncate(logits, top_p=0.6).isfinite().tolist() == [[False, True, True]]
    assert truncate(logits, top_p=0.9).isfinite().tolist() == [[True, True, True]]
    assert truncate(logits, top_p=1e-6).isfinite().tolist() == [[False, True, False]]


def test_truncate_applies_top_p_to_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # among the first two the probabilities are 4/7 and 3/7: the first alone reaches 0.5
    assert truncate(logits, top_k=2, top_p=0.5).isfinite().tolist() == [[True, False, False, False]]
    assert truncate(logits, top_k=2, top_p=0.6).isfinite().tolist() == [[True, True, False, False]]


def test_truncate_without_limits_changes_nothing():
    logits = torch.randn(3, 7)
    assert truncate(logits, top_k=0, top_p=1.0) is logits
    assert truncate(logits, top_k=7) is logits


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 20)
    count = 20_000
    chance = torch.from_numpy(uniforms(seed=3, stage=0, count=count))
    tokens, _ = draw(logits.expand(count, -1), chance)
    expected = logits[0].softmax(-1) * count
    chi_square = float(((tokens.bincount(minlength=20) - expected) ** 2 / expected).sum())
    assert chi_square < 43.8  # 99.9 % point of 19 degrees of freedom


def test_the_logprob_is_that_of_the_drawn_token():
    torch.manual_seed(0)
    logits = torch.randn(5, 9)
    tokens, logprobs = choose(logits, torch.rand(5), temperature=0.7, top_k=4)
    naive = truncate(logits / 0.7, top_k=4).log_softmax(-1)
    torch.testing.assert_close(logprobs, naive[torch.arange(5), tokens])


def test_a_token_of_probability_zero_is_out_of_reach_at_both_ends_of_the_noise():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 1.0 - 2.0**-24]))
    assert tokens.tolist() == [1, 2]
    assert logprobs.isfinite().all()


def test_temperature_zero_and_top_k_one_take_the_largest_with_logprob_zero():
    logits = torch.randn(6, 11)
    for how in ({"temperature": 0.0}, {"top_k": 1}):
        tokens, logprobs = choose(logits, torch.rand(6), **how)
        assert torch.equal(tokens, logits.argmax(-1))
        assert logprobs.tolist() == [0.0] * 6


def test_noise_depends_on_seed_and_stage_alone():
    first = noise([5, 6, -1], stage=0, count=8)
    assert torch.equal(first[1], noise([6], stage=0, count=8)[0])
    assert torch.equal(first[1, :3], noise([6], stage=0, count=3)[0])
    assert not torch.equal(first[1], noise([6], stage=1, count=8)[0])
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert float(first.min()) >= 0.0 and float(first.max()) < 1.0
