from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlpipe.rollout import graphs
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import introspect
from rlpipe.types import Sampling
from tests.rollout.naive import Naive, rows, same_tokens

SAMPLING = Sampling(guidance=5.0, max_reflection_tokens=12, redraw="always", history="all", max_images=3)


@pytest.mark.parametrize("sampling", [SAMPLING, replace(SAMPLING, guidance=1.0, redraw_context="reencoded")])
def test_static_steps_draw_what_growing_ones_draw(tiny_policy, monkeypatch, sampling):
    monkeypatch.setattr(graphs, "LIMIT_STEP", 16)  # several limits in an image of 36 tokens
    theirs = introspect(Decoder(tiny_policy), *rows(5, sampling))
    ours = introspect(Decoder(tiny_policy, graphs=True), *rows(5, sampling))
    for one, other in zip(ours, theirs, strict=True):
        assert same_tokens(one, other)
        assert Naive(tiny_policy, one).gap() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_draw_what_single_launches_draw(tiny_policy, monkeypatch):
    monkeypatch.setattr(graphs, "LIMIT_STEP", 16)
    policy = tiny_policy.to("cuda")
    try:
        eager, captured = (introspect(Decoder(policy, graphs=g), *rows(5, SAMPLING)) for g in (False, True))
    finally:
        policy.to("cpu")
    assert all(same_tokens(one, other) for one, other in zip(eager, captured, strict=True))
