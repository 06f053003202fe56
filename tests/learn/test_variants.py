"""Variants of the loss, each against a case computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlpipe.learn.learner import Learner
from rlpipe.learn.loss import Variant, policy_loss, token_terms
from rlpipe.learn.replay import lay_out, token_logprobs
from rlpipe.schema import LossSection
from tests.learn.builders import config, item, with_logprobs
from tests.learn.test_loss import NAN, terms_of

VARIANTS = [
    Variant(clip_high=0.28),
    Variant(ratio="segment"),
    Variant(ratio="sequence", correction="masked"),
    Variant(correction="truncated", kl="k2"),
    Variant(correction="none", kl="k1"),
]


def run(ratios: list[float], advantages: list[float], variant: Variant, clip: float | None = 0.2, **columns):
    """Loss, gradient of the log-probs and metrics, of sampled tokens with these ratios."""
    current = torch.tensor([math.log(r) for r in ratios], requires_grad=True)
    terms = terms_of(behaviour=[0.0] * len(ratios), advantage=advantages, **columns)
    loss, stats = policy_loss(current, terms, 1.0, clip, variant=variant)
    return loss.item(), torch.autograd.grad(loss, current)[0].tolist(), stats.values()


def test_an_asymmetric_clip_lets_gains_go_further_than_losses():
    ratios, advantages = [1.25, 1.5, 0.75, 0.9], [1.0, 1.0, -1.0, -1.0]
    loss, gradient, metrics = run(ratios, advantages, Variant(clip_high=0.28))
    assert loss == pytest.approx(-(1.25 + 1.28 - 0.8 - 0.9))
    assert gradient == pytest.approx([-1.25, 0.0, 0.0, 0.9])
    assert metrics["loss/clip_fraction"] == pytest.approx(0.5)


def test_a_segment_s_ratio_is_the_geometric_mean_of_its_tokens():
    """GSPO: one ratio sqrt(2 * 0.5), another sqrt(1.5 * 1.5), which is clipped as a whole."""
    ratios, advantages, segment = [2.0, 0.5, 1.5, 1.5], [0.5, 0.5, 0.5, 0.5], [0, 0, 1, 1]
    loss, gradient, metrics = run(ratios, advantages, Variant(ratio="segment"), segment=segment)
    assert loss == pytest.approx(-(1.0 + 1.2))
    assert gradient == pytest.approx([-0.5, -0.5, 0.0, 0.0])
    assert metrics["loss/clip_fraction"] == 0.5 and metrics["loss/ratio_max"] == pytest.approx(1.5)
    whole = (2.0 * 0.5 * 1.5 * 1.5) ** 0.25
    loss, gradient, _ = run(ratios, advantages, Variant(ratio="sequence"), clip=None, segment=segment)
    assert loss == pytest.approx(-2 * whole) and gradient == pytest.approx([-0.5 * whole] * 4)


def test_a_token_that_nobody_sampled_takes_no_part_in_its_segment_s_ratio():
    current = torch.tensor([math.log(1.1), -3.0, math.log(0.9)])
    terms = terms_of(behaviour=[0.0, NAN, 0.0], advantage=[1.0] * 3)
    loss, _ = policy_loss(current, terms, 1.0, variant=Variant(ratio="segment"))
    assert loss.item() == pytest.approx(-(2 * math.sqrt(1.1 * 0.9) + 1.0))


def test_truncated_masked_and_ignored_staleness():
    """The weight of the gradient is the ratio to the sampler, cut at 2, dropped outside 1/2 to 2, or left out."""
    ratios, advantages = [3.0, 1.5, 0.4], [1.0, -1.0, 1.0]
    cases = {"truncated": [2.0, -1.5, 0.4], "masked": [0.0, -1.5, 0.0], "none": [1.0, -1.0, 1.0]}
    fractions = {"truncated": 1 / 3, "masked": 2 / 3, "none": None}
    for name, weighted in cases.items():
        loss, gradient, metrics = run(ratios, advantages, Variant(correction=name, correction_cap=2.0))
        assert loss == pytest.approx(-sum(weighted))
        assert gradient == pytest.approx([-w for w in weighted])
        assert metrics.get("loss/clip_fraction") == (fractions[name] and pytest.approx(fractions[name]))
    # By segment: the geometric mean of 3, 1.5 and 0.4 lies within the bounds, so all tokens stay.
    mean = (3.0 * 1.5 * 0.4) ** (1 / 3)
    _, gradient, _ = run(ratios, advantages, Variant(ratio="segment", correction="masked"))
    assert gradient == pytest.approx([-mean, mean, -mean])


def test_kl_estimates_and_their_gradients():
    """d = log-prob - reference is 0.5 and -1."""
    d = [0.5, -1.0]
    values = {"k1": d, "k2": [0.125, 0.5], "k3": [math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1 - 1]}
    gradients = {"k1": d, "k2": d, "k3": [1 - math.exp(-0.5), 1 - math.exp(1.0)]}
    for name in values:
        current = torch.tensor([-1.0, -2.0], requires_grad=True)
        terms = terms_of(reference=[-1.5, -1.0], kl=[0.5, 1.0])
        loss, stats = policy_loss(current, terms, 4.0, kl_beta=0.1, variant=Variant(kl=name))
        assert loss.item() == pytest.approx(0.1 * (0.5 * values[name][0] + values[name][1]) / 4)
        loss.backward()
        assert current.grad.tolist() == pytest.approx(
            [0.1 / 4 * w * g for w, g in zip([0.5, 1.0], gradients[name], strict=True)]
        )
        assert stats.values()["kl/image"] == pytest.approx(sum(values[name]) / 2)


def test_entropies_are_weighted_by_kind_and_their_means_measured():
    entropies = torch.tensor([2.0, 4.0, 1.0], requires_grad=True)
    terms = terms_of(entropy=[0.5, 0.5, 1.0], image=[True, True, False])
    current = torch.zeros(3, requires_grad=True)
    loss, stats = policy_loss(current, terms, 2.0, entropies=entropies, entropy_weights=(-0.1, 0.2))
    assert loss.item() == pytest.approx((-0.1 * 3.0 + 0.2 * 1.0) / 2)
    loss.backward()
    assert entropies.grad.tolist() == pytest.approx([-0.025, -0.025, 0.1])
    assert stats.values()["entropy/image"] == 3.0 and stats.values()["entropy/text"] == 1.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_ratio_one_every_variant_has_the_official_gradient(tiny_policy, variant):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 2 + i % 2) for i in range(2)], noise=0.0)
    terms = token_terms(items, lay_out(items, tiny_policy.templates))

    def gradient(variant: Variant) -> torch.Tensor:
        current = terms.behaviour.clone().requires_grad_()
        loss, stats = policy_loss(current, terms, 6.0, kl_beta=0.0, variant=variant)
        assert stats.values()["loss/ratio_max"] == 1.0
        return torch.autograd.grad(loss, current)[0]

    assert torch.equal(gradient(variant), gradient(Variant()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_variant_depends_on_how_a_batch_is_cut(tiny_policy, variant):
    items = with_logprobs(tiny_policy, [item(tiny_policy, i, 2 + i % 2) for i in range(4)], noise=0.5)
    items = [replace(i, credits=tuple(replace(c, entropy=1.0) for c in i.credits)) for i in items]

    @torch.no_grad()
    def total(chunks: list) -> float:
        losses = []
        for chunk in chunks:
            replay = lay_out(chunk, tiny_policy.templates)
            found, terms = token_logprobs(tiny_policy, replay, entropy=True), token_terms(chunk, replay)
            weighted = (found.entropy, (0.1, -0.2))
            losses.append(policy_loss(found.logprobs, terms, 12.0, 0.2, 0.04, True, variant, *weighted)[0].item())
        return sum(losses)

    assert total([items[:1], items[1:]]) == pytest.approx(total([items]), abs=1e-6)


def test_a_step_with_an_entropy_bonus_raises_the_entropy(tiny_policy, tiny_policy_path):
    items = [item(tiny_policy, i, 2) for i in range(2)]
    bonus = tuple(replace(credit, advantage=0.0, entropy=1.0) for credit in items[0].credits)
    items = [replace(example, credits=bonus) for example in items]
    learner = Learner(config(tiny_policy_path, lr=1e-4))
    rows = [learner.step(items, 2.0, step, 10, entropy_weights=(-1.0, -1.0)) for step in range(2)]
    for kind in ("image", "text"):
        assert rows[1][f"entropy/{kind}"] > rows[0][f"entropy/{kind}"]
    assert rows[0]["loss/total"] == rows[0]["loss/entropy"] < 0


def test_a_variant_is_read_from_the_configuration_and_an_unknown_name_refused():
    assert Variant.from_config(LossSection()) == Variant()
    assert Variant.from_config(LossSection(ratio="segment", kl="k2")) == Variant(ratio="segment", kl="k2")
    with pytest.raises(ValueError, match="loss.ratio: 'trajectory' is none of token, segment, sequence"):
        Variant(ratio="trajectory")
