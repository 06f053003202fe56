"""Credit computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlpipe.learn.advantage import (
    SPANS,
    assign_credit,
    extend,
    group_advantages,
    reference_items,
    verdict_weights,
)
from rlpipe.learn.loss import TokenTerms, policy_loss, token_terms
from rlpipe.learn.replay import lay_out, segment_logprobs, token_logprobs
from rlpipe.schema import CreditSection
from rlpipe.types import Rollout, SegmentCredit
from tests.learn.builders import item

NAN = float("nan")


def rollouts(policy, verdicts: list[bool], always: bool = False) -> list[Rollout]:
    """One rollout per verdict: a second image after a No, or always."""
    result = []
    for index, yes in enumerate(verdicts):
        example = item(policy, 1 if yes else 0, 2 if yes and not always else 3)
        result.append(Rollout(replace(example.trajectory, id=f"r{index}"), example.images))
    return result


def test_advantages_are_normalised_within_their_group():
    rewards = np.array([1.0, 0.0, 0.5, 0.5, 0.2, 0.8])
    found = group_advantages(rewards, [0, 0, 1, 1, 0, 1], std_eps=0.1)
    first = np.array([1.0, 0.0, 0.2])
    second = np.array([0.5, 0.5, 0.8])
    expected = [(g - g.mean()) / (g.std(ddof=1) + 0.1) for g in (first, second)]
    np.testing.assert_allclose(found[[0, 1, 4]], expected[0])
    np.testing.assert_allclose(found[[2, 3, 5]], expected[1])
    assert found[0] == pytest.approx((1 - 0.4) / (np.sqrt(0.28) + 0.1))


def test_a_missing_score_stays_out_of_the_statistics():
    rewards = np.array([1.0, NAN, 0.0, 0.7, NAN, 0.3, 0.3])
    found = group_advantages(rewards, [0, 0, 0, 1, 1, 2, 2], std_eps=0.0001)
    assert found[0] == pytest.approx(0.5 / (np.sqrt(0.5) + 1e-4)) and found[2] == -found[0]
    assert np.isnan(found[[1, 3, 4]]).all()  # two missing ones, and one with nothing to compare it with
    assert (found[5:] == 0).all()


def test_rewards_of_the_three_spans(tiny_policy):
    scores = [[0.9], [0.3, 0.6], [0.2], [0.4, 0.1]]
    credited = assign_credit(rollouts(tiny_policy, [True, False, True, False]), scores, [0] * 4, CreditSection())
    np.testing.assert_allclose(credited.rewards["first"], [0.9, 0.3, 0.2, 0.4])
    np.testing.assert_allclose(credited.rewards["reflection"], [0.9, 0.7, 0.2, 0.6])
    np.testing.assert_allclose(credited.rewards["final"], [0.9, 0.6, 0.2, 0.1])
    assert credited.batch.denominator == 12.0
    assert credited.metrics["reward/final/mean"] == pytest.approx(0.45)
    assert credited.metrics["failures/scores"] == 0


def test_v1_merges_an_accepted_image_and_v3_credits_the_second(tiny_policy):
    scores = [[0.9], [0.3, 0.6]]
    references = [(np.zeros(1),) * 3] * 2
    credited = assign_credit(
        rollouts(tiny_policy, [True, False]), scores, [0, 0], CreditSection(final_weight=0.5), references
    )
    a = {name: credited.advantages[name] for name in SPANS}
    yes, no = (example.credits for example in credited.batch.items)
    assert yes[0] == SegmentCredit(pytest.approx(a["first"][0] + 0.5 * a["final"][0]), 1.5)
    assert yes[1] == SegmentCredit(pytest.approx(a["reflection"][0]), 1.0)
    assert [c.advantage for c in no] == pytest.approx(
        [a[n][1] for n in ("first", "reflection")] + [0.5 * a["final"][1]]
    )
    assert [c.kl for c in no] == [1.0, 1.0, 0.5]

    always = rollouts(tiny_policy, [True, False], always=True)
    credited = assign_credit(always, [[0.9, 0.1], [0.3, 0.6]], [0, 0], CreditSection(rule="v3"))
    np.testing.assert_allclose(credited.rewards["final"], [0.1, 0.6])
    assert credited.batch.items[0].credits[2].advantage == pytest.approx(credited.advantages["final"][0])
    assert all(c.kl == 0 for example in credited.batch.items for c in example.credits)  # no references
    with pytest.raises(ValueError, match="r0: credit.rule v3.*rollout.redraw=always"):
        assign_credit(rollouts(tiny_policy, [True]), [[0.9]], [0], CreditSection(rule="v3"))


def test_v2_teacher_forces_the_accepted_image_behind_the_redraw_context(tiny_policy):
    section = CreditSection(rule="v2")
    extended = extend(rollouts(tiny_policy, [True, False]), "v2")
    yes, no = (r.trajectory for r in extended)
    assert [len(t.segments) for t in (yes, no)] == [3, 3]
    np.testing.assert_array_equal(yes.segments[2].token_ids, yes.segments[0].token_ids)
    assert yes.segments[2].logprobs is None
    references = segment_logprobs(tiny_policy, reference_items(extended))
    credited = assign_credit(extended, [[0.9], [0.3, 0.6]], [0, 0], section, references)
    np.testing.assert_allclose(credited.rewards["final"], [0.9, 0.6])
    credits = credited.batch.items[0].credits
    assert credits[0].advantage == pytest.approx(credited.advantages["first"][0])
    assert credits[2].advantage == pytest.approx(credited.advantages["final"][0])
    # The forced tokens have no behaviour log-probs: ratio 1, and their log-prob's gradient.
    replay = lay_out(credited.batch.items, tiny_policy.templates)
    logprobs = token_logprobs(tiny_policy, replay).logprobs
    terms = token_terms(credited.batch.items, replay)
    loss, _ = policy_loss(logprobs, terms, credited.batch.denominator, kl_beta=0.0)
    assert loss.item() == pytest.approx(-(terms.advantage.sum() / 6).item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, -terms.advantage / 6)


def test_a_missing_score_takes_its_spans_credit_and_kl_away(tiny_policy):
    scores = [[None], [0.3, None], [0.5, 0.9], [0.2, 0.4]]
    references = [(np.zeros(1),) * 3] * 4
    credited = assign_credit(
        rollouts(tiny_policy, [True, False, False, False]), scores, [0] * 4, CreditSection(), references
    )
    first, second, third, _ = (example.credits for example in credited.batch.items)
    assert not any(c.trained for c in first)
    assert [c.trained for c in second] == [True, True, False]
    assert [c.kl for c in third] == [1.0, 1.0, 1.0]
    assert credited.metrics["failures/scores"] == 2 and credited.metrics["failures/groups"] == 0
    lost = assign_credit(rollouts(tiny_policy, [True, True]), [[None], [None]], [7, 7], CreditSection())
    assert lost.metrics["failures/groups"] == 1 and "reward/first/mean" not in lost.metrics


def test_v1_merged_is_both_spans_apart_at_ratio_one():
    """An accepted image with A0 + A2 and twice the KL, against the same tokens written down twice."""
    rng = torch.Generator().manual_seed(0)
    logprobs, reference = (torch.randn(36, generator=rng) for _ in range(2))
    none = torch.zeros(36)

    def gradient(advantages, kls):
        current = logprobs.clone().requires_grad_()
        loss = torch.zeros(())
        for advantage, kl in zip(advantages, kls, strict=True):
            terms = TokenTerms(logprobs, reference, none + advantage / 36, none + kl / 36, none, none.bool())
            loss = loss + policy_loss(current, terms, 3.0)[0]
        return loss.item(), torch.autograd.grad(loss, current)[0]

    merged, apart = gradient([0.7 - 1.9], [2.0]), gradient([0.7, -1.9], [1.0, 1.0])
    assert merged[0] == pytest.approx(apart[0], rel=1e-5)
    torch.testing.assert_close(merged[1], apart[1])


def test_reference_items_ask_for_every_segment(tiny_policy):
    drawn = rollouts(tiny_policy, [True, False])
    found = segment_logprobs(tiny_policy, reference_items(drawn))
    assert [[len(v) for v in row] for row in found] == [[len(s) for s in r.trajectory.segments] for r in drawn]
    assert all(np.isfinite(values).all() for row in found for values in row)


def test_balanced_verdicts_give_both_classes_the_same_weight() -> None:
    probabilities = np.array([1.0, 1.0, 1.0, 0.0])
    weights = verdict_weights(probabilities)
    assert weights[:3].sum() == pytest.approx(weights[3])
    assert weights.mean() == pytest.approx(1.0)


def test_a_missing_score_has_no_verdict_weight_and_leaves_the_shares_alone() -> None:
    weights = verdict_weights(np.array([1.0, np.nan, 0.0]))
    assert np.isnan(weights[1])
    assert weights[[0, 2]].tolist() == pytest.approx([1.0, 1.0])
