"""What the driver sees of a rollout."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from rlpipe.learn.advantage import assign_credit, extend
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.schema import CreditSection
from rlpipe.types import Prompt, Sampling
from roles.work import outline


@pytest.mark.parametrize("rule", ["summed", "segments"])
def test_outlines_of_three_rounds_are_credited_as_the_rollouts_are(tiny_policy, rule):
    sampling = Sampling(max_images=3, max_reflection_tokens=6, history="all", redraw="always")
    prompts = [Prompt(str(i // 4), "a photo of a red star") for i in range(8)]
    samplings = [replace(sampling, seed=i) for i in range(8)]
    drawn = extend(introspect(Decoder(tiny_policy), prompts, samplings, [str(i) for i in range(8)]), rule)
    assert len({len(rollout.images) for rollout in drawn}) > (rule == "summed"), (
        "some end early, where the rule says so"
    )
    rng = np.random.default_rng(0)
    scores = [rng.random(len(rollout.images)).tolist() for rollout in drawn]
    groups = [i // 4 for i in range(8)]
    section = CreditSection(rule=rule)
    outlines = pickle.loads(pickle.dumps([outline(rollout) for rollout in drawn]))
    for train_eos in (True, False):
        whole, seen = (assign_credit(r, scores, groups, section, None, train_eos) for r in (drawn, outlines))
        assert [i.credits for i in whole.batch.items] == [i.credits for i in seen.batch.items]
        assert all(len(i.credits) == len(i.trajectory.segments) for i in seen.batch.items)
        assert seen.metrics == whole.metrics
    assert not any(rollout.images for rollout in outlines)
