"""The loss computed by hand, and its independence of how a batch is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlpipe.learn.loss import TokenTerms, policy_loss, token_terms
from rlpipe.learn.replay import ReplayOptions, lay_out, token_logprobs
from rlpipe.learn.stats import Stats
from rlpipe.types import Sampling, SegmentCredit
from tests.learn.builders import item, with_logprobs

NAN = float("nan")


def terms_of(**columns) -> TokenTerms:
    """Token terms with zeros where nothing is given."""
    size = len(next(iter(columns.values())))
    none = {"behaviour": [NAN] * size, "reference": [NAN] * size}
    zeros = {name: [0.0] * size for name in ("advantage", "kl", "ce", "entropy")}
    known = {**none, **zeros, "segment": [0] * size, "sequence": [0] * size, **columns}
    image = torch.tensor(known.pop("image", [True] * size))
    return TokenTerms(image=image, **{name: torch.tensor(values) for name, values in known.items()})


def test_the_ratio_is_clipped_on_the_side_that_gains():
    ratios, advantages = [1.5, 1.5, 0.5, 0.5, 1.1], [1.0, -1.0, 1.0, -1.0, 2.0]
    current = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    loss, stats = policy_loss(current, terms_of(behaviour=[0.0] * 5, advantage=advantages), 2.0, clip=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 2)
    loss.backward()
    torch.testing.assert_close(current.grad, -torch.tensor([0.0, -1.5, 0.5, 0.0, 2.2]) / 2)
    values = stats.values()
    assert values["loss/clip_fraction"] == pytest.approx(2 / 5)
    assert values["loss/ratio_mean"] == pytest.approx(sum(ratios) / 5)
    assert values["loss/ratio_max"] == pytest.approx(1.5)


def test_at_ratio_one_clipping_changes_nothing_and_off_it_lets_every_ratio_count():
    advantages, on_policy = [1.0, -2.0, 0.5], [-1.0, -2.0, -3.0]

    def run(behaviour, clip):
        current = torch.tensor(on_policy, requires_grad=True)
        loss, stats = policy_loss(current, terms_of(behaviour=behaviour, advantage=advantages), 2.0, clip=clip)
        return loss.item(), torch.autograd.grad(loss, current)[0].tolist(), stats.values()

    clipped, free = run(on_policy, 0.2), run(on_policy, None)
    assert clipped[:2] == free[:2]
    assert free[0] == pytest.approx(-(1.0 - 2.0 + 0.5) / 2) and free[1] == pytest.approx([-0.5, 1.0, -0.25])
    assert clipped[2]["loss/clip_fraction"] == 0 and "loss/clip_fraction" not in free[2]
    ratios = [1.5, 0.5, 3.0]
    moved = [lp - math.log(r) for lp, r in zip(on_policy, ratios, strict=True)]
    loss, gradient, _ = run(moved, None)
    assert loss == pytest.approx(-(1.5 - 1.0 + 1.5) / 2)
    assert gradient == pytest.approx([-0.75, 0.5, -0.75])


def test_an_end_of_sentence_out_of_the_loss_leaves_the_mean_over_the_other_tokens(tiny_policy):
    example = with_logprobs(tiny_policy, [item(tiny_policy, 0, 2)])[0]
    length = len(example.trajectory.segments[1])
    for train_eos, count in ((True, length), (False, length - 1)):
        replay = lay_out([example], tiny_policy.templates, ReplayOptions(train_eos=train_eos))
        terms = token_terms([example], replay)
        of_text = ~terms.image
        assert of_text.sum() == count and (length - 1 in replay.offset[of_text]) == train_eos
        shares = torch.full((count,), example.credits[1].advantage / count)
        torch.testing.assert_close(terms.advantage[of_text], shares)


def test_kl_is_k3_and_its_gradient_points_to_the_reference():
    current = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, stats = policy_loss(current, terms_of(reference=[-1.5, -1.0], kl=[0.5, 1.0]), 4.0, kl_beta=0.1)
    k3 = [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1]
    assert loss.item() == pytest.approx(0.1 * (0.5 * k3[0] + k3[1]) / 4)
    assert stats.values()["kl/image"] == pytest.approx(sum(k3) / 2)
    loss.backward()
    expected = 0.1 / 4 * torch.tensor([0.5 * (1 - math.exp(-0.5)), 1 - math.exp(1.0)])
    torch.testing.assert_close(current.grad, expected)


def test_cross_entropy_of_a_reflection_weighs_the_verdict(tiny_policy):
    example = item(tiny_policy, 0, 2, credits=(SegmentCredit(), SegmentCredit(ce=1.0)))
    replay = lay_out([example], tiny_policy.templates)
    terms = token_terms([example], replay, verdict_ce_share=0.8)
    verdict = replay.offset == 0
    assert terms.ce[verdict].item() == pytest.approx(0.8)
    others = len(replay) - 1
    np.testing.assert_allclose(terms.ce[~verdict], 0.2 / others, rtol=1e-5)
    logprobs = -torch.arange(1.0, len(replay) + 1)
    loss, _ = policy_loss(logprobs, terms, 2.0)
    expected = -(0.8 * logprobs[verdict] + 0.2 * logprobs[~verdict].mean()) / 2
    assert loss.item() == pytest.approx(expected.item())


def test_mismatch_is_measured_on_fresh_samples_alone():
    terms = terms_of(behaviour=[-1.0, -2.0, NAN], advantage=[1.0, 1.0, 1.0], image=[True, False, True])
    current = torch.tensor([-1.25, -2.5, -3.0])
    values = policy_loss(current, terms, 1.0)[1].values()
    assert values["mismatch/max_abs"] == pytest.approx(0.5)
    assert values["mismatch/mean_abs"] == pytest.approx(0.375)
    assert values["mismatch/image/max_abs"] == pytest.approx(0.25)
    stale = policy_loss(current, terms, 1.0, fresh=False)[1].values()
    assert not any(name.startswith("mismatch") for name in stale)
    mixed = policy_loss(current, terms, 1.0, fresh=torch.tensor([True, False, True]))[1].values()
    assert mixed["mismatch/max_abs"] == mixed["mismatch/image/max_abs"] == pytest.approx(0.25)
    assert "mismatch/text/max_abs" not in mixed


@pytest.mark.parametrize("cuts", [(2, 4), (1, 5)])
def test_micro_batches_add_up_to_the_whole_batch(tiny_policy, cuts):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 2 + i % 2) for i in range(6)])

    def run(chunks):
        tiny_policy.zero_grad()
        stats, total = Stats(), 0.0
        for chunk in chunks:
            replay = lay_out(chunk, tiny_policy.templates)
            logprobs = token_logprobs(tiny_policy, replay).logprobs
            loss, micro = policy_loss(logprobs, token_terms(chunk, replay), 18.0)
            loss.backward()
            total += loss.item()
            stats.merge([micro])
        gradients = {n: p.grad.clone() for n, p in tiny_policy.named_parameters() if p.grad is not None}
        return total, gradients, stats.values()

    whole = run([items])
    parts = run([items[: cuts[0]], items[cuts[0] : cuts[1]], items[cuts[1] :]])
    tiny_policy.zero_grad()
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    assert parts[2] == pytest.approx(whole[2], abs=1e-5)
    assert parts[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_kl_weight_without_reference_is_named(tiny_policy):
    example = item(tiny_policy, 0, 1, credits=(SegmentCredit(kl=1.0),))
    with pytest.raises(ValueError, match="t0: segment 0 has a KL weight"):
        token_terms([example], lay_out([example], tiny_policy.templates))


@pytest.mark.parametrize(
    ("options", "unknown"),
    [
        (ReplayOptions(), []),
        (ReplayOptions(logits="scaled"), ["image"]),
        (ReplayOptions(logits="conditional"), ["image"]),
        (ReplayOptions(verdict="full"), ["verdict"]),
    ],
)
def test_tokens_scored_otherwise_than_they_were_drawn_have_ratio_one_and_no_mismatch(tiny_policy, options, unknown):
    examples = [item(tiny_policy, sampling=Sampling(guidance=3.0))]
    sampled = with_logprobs(tiny_policy, examples, noise=0.5)
    replay = lay_out(sampled, tiny_policy.templates, options)
    terms = token_terms(sampled, replay)
    verdict = ~terms.image & (replay.offset == 0)
    expected = {"image": terms.image, "verdict": verdict}
    missing = torch.zeros_like(terms.image)
    for name in unknown:
        missing |= expected[name]
    assert torch.equal(terms.behaviour.isnan(), missing)
    logprobs = torch.where(missing, torch.tensor(-50.0), terms.behaviour)
    _, stats = policy_loss(logprobs, terms, 3.0)
    assert stats.values()["loss/ratio_max"] == pytest.approx(1.0)
    assert stats.values()["mismatch/max_abs"] == 0.0
