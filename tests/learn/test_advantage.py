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
    reference_items,
)
from rlpipe.learn.group import group_advantages, verdict_weights
from rlpipe.learn.loss import TokenTerms, policy_loss, token_terms
from rlpipe.learn.replay import lay_out, segment_logprobs, token_logprobs
from rlpipe.schema import CreditSection
from rlpipe.types import Prompt, Rollout, Sampling, Segment, SegmentCredit, Trajectory
from tests.learn.builders import item, with_logprobs

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
    assert credited.metrics["credit/images_without_reward"] == 0


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
    assert (
        credited.metrics["credit/images_without_reward"] == 2
        and credited.metrics["credit/groups_without_comparison"] == 0
    )
    lost = assign_credit(rollouts(tiny_policy, [True, True]), [[None], [None]], [7, 7], CreditSection())
    assert lost.metrics["credit/groups_without_comparison"] == 1 and "reward/first/mean" not in lost.metrics


def test_v1_merged_is_both_spans_apart_at_ratio_one():
    """An accepted image with A0 + A2 and twice the KL, against the same tokens written down twice."""
    rng = torch.Generator().manual_seed(0)
    logprobs, reference = (torch.randn(36, generator=rng) for _ in range(2))
    none = torch.zeros(36)

    def gradient(advantages, kls):
        current = logprobs.clone().requires_grad_()
        loss = torch.zeros(())
        for advantage, kl in zip(advantages, kls, strict=True):
            weights = (none + advantage / 36, none + kl / 36, none, none)
            terms = TokenTerms(logprobs, reference, *weights, none.bool(), none.long(), none.long())
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


GOLDEN_REWARDS = (
    [0.3993, 0.7174, 0.2808, 0.0827, 0.9698, 0.5639, 0.6443, 0.5769],
    [0.4754, 0.1224, 0.3136, 0.7362, 0.9074, 0.8886, 0.9483, 0.0254],
)
"""Scores of first and second images of a group of eight; the verdicts below are what was said of the first."""
GOLDEN_YES = [False, False, True, True, True, True, False, True]
GOLDEN_ADVANTAGES = {
    "first": [-0.47519484, 0.68678862, -0.90806192, -1.63169897, 1.60877728, 0.12607034, 0.41976243, 0.17355792],
    "reflection": [0.50046289, -0.66528344, -0.67187995, -1.39786017, 1.85310960, 0.36560127, -0.39739260, 0.41324261],
    "accepted": [-0.08036352, -1.12620151, -0.65690756, -1.24382114, 1.38440204, 0.18183661, 1.32070374, 0.22035192],
    "second": [-0.20775089, -1.16311443, -0.64564836, 0.49808136, 0.96141922, 0.91053861, 1.07211149, -1.42563641],
}
"""What the official code makes of them, in float32."""


@pytest.mark.parametrize(("rule", "final"), [("v1", "accepted"), ("v2", "accepted"), ("v3", "second")])
def test_advantages_are_the_official_code_s(tiny_policy, rule, final):
    drawn = extend(rollouts(tiny_policy, GOLDEN_YES, always=True), rule)
    scores = list(zip(*GOLDEN_REWARDS, strict=True))  # a score that a rule does not need is not looked at
    credited = assign_credit(drawn, scores, [0] * 8, CreditSection(rule=rule))
    for name, expected in (("first", "first"), ("reflection", "reflection"), ("final", final)):
        np.testing.assert_allclose(credited.advantages[name], GOLDEN_ADVANTAGES[expected], atol=1e-6)


def test_an_image_drawn_after_a_yes_is_left_out_where_the_rule_ends_with_the_accepted_one(tiny_policy):
    def seen(rule: str) -> list[tuple[list[str], int]]:
        drawn = [replace(r, images=r.images * 2) for r in rollouts(tiny_policy, [True, False], always=True)]
        return [([s.kind for s in r.trajectory.segments], len(r.images)) for r in extend(drawn, rule)]

    whole = (["image", "text", "image"], 2)
    assert seen("v1") == seen("summed") == [(["image", "text"], 1), whole]
    assert seen("v2") == [(["image", "text", "image"], 1), whole]
    assert seen("v3") == seen("segments") == [whole, whole]
    forced = extend(rollouts(tiny_policy, [True], always=True), "v2")[0].trajectory
    np.testing.assert_array_equal(forced.segments[2].token_ids, forced.segments[0].token_ids)


