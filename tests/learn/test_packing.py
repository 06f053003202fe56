"""Sequences in one row: what each sees, what is computed, and how work is divided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils import get_total_norm

from rlpipe.learn.advantage import assign_credit, extend
from rlpipe.learn.layout import lay_out, num_tokens
from rlpipe.learn.learner import Learner
from rlpipe.learn.packing import balance, micro_batches, rough_tokens
from rlpipe.learn.replay import ReplayOptions, segment_logprobs, token_logprobs
from rlpipe.policy.attention import Sequences, no_mask
from rlpipe.policy.janus import JanusPolicy
from rlpipe.schema import CreditSection
from rlpipe.types import Rollout, Sampling, SegmentCredit
from roles.work import outline
from tests.learn.builders import config, item, with_logprobs

GUIDED = Sampling(guidance=2.0)


def attended(policy: JanusPolicy, lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings [1, T, D] and positions [1, T] with a hole in each sequence."""
    embeddings = torch.randn(1, sum(lengths), 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    positions = [torch.arange(length) + 5 * (torch.arange(length) >= length // 2) for length in lengths]
    return embeddings, torch.cat(positions)[None]


@pytest.mark.parametrize("lengths", [(40, 40, 33, 7, 7, 7, 1), (12,), (3, 9, 3)])
def test_a_sequence_in_a_row_has_the_states_and_gradients_that_it_has_alone(tiny_policy, lengths):
    embeddings, positions = attended(tiny_policy, lengths)
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    packed = tiny_policy.hidden(embeddings, positions, lengths)
    (gradient,) = torch.autograd.grad((packed * weights).sum(), embeddings)
    parts = [tensor.split(lengths, dim=1) for tensor in (embeddings, positions, packed, gradient, weights)]
    for inputs, places, states, found, weight in zip(*parts, strict=True):
        own = inputs.detach().requires_grad_()
        alone = tiny_policy.hidden(own, places)
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=0)
        (expected,) = torch.autograd.grad((alone * weight).sum(), own)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_plain_call_of_the_language_model_is_what_it_was(tiny_policy):
    model = tiny_policy.part("language_model")
    embeddings, positions = attended(tiny_policy, (9, 9))
    rows = embeddings.reshape(2, 9, 64), torch.arange(9).expand(2, 9)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])  # padded on the left
    padded = model(inputs_embeds=rows[0], position_ids=rows[1], attention_mask=mask, use_cache=False)
    model.set_attn_implementation("sdpa")
    try:
        expected = model(inputs_embeds=rows[0], position_ids=rows[1], attention_mask=mask, use_cache=False)
        with pytest.raises(RuntimeError):  # and not, in silence, attention to everything
            model(inputs_embeds=rows[0], position_ids=rows[1], attention_mask=no_mask(embeddings), use_cache=False)
    finally:
        model.set_attn_implementation("packed")
    assert torch.equal(padded.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_packed_log_probs_are_those_of_single_trajectories(tiny_policy):
    items = [item(tiny_policy, i, 1 + i % 3, GUIDED, reencoded=i % 4 == 2) for i in range(9)]
    alone = segment_logprobs(tiny_policy, items, micro_batch=1)
    for settings in ({"micro_batch": 64}, {"token_budget": 500}, {"token_budget": 1}, {"head_chunk": 7}):
        for one, other in zip(segment_logprobs(tiny_policy, items, **settings), alone, strict=True):
            for values, expected in zip(one, other, strict=True):
                np.testing.assert_allclose(values, expected, atol=1e-5, rtol=0)


def test_an_image_is_computed_once_whatever_it_is_credited_for(tiny_policy):
    """Credit v1: image 1 of a "Yes" is rewarded twice, that of a "No" stands in front of image 2."""
    items = [item(tiny_policy, i, 2 if i % 3 == 1 else 3, replace(GUIDED, seed=i)) for i in range(6)]
    rollouts = [Rollout(example.trajectory, example.images) for example in items]
    scores = [[0.1 * i + 0.3 * number for number in range(len(r.trajectory.images))] for i, r in enumerate(rollouts)]
    credited = assign_credit(extend(rollouts, "v1"), scores, [0] * 6, CreditSection(rule="v1"))
    items = [replace(c, images=r.images) for c, r in zip(credited.batch.items, rollouts, strict=True)]
    assert {len(i.trajectory.segments) for i in items if i.trajectory.verdicts[0]} == {2}
    t, seen = tiny_policy.templates, []
    hook = tiny_policy.part("language_model").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    try:
        replay = lay_out(items, t)
        token_logprobs(tiny_policy, replay)
    finally:
        hook.remove()
    expected = 0
    for example in items:
        trajectory = example.trajectory
        prompt = len(t.prompt(trajectory.prompt.text))
        said = len(trajectory.segments[1])
        redrawn = 0 if trajectory.verdicts[0] else len(t.look) + said - 1 + len(t.redraw) + 36
        drawing = prompt + 35 + redrawn  # nothing is read behind the last token
        looking = prompt + 36 + len(t.look) + said - 1
        expected += 2 * drawing + looking
    assert seen == [expected] == [replay.num_tokens] == [sum(num_tokens(i, t) for i in items)]
    assert len(replay) == sum(len(s) for i in items for s in i.trajectory.segments)
    assert len(replay.images) == 6 and len(replay.codes) == len(replay.codes.unique())


@torch.no_grad()
def test_a_trajectory_is_blind_to_its_neighbours(tiny_policy):
    items = [item(tiny_policy, i, 3, GUIDED) for i in range(4)]
    other = item(tiny_policy, 7, 3, GUIDED)  # as long as number 1: a caption and an answer of the same words
    before = segment_logprobs(tiny_policy, items)
    after = segment_logprobs(tiny_policy, [items[0], other, *items[2:]])
    for number in (0, 2, 3):
        for one, two in zip(before[number], after[number], strict=True):
            np.testing.assert_array_equal(one, two)
    assert np.abs(before[1][0] - after[1][0]).max() > 1e-3


def gradients(path, items, **settings) -> tuple[float, float]:
    """Loss and gradient norm of a step over the items, before the step."""
    learner = Learner(config(path, **settings))
    stats = learner._accumulate(items, 27.0, True, 0.04)
    grads = [parameter.grad for parameter in learner.parameters.values() if parameter.grad is not None]
    return stats.values()["loss/total"], get_total_norm(grads).item()


def test_neither_packing_nor_chunks_nor_micro_batches_change_loss_and_gradient(tiny_policy, tiny_policy_path):
    items = [item(tiny_policy, i, 1 + i % 3, GUIDED) for i in range(9)]
    items = with_logprobs(tiny_policy, items)
    # A sum of few signs: a relative bound means something.
    items = [replace(i, credits=tuple(SegmentCredit(0.5 + abs(c.advantage), 1.0) for c in i.credits)) for i in items]
    expected = gradients(tiny_policy_path, items, micro_batch=64)
    cases = [{"micro_batch": 3}, {"micro_batch": 1}, {"token_budget": 400}, {"token_budget": 800, "head_chunk": 50}]
    cases.append({"token_budget": 800, "head_chunk": 50, "activation_checkpointing": "full"})
    for case in cases:
        loss, norm = gradients(tiny_policy_path, items, **case)
        assert loss == pytest.approx(expected[0], rel=1e-6), case
        assert norm == pytest.approx(expected[1], rel=1e-5), case


def test_adapters_in_bfloat16_pack_too(tiny_policy, tiny_policy_path):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 1 + i % 3, GUIDED) for i in range(5)])
    metrics = []
    for budget in (None, 350):
        settings = config(tiny_policy_path, token_budget=budget, micro_batch=1, activation_checkpointing="full")
        settings.policy.dtype, settings.policy.lora.rank = "bfloat16", 4
        metrics.append(Learner(settings).step(items, 15.0, 0, 10))
    assert metrics[1] == pytest.approx(metrics[0], abs=2e-2, rel=2e-2)


