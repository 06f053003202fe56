"""The official five row-forwards against the learner's own way: the same numbers by another road."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_rows import reference_loss
from trajectories import SPANS, examples

from rlpipe.learn.loss import policy_loss, token_terms
from rlpipe.learn.replay import ReplayOptions, lay_out, segment_logprobs, token_logprobs

OPTIONS = {
    "live": ReplayOptions(),
    "official": ReplayOptions(logits="scaled", verdict="full", train_eos=False, context="constant"),
}


@pytest.fixture
def policy(tiny_policy):
    before = {name: parameter.requires_grad for name, parameter in tiny_policy.named_parameters()}
    tiny_policy.set_trainable(["language_model", "aligner", "generation_aligner", "generation_head", "lm_head"])
    yield tiny_policy
    tiny_policy.zero_grad()
    for name, parameter in tiny_policy.named_parameters():  # other tests share the policy
        parameter.requires_grad_(before[name])


@pytest.mark.parametrize("reencoded", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_rows_and_replay_have_the_same_logprobs_loss_and_gradients(policy, name, reencoded):
    options = OPTIONS[name]
    batch = examples(policy, 4, words=9, reencoded=reencoded, options=options)
    items, denominator = [example.item for example in batch], SPANS * len(batch)

    loss, spans = reference_loss(policy, batch, options, kl_beta=0.04, denominator=denominator)
    loss.backward()
    reference = {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad and p.grad is not None}
    policy.zero_grad()

    replay = lay_out(items, policy.templates, options)
    logprobs = token_logprobs(policy, replay).logprobs
    own, _ = policy_loss(logprobs, token_terms(items, replay), denominator, kl_beta=0.04)
    own.backward()

    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    known = segment_logprobs(policy, items, options)
    for example, by_segment, by_span in zip(batch, known, zip(*spans, strict=True), strict=True):
        for segment, values in zip((0, 1, example.final), by_span, strict=True):
            np.testing.assert_allclose(values.detach().numpy(), by_segment[segment][: len(values)], atol=2e-5)
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert len(reference) > 20 and not reference.keys() - gradients.keys()
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    for parameter, gradient in gradients.items():
        # an embedding of constants alone has gradient zero on one way and none on the other
        other = reference.get(parameter, torch.zeros_like(gradient))
        assert (gradient - other).norm() <= 1e-5 * whole, parameter


def test_every_second_example_says_no_and_draws_again(policy):
    batch = examples(policy, 4, words=9)
    assert [len(example.item.trajectory.segments) for example in batch] == [3, 2, 3, 2]
    assert [example.said_yes for example in batch] == [False, True, False, True]