def trajectory_of(*lengths: int, verdicts: tuple[bool, ...], rounds: int = 3, name: str = "t") -> Rollout:
    """Segments of the given lengths, images and reflections in turn."""
    kinds = ["image", "text"] * len(lengths)
    segments = tuple(Segment(kind, np.zeros(n, np.int64)) for kind, n in zip(kinds, lengths, strict=False))
    cut = tuple(False for _ in verdicts)
    sampling = Sampling(max_images=rounds)
    return Rollout(Trajectory(name, Prompt("p", "a star"), segments, sampling, 0, verdicts, cut), ())


def three_rounds() -> tuple[list[Rollout], list[list[float]]]:
    """T = 3: accepted at once, accepted at the second image, three images of which the last is not looked at."""
    drawn = [
        trajectory_of(16, 4, verdicts=(True,), name="one"),
        trajectory_of(16, 6, 16, 4, verdicts=(False, True), name="two"),
        trajectory_of(16, 6, 16, 8, 16, verdicts=(False, False), name="three"),
    ]
    return drawn, [[0.9], [0.2, 0.8], [0.1, 0.4, 0.5]]


def test_the_paper_s_reward_counts_the_last_image_for_the_rounds_it_saved():
    drawn, scores = three_rounds()
    rewards = assign_credit(drawn, scores, [0, 0, 0], CreditSection(rule="summed")).rewards
    # R_gen = sum of the images before, plus the last one T - K + 1 times.
    np.testing.assert_allclose(rewards["generation"], [3 * 0.9, 0.2 + 2 * 0.8, 0.1 + 0.4 + 0.5])
    # R_comp = T / n times the sum over the n reflections.
    np.testing.assert_allclose(rewards["comprehension"], [3 * 0.9, 3 / 2 * (0.8 + 0.8), 3 / 2 * (0.9 + 0.6)])
    np.testing.assert_allclose(rewards["trajectory"], [5.4, 4.2, 3.25])


def test_summed_credit_is_one_advantage_and_a_mean_over_the_trajectory_s_tokens():
    drawn, scores = three_rounds()
    references = [(np.zeros(1),) * 5] * 3
    credited = assign_credit(drawn, scores, [0, 0, 0], CreditSection(rule="summed"), references, train_eos=False)
    rewards = np.array([5.4, 4.2, 3.25])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(credited.advantages["trajectory"], expected)
    assert credited.batch.denominator == 3
    # Without their end-of-sentence, reflections have one token less in the loss.
    counts = [[16, 3], [16, 5, 16, 3], [16, 5, 16, 7, 16]]
    for example, advantage, row in zip(credited.batch.items, expected, counts, strict=True):
        shares = np.array(row) / sum(row)
        np.testing.assert_allclose([c.advantage for c in example.credits], advantage * shares)
        np.testing.assert_allclose([c.kl for c in example.credits], shares)


def test_the_loss_of_a_summed_trajectory_is_the_mean_over_its_tokens(tiny_policy):
    example = with_logprobs(tiny_policy, [item(tiny_policy, 0)])[0]
    drawn = replace(example.trajectory, truncated=(False,), sampling=Sampling(max_images=2))
    pair = [Rollout(replace(drawn, id=name), example.images) for name in ("a", "b")]
    credited = assign_credit(pair, [[0.2, 0.9], [0.4, 0.3]], [0, 0], CreditSection(rule="summed"))
    replay = lay_out(credited.batch.items, tiny_policy.templates)
    terms = token_terms(credited.batch.items, replay)
    logprobs = terms.behaviour.clone().requires_grad_()  # ratio 1
    (gradient,) = torch.autograd.grad(policy_loss(logprobs, terms, credited.batch.denominator)[0], logprobs)
    advantages = torch.tensor(credited.advantages["trajectory"])[replay.item]
    torch.testing.assert_close(gradient.double(), -advantages / (len(replay) / 2) / 2, atol=1e-7, rtol=1e-4)