@pytest.mark.parametrize("options", [ReplayOptions(), ReplayOptions(train_eos=False, context="constant")])
def test_the_tokens_of_a_trajectory_can_be_told_alone(tiny_policy, options):
    items = [item(tiny_policy, i, 1 + i % 3, GUIDED) for i in range(6)]
    replay = lay_out(items, tiny_policy.templates, options)
    assert replay.num_tokens == sum(num_tokens(i, tiny_policy.templates, options) for i in items)
    assert replay.lengths == tuple(sorted(replay.lengths, reverse=True)) and sum(replay.lengths) == replay.num_tokens


def test_balanced_parts_hold_everything_once_and_nearly_equal_sums():
    sizes = np.random.default_rng(0).integers(600, 3500, 128).tolist()
    for parts in (1, 2, 3, 8):
        members = balance(sizes, parts)
        assert sorted(i for m in members for i in m) == list(range(128)) and members == balance(list(sizes), parts)
        sums = [sum(sizes[i] for i in m) for m in members]
        assert max(sums) <= 1.02 * sum(sizes) / parts
    assert balance([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]  # 8 and 10, where 9 and 9 would be best
    assert balance([7], 3) == [[0], [], []] and balance([], 2) == [[], []]
    assert [len(m) for m in balance([9, 1, 1, 1, 1], 2, most=3)] == [2, 3]
    with pytest.raises(ValueError, match="5 sizes do not fit into 2 parts of at most 2"):
        balance([1] * 5, 2, most=2)


@pytest.mark.parametrize("context", ["sampled", "reencoded"])
@pytest.mark.parametrize("history", ["last", "all"])
def test_ranks_get_nearly_equal_shares_of_what_the_driver_can_only_guess(tiny_policy, history, context):
    sampling = replace(GUIDED, history=history, redraw_context=context)
    items = [item(tiny_policy, i, 1 + i * 7 // 4 % 3, sampling, reencoded=context == "reencoded") for i in range(64)]
    seen = [replace(i, images=(), trajectory=outline(Rollout(i.trajectory, ())).trajectory) for i in items]
    parts = balance([rough_tokens(i, ReplayOptions()) for i in seen], 4)
    exact = [num_tokens(i, tiny_policy.templates) for i in items]
    shares = [sum(exact[i] for i in part) for part in parts]
    assert max(shares) < 1.05 * min(shares)


def test_micro_batches_keep_to_their_bounds():
    sizes = np.random.default_rng(1).integers(600, 3500, 40).tolist()
    assert {len(m) for m in micro_batches(sizes, 8)} == {8}
    for budget in (4000, 16384, 10**6):
        batches = micro_batches(sizes, 8, budget)
        assert sorted(i for m in batches for i in m) == list(range(40))
        assert all(sum(sizes[i] for i in m) <= budget for m in batches)
        assert len(batches) <= 1.35 * sum(sizes) / budget + 1
    assert sorted(micro_batches([900, 100, 100], 8, 200)) == [[0], [1, 2]]  # what is too long goes alone
    assert micro_batches([1, 1], 8, 100, least=3) == [[0], [1], []] and micro_batches([1], 8, least=2) == [[0], []]
    assert micro_batches([], 8) == micro_batches([], 8, 100) == []
    assert micro_batches([0, 0, 0], 8, 100) == [[0, 1, 2]]  # nothing to train


def test_runs_of_one_length_and_borders():
    sequences = Sequences([7, 7, 3])
    assert sequences.runs == [(7, 2), (3, 1)] and sequences.longest == 7
    assert sequences.borders(torch.device("cpu")).tolist() == [0, 7, 14, 17]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_flash_attention_of_a_row_is_that_of_its_sequences(heads):
    from rlpipe.policy.attention import packed_attention

    lengths, width, module = (130, 130, 64, 1), 128, torch.nn.Module()
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(1, count, sum(lengths), width, device="cuda", generator=generator, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        row = (x.to(dtype) for x in (query, key, value))
        mixed, _ = packed_attention(module, *row, None, width**-0.5, sequences=Sequences(lengths))
        results.append([mixed.float(), *torch.autograd.grad(mixed.float().square().sum(), (query, key, value))])
    for exact, flash in zip(*results, strict=True):
        torch.testing.assert_close(flash, exact, atol=5e-2, rtol=5e-2)
