from __future__ import annotations

import pytest
import torch

from rlpipe.policy.guidance import guide

CONDITIONAL = torch.tensor([[1.0, 2.0, -1.0]])
UNCONDITIONAL = torch.tensor([[0.5, 1.0, 1.0]])


def test_guided_logits_move_away_from_the_unconditional_ones_by_the_scale():
    assert torch.equal(guide(CONDITIONAL, UNCONDITIONAL, 3.0), torch.tensor([[2.0, 4.0, -5.0]]))


def test_scaled_logits_are_the_official_learners():
    expected = CONDITIONAL - (5.0 - 1.0) / 5.0 * UNCONDITIONAL
    torch.testing.assert_close(guide(CONDITIONAL, UNCONDITIONAL, 5.0, "scaled"), expected)


@pytest.mark.parametrize("mode", ["guided", "scaled", "conditional"])
def test_scale_one_is_the_conditional_distribution_in_every_mode(mode):
    assert torch.equal(guide(CONDITIONAL, UNCONDITIONAL, 1.0, mode), CONDITIONAL)


def test_half_precision_logits_are_combined_in_float32():
    assert guide(CONDITIONAL.bfloat16(), UNCONDITIONAL.bfloat16(), 2.0).dtype == torch.float32


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="loss.logits: 'guide'"):
        guide(CONDITIONAL, UNCONDITIONAL, 2.0, "guide")