def test_segments_are_compared_with_those_at_the_same_place():
    drawn, scores = three_rounds()
    section = CreditSection(rule="segments", reflection_weight=0.5)
    credited = assign_credit(drawn, scores, [0, 0, 0], section, [(np.zeros(1),) * 5] * 3)
    one, two, three = (example.credits for example in credited.batch.items)
    first = group_advantages(np.array([0.9, 0.2, 0.1]), [0] * 3)
    said = group_advantages(np.array([0.9, 0.8, 0.9]), [0] * 3)
    second = group_advantages(np.array([0.8, 0.4]), [0] * 2)
    again = group_advantages(np.array([0.8, 0.6]), [0] * 2)
    assert [c.advantage for c in one] == pytest.approx([first[0] / 2, 0.5 * said[0] / 2])
    assert [c.advantage for c in two] == pytest.approx(
        [first[1] / 4, 0.5 * said[1] / 4, second[0] / 4, 0.5 * again[0] / 4]
    )
    # Nobody else has a third image: nothing to compare it with, no advantage and no KL.
    assert [c.advantage for c in three] == pytest.approx(
        [first[2] / 5, 0.5 * said[2] / 5, second[1] / 5, 0.5 * again[1] / 5, 0.0]
    )
    assert [c.kl for c in three] == pytest.approx([0.2, 0.1, 0.2, 0.1, 0.0])
    assert credited.batch.denominator == 3
    assert credited.rewards["trajectory"][1] == pytest.approx((0.2 + 0.8 + 0.8 + 0.8) / 4)


def test_a_single_image_is_credited_by_its_score():
    drawn = [trajectory_of(16, verdicts=(), rounds=1) for _ in range(3)]
    credited = assign_credit(drawn, [[0.1], [None], [0.5]], [0, 0, 0], CreditSection(rule="single"))
    expected = group_advantages(np.array([0.1, 0.5]), [0, 0])
    assert [c.credits[0].advantage for c in credited.batch.items] == pytest.approx([expected[0], 0, expected[1]])
    assert credited.batch.denominator == 3 and credited.metrics["credit/images_without_reward"] == 1
    with pytest.raises(ValueError, match="t: credit.rule single credits one image and there are 2 segments"):
        assign_credit([trajectory_of(16, 4, verdicts=(True,))], [[0.1]], [0], CreditSection(rule="single"))


@pytest.mark.parametrize("rule", ["summed", "segments"])
def test_a_missing_score_is_no_zero_under_any_rule(rule):
    drawn, scores = three_rounds()
    scores[1][1] = None
    credited = assign_credit(drawn, scores, [0, 0, 0], CreditSection(rule=rule))
    found = [[c.advantage for c in example.credits] for example in credited.batch.items]
    assert np.isfinite([value for row in found for value in row]).all()
    assert (
        credited.metrics["credit/images_without_reward"] == 1
        and credited.metrics["credit/groups_without_comparison"] == 0
    )
    without = assign_credit([drawn[0], drawn[2]], [scores[0], scores[2]], [0, 0], CreditSection(rule=rule))
    expected = [[c.advantage for c in example.credits] for example in without.batch.items]
    if rule == "summed":
        assert found[0] == pytest.approx(expected[0]) and found[2] == pytest.approx(expected[1])
        assert found[1] == [0.0] * 4
    else:  # The second place has one score left, the first one all three.
        assert found[2][2:] == [0.0] * 3 and found[1][2:] == [0.0] * 2 and found[1][0] != 0


def test_the_standard_deviation_is_a_choice():
    rewards, groups = np.array([1.0, 0.0, 0.2]), [0, 0, 0]
    centred = rewards - 0.4
    np.testing.assert_allclose(group_advantages(rewards, groups, 0.1, "sample"), centred / (np.sqrt(0.28) + 0.1))
    expected = centred / (np.sqrt(0.56 / 3) + 0.1)
    np.testing.assert_allclose(group_advantages(rewards, groups, 0.1, "population"), expected)
    np.testing.assert_allclose(group_advantages(rewards, groups, 0.1, "none"), centred)


def test_balanced_verdicts_give_both_classes_the_same_weight() -> None:
    probabilities = np.array([1.0, 1.0, 1.0, 0.0])
    weights = verdict_weights(probabilities)
    assert weights[:3].sum() == pytest.approx(weights[3])
    assert weights.mean() == pytest.approx(1.0)


def test_a_missing_score_has_no_verdict_weight_and_leaves_the_shares_alone() -> None:
    weights = verdict_weights(np.array([1.0, np.nan, 0.0]))
    assert np.isnan(weights[1])
    assert weights[[0, 2]].tolist() == pytest.approx([1.0, 1.0])
