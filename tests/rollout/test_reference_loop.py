"""The engine against the official algorithm: other code, other order, the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.reference_loop import ReferenceLoop
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Sampling
from tests.rollout.naive import Naive, rows, same_tokens

SAMPLED = {"guidance": 5.0, "max_reflection_tokens": 12}
GREEDY = SAMPLED | {"image_temperature": 0.0, "text_temperature": 0.0}


@pytest.fixture(scope="module")
def decoder(tiny_policy) -> Decoder:
    return Decoder(tiny_policy)


@pytest.mark.parametrize("context", ["sampled", "reencoded"])
@pytest.mark.parametrize("room", ["fixed", "group", "exact"])
@pytest.mark.parametrize("how", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_the_engine_draws_the_tokens_of_the_official_algorithm(tiny_policy, decoder, how, room, context):
    sampling = Sampling(**how, reflection_room=room, redraw_context=context)
    prompts, samplings, ids = rows(8, sampling)
    ours = introspect(decoder, prompts, samplings, ids)
    theirs = ReferenceLoop(tiny_policy, prompts, samplings).run(ids)
    for one, other in zip(ours, theirs, strict=True):
        assert same_tokens(one, other)
        assert one.trajectory.verdicts == other.trajectory.verdicts
        assert one.trajectory.truncated == other.trajectory.truncated
        for image, reference in zip(one.images, other.images, strict=True):
            # a convolution's last bit depends on its batch size, and pixels are truncated to grey levels
            assert np.abs(image.astype(int) - reference.astype(int)).max() <= 1
        for mine, reference in zip(one.trajectory.segments, other.trajectory.segments, strict=True):
            assert np.abs(mine.logprobs - reference.logprobs).max() < 1e-4
            assert mine.room == reference.room


def test_the_rows_of_both_verdicts_are_compared(decoder):
    verdicts = {rollout.trajectory.verdicts for rollout in introspect(decoder, *rows(8, Sampling(**SAMPLED)))}
    assert verdicts == {(True,), (False,)}


def test_the_reference_agrees_with_full_forwards_of_single_rows(tiny_policy):
    prompts, samplings, ids = rows(4, Sampling(**SAMPLED, redraw_context="reencoded", reflection_room="group"))
    for rollout in ReferenceLoop(tiny_policy, prompts, samplings).run(ids):
        assert Naive(tiny_policy, rollout).gap() < 1e-4


def test_it_draws_a_second_image_for_every_row(tiny_policy):
    prompts, samplings, _ = rows(3, Sampling(**GREEDY))
    loop = ReferenceLoop(tiny_policy, prompts, samplings)
    codes = torch.zeros(3, tiny_policy.num_image_tokens, dtype=torch.long)
    words = [torch.tensor([tiny_policy.templates.yes, tiny_policy.templates.eos])] * 3
    with torch.inference_mode():
        second, _ = loop.redraw(codes, loop.pixels(codes), words)
    assert second.tokens.shape == codes.shape


def test_it_refuses_what_the_official_rollouts_do_not_know(tiny_policy):
    prompts, samplings, _ = rows(1, Sampling(image_top_k=5))
    with pytest.raises(ValueError, match="image_top_k"):
        ReferenceLoop(tiny_policy, prompts, samplings)
