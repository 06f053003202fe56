"""Replay against plain forwards of single trajectories."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlpipe.learn.replay import ReplayOptions, lay_out, segment_logprobs, token_logprobs
from rlpipe.policy.guidance import guide
from rlpipe.rollout.decoder import Decoder
from rlpipe.rollout.programs import edit, introspect
from rlpipe.rollout.sampling import truncate
from rlpipe.types import Prompt, Sampling, SegmentCredit, TrainItem
from tests.learn.builders import PROMPTS, WHOLE, item

IMAGE, LOOK, OFF = SegmentCredit(ce=1.0), SegmentCredit(ce=1.0), SegmentCredit()


def naive(policy, example, options: ReplayOptions) -> list[np.ndarray]:
    """Log-probs of all segments of one trajectory, each sequence on its own, heads on every position."""
    t, trajectory, sampling = policy.templates, example.trajectory, example.trajectory.sampling
    prompt = t.prompt(trajectory.prompt.text)
    prompt = t.blank(prompt) if example.blank_prompt else prompt
    first, text, second = (torch.tensor(s.token_ids) for s in trajectory.segments)
    context = trajectory.segments[0].context_ids
    context = first if context is None else torch.tensor(context)
    spoken = text[:-1] if text[-1] == t.eos else text

    def words(ids):
        return policy.embed_text(torch.as_tensor(ids, dtype=torch.long)[None])

    def run(parts, positions):
        return policy.hidden(torch.cat(parts, dim=1), positions[None])[0]

    def image(prompt_ids, second_image):
        parts = [words(prompt_ids)]
        positions = torch.arange(len(prompt_ids) + 36)
        if not second_image:
            hidden = run([*parts, policy.embed_codes(first[None])], positions)
        else:
            before = len(prompt_ids) + 36 + len(t.look)
            redraw = before + sampling.max_reflection_tokens
            parts += [policy.embed_codes(context[None]), words([*t.look, *spoken.tolist(), *t.redraw])]
            positions = torch.cat(
                [
                    torch.arange(before + len(spoken)),
                    torch.arange(redraw, redraw + len(t.redraw) + 36),
                ]
            )
            hidden = run([*parts, policy.embed_codes(second[None])], positions)
        return policy.image_logits(hidden[-37:-1])

    def score(logits, ids, temperature, top_k, top_p):
        return truncate(logits / temperature, top_k, top_p).log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    results = []
    for number, ids in ((0, first), (1, second)):
        blank = image(t.blank(prompt), number)
        logits = guide(image(prompt, number), blank, sampling.guidance, options.logits)
        results.append(score(logits, ids, sampling.image_temperature, sampling.image_top_k, sampling.image_top_p))
    seen = policy.embed_pixels(torch.from_numpy(example.images[0])[None])
    hidden = run(
        [words(prompt), seen, words([*t.look, *text.tolist()])],
        torch.arange(len(prompt) + 36 + len(t.look) + len(text)),
    )
    logits = policy.text_logits(hidden[-len(text) - 1 : -1])
    spoken_logprobs = score(logits, text, sampling.text_temperature, sampling.text_top_k, sampling.text_top_p)
    if options.verdict == "restricted":
        pair = (logits[0, [t.yes, t.no]] / sampling.text_temperature).log_softmax(-1)
        spoken_logprobs[0] = pair[0] if text[0] == t.yes else pair[1]
    results.insert(1, spoken_logprobs)
    return [r.numpy() for r in results]


CASES = {
    "plain": (Sampling(), ReplayOptions(), False),
    "guided": (Sampling(guidance=3.0), ReplayOptions(), False),
    "scaled": (Sampling(guidance=3.0), ReplayOptions(logits="scaled"), False),
    "conditional": (Sampling(guidance=3.0), ReplayOptions(logits="conditional"), False),
    "full verdict": (Sampling(), ReplayOptions(verdict="full"), False),
    "temperatures": (
        Sampling(image_temperature=0.7, text_temperature=1.3, guidance=2.0),
        ReplayOptions(),
        False,
    ),
    "reencoded": (Sampling(guidance=2.0, redraw_context="reencoded"), ReplayOptions(), True),
    "long reflections": (Sampling(max_reflection_tokens=40), ReplayOptions(), False),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_replay_of_a_batch_equals_each_trajectory_alone(tiny_policy, case):
    sampling, options, reencoded = CASES[case]
    items = [item(tiny_policy, i, 3, sampling, None, i == 2, reencoded) for i in range(4)]
    for example, found in zip(items, segment_logprobs(tiny_policy, items, options), strict=True):
        for expected, values in zip(naive(tiny_policy, example, options), found, strict=True):
            np.testing.assert_allclose(values, expected, atol=2e-5)


@pytest.mark.parametrize("context", ["sampled", "reencoded"])
def test_replay_agrees_with_the_sampler(tiny_policy, context):
    shared = Sampling(guidance=2.0, image_temperature=0.9, image_top_k=400, redraw="always", redraw_context=context)
    prompts = [Prompt(str(i), PROMPTS[i % 3]) for i in range(4)]
    samplings = [replace(shared, seed=i) for i in range(4)]
    rollouts = introspect(Decoder(tiny_policy), prompts, samplings, [str(i) for i in range(4)])
    items = [TrainItem(r.trajectory, r.images, (WHOLE,) * 3) for r in rollouts]
    for example, found in zip(items, segment_logprobs(tiny_policy, items), strict=True):
        for segment, values in zip(example.trajectory.segments, found, strict=True):
            np.testing.assert_allclose(values, segment.logprobs, atol=1e-4)


def drawn(policy, num: int = 5, **settings) -> list[TrainItem]:
    """Trajectories of up to three images, all of them credited."""
    shared = Sampling(guidance=2.0, max_images=3, max_reflection_tokens=12, **settings)
    prompts = [Prompt(str(i % 3), PROMPTS[i % 3]) for i in range(num)]
    samplings = [replace(shared, seed=i) for i in range(num)]
    rollouts = introspect(Decoder(policy), prompts, samplings, [str(i) for i in range(num)])
    return [TrainItem(r.trajectory, r.images, (WHOLE,) * len(r.trajectory.segments)) for r in rollouts]


@pytest.mark.parametrize("embeddings", ["live", "constant"])
@pytest.mark.parametrize(
    ("context", "room"), [("sampled", "fixed"), ("reencoded", "exact"), ("sampled", "group"), ("reencoded", "group")]
)
@pytest.mark.parametrize("history", ["last", "all"])
def test_replay_of_three_images_agrees_with_the_sampler(tiny_policy, history, context, room, embeddings):
    items = drawn(tiny_policy, redraw="always", redraw_context=context, history=history, reflection_room=room)
    assert {len(item.trajectory.segments) for item in items} == {5}
    found = segment_logprobs(tiny_policy, items, ReplayOptions(context=embeddings))
    for example, values in zip(items, found, strict=True):
        for segment, logprobs in zip(example.trajectory.segments, values, strict=True):
            np.testing.assert_allclose(logprobs, segment.logprobs, atol=1e-4)


def test_replay_of_an_edit_agrees_with_the_sampler_and_sees_source_and_instruction(tiny_policy):
    rng = np.random.default_rng(0)
    prompts = [Prompt(str(i), PROMPTS[i]) for i in range(3)]
    sources = [rng.integers(0, 256, (48, 48, 3)).astype(np.uint8) for _ in prompts]
    samplings = [Sampling(seed=i, guidance=2.0) for i in range(3)]
    rollouts = edit(Decoder(tiny_policy), prompts, sources, samplings, ["a", "b", "c"])
    items = [TrainItem(r.trajectory, r.images, (WHOLE,)) for r in rollouts]
    for option in ("live", "constant"):
        found = segment_logprobs(tiny_policy, items, ReplayOptions(context=option))
        for example, (values,) in zip(items, found, strict=True):
            np.testing.assert_allclose(values, example.trajectory.segments[0].logprobs, atol=1e-4)
    trajectory = items[0].trajectory
    others = (
        replace(items[0], trajectory=replace(trajectory, source_codes=trajectory.source_codes[::-1].copy())),
        replace(items[0], trajectory=replace(trajectory, prompt=prompts[1])),
        replace(items[0], blank_prompt=True),
    )
    for changed in others:
        (values,) = segment_logprobs(tiny_policy, [changed])[0]
        assert np.abs(values - trajectory.segments[0].logprobs).max() > 1e-3


def gradients(policy, items: list[TrainItem], context: str) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    replay = lay_out(items, policy.templates, ReplayOptions(context=context))
    token_logprobs(policy, replay).logprobs.sum().backward()
    grads = {n: p.grad.clone() for n, p in policy.janus.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("history", ["last", "all"])
def test_a_constant_context_gets_no_gradient_and_leaves_the_logprobs_as_they_are(tiny_policy, history):
    items = drawn(tiny_policy, redraw="always", history=history)
    live, constant = (gradients(tiny_policy, items, context) for context in ("live", "constant"))
    words = {int(t) for item in items for n in (1, 3) for t in item.trajectory.segments[n].token_ids}
    framing = [i for item in items for i in tiny_policy.templates.prompt(item.trajectory.prompt.text)]
    framing = [i for i in framing + tiny_policy.templates.redraw if i not in words]
    table = "model.language_model.embed_tokens.weight"
    assert live["model.aligner.fc1.weight"].abs().max() > 0 and live[table][framing].abs().max() > 0
    aligner = [grad for name, grad in constant.items() if "model.aligner" in name]
    assert all(not grad.any() for grad in aligner)
    assert not constant[table][framing].any() and constant[table][list(words)].any()
    assert constant["model.generation_embeddings.weight"].any()
    a, b = (segment_logprobs(tiny_policy, items, ReplayOptions(context=c)) for c in ("live", "constant"))
    for one, two in zip(a, b, strict=True):
        for values, same in zip(one, two, strict=True):
            np.testing.assert_allclose(values, same, atol=1e-5)


def test_a_context_policy_embeds_what_is_looked_back_at_and_nothing_else(tiny_policy):
    items, options = drawn(tiny_policy, 3, redraw="always"), ReplayOptions(context="constant")
    reference, generator = copy.deepcopy(tiny_policy), torch.Generator().manual_seed(0)

    def disturb(part: str) -> None:
        with torch.no_grad():
            for weight in reference.part(part).parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))

    def flat(**context) -> np.ndarray:
        found = segment_logprobs(reference, items, options, **context)
        return np.concatenate([values for row in found for values in row])

    before = flat(context_policy=tiny_policy)
    np.testing.assert_array_equal(before, flat())
    disturb("aligner")  # which embeds context alone
    np.testing.assert_array_equal(flat(context_policy=tiny_policy), before)
    assert np.abs(flat() - before).max() > 1e-3
    disturb("generation_aligner")  # which embeds drawn images, too
    after = flat(context_policy=tiny_policy)
    assert np.abs(after - before).max() > 1e-3 and np.abs(after - flat()).max() > 1e-3
    with pytest.raises(ValueError, match="context='constant'"):
        segment_logprobs(reference, items, ReplayOptions(), context_policy=tiny_policy)


@torch.no_grad()
def test_truncated_sampling_is_renormalised_and_keeps_the_sampled_token(tiny_policy):
    sampling = Sampling(image_top_k=500, image_top_p=0.999, text_top_p=0.999)
    options = ReplayOptions(verdict="full")
    items = [item(tiny_policy, i, 3, sampling) for i in range(3)]
    inside = 0
    for example, found in zip(items, segment_logprobs(tiny_policy, items, options), strict=True):
        for expected, values in zip(naive(tiny_policy, example, options), found, strict=True):
            assert np.isfinite(values).all()
            allowed = np.isfinite(expected)
            inside += allowed.sum()
            np.testing.assert_allclose(values[allowed], expected[allowed], atol=2e-5)
    assert inside > 200


@torch.no_grad()
def test_guided_equals_conditional_at_scale_one_and_runs_no_unconditional_rows(tiny_policy):
    items = [item(tiny_policy, i) for i in range(2)]
    guided, conditional = (
        segment_logprobs(tiny_policy, items, ReplayOptions(logits=mode)) for mode in ("guided", "conditional")
    )
    for one, two in zip(guided, conditional, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)
    replay = lay_out(items, tiny_policy.templates)
    assert len(replay.lengths) == 4  # drawing and looking of each


@torch.no_grad()
def test_a_blank_prompt_hides_the_caption_but_not_its_length(tiny_policy):
    items = [item(tiny_policy, 0, 3, blank_prompt=True)]
    other = replace(items[0].trajectory.prompt, text="a photo of six blue squares")  # as many tokens
    changed = replace(items[0], trajectory=replace(items[0].trajectory, prompt=other))
    same, shown = (segment_logprobs(tiny_policy, [e])[0] for e in (changed, replace(changed, blank_prompt=False)))
    for one, two, seen in zip(segment_logprobs(tiny_policy, items)[0], same, shown, strict=True):
        np.testing.assert_array_equal(one, two)
        assert np.abs(one - seen).max() > 1e-3


def test_the_second_image_starts_at_one_distance_whatever_the_reflection(tiny_policy):
    t = tiny_policy.templates
    starts = set()
    for index in range(3):
        example = item(tiny_policy, index, 3, credits=(OFF, OFF, IMAGE))
        row = lay_out([example], t)
        prompt = len(t.prompt(example.trajectory.prompt.text))
        first_read = int(row.groups[0].at[0])
        assert row.positions[: prompt + 36 + len(t.look)].tolist() == list(range(prompt + 36 + len(t.look)))
        starts.add(int(row.positions[first_read]) - prompt)
        length = len(example.trajectory.segments[1]) - 1
        assert first_read == prompt + 36 + len(t.look) + length + len(t.redraw) - 1
    assert starts == {36 + len(t.look) + 24 + len(t.redraw) - 1}


def test_only_what_a_trained_token_needs_is_laid_out(tiny_policy):
    def shapes(num_segments, credits):
        replay = lay_out([item(tiny_policy, 0, num_segments, credits=credits)], tiny_policy.templates)
        return replay, list(replay.lengths)

    t = tiny_policy.templates
    prompt = len(t.prompt(item(tiny_policy, 0).trajectory.prompt.text))
    draw, sizes = shapes(1, (IMAGE,))
    assert sizes == [prompt + 35] and set(draw.segment.tolist()) == {0} and draw.images is None
    judge, sizes = shapes(2, (OFF, LOOK))
    answer = len(item(tiny_policy, 0).trajectory.segments[1])
    assert sizes == [prompt + 36 + len(t.look) + answer - 1]
    assert set(judge.segment.tolist()) == {1} and len(judge.codes) == 0 and len(judge) == answer
    redraw, sizes = shapes(3, (OFF, OFF, IMAGE))
    assert len(sizes) == 1 and set(redraw.segment.tolist()) == {2} and len(redraw) == 36
    cut, sizes = shapes(3, (IMAGE, OFF, OFF))
    assert sizes == [prompt + 35]
    nothing, sizes = shapes(3, (OFF, OFF, OFF))
    assert sizes == [] and len(nothing) == 0


def test_without_train_eos_the_end_of_sentence_is_not_scored(tiny_policy):
    example = item(tiny_policy, 0, 2, credits=(OFF, LOOK))
    text = example.trajectory.segments[1]
    whole = lay_out([example], tiny_policy.templates)
    cut = lay_out([example], tiny_policy.templates, ReplayOptions(train_eos=False))
    assert len(whole) == len(text) and len(cut) == len(text) - 1
    assert sorted(cut.offset.tolist()) == list(range(len(text) - 1))


@torch.no_grad()
def test_restricted_verdicts_of_both_answers_sum_to_one(tiny_policy):
    t = tiny_policy.templates
    example = item(tiny_policy, 0, 2, credits=(OFF, LOOK))
    total = 0.0
    for answer in (t.yes, t.no):
        ids = np.array([answer, *example.trajectory.segments[1].token_ids[1:]])
        segments = (example.trajectory.segments[0], replace(example.trajectory.segments[1], token_ids=ids))
        changed = replace(example, trajectory=replace(example.trajectory, segments=segments))
        total += np.exp(segment_logprobs(tiny_policy, [changed])[0][1][0])
    assert total == pytest.approx(1.0, abs=1e-6)


def test_supervised_tasks_train_the_target_alone(tiny_policy):
    for credits, segment, head in (
        ((IMAGE,), 0, "generation_head"),
        ((OFF, LOOK), 1, "lm_head"),
        ((OFF, OFF, IMAGE), 2, "generation_head"),
    ):
        tiny_policy.zero_grad()
        replay = lay_out([item(tiny_policy, 0, len(credits), credits=credits)], tiny_policy.templates)
        assert set(replay.segment.tolist()) == {segment}
        token_logprobs(tiny_policy, replay).logprobs.sum().backward()
        for name in ("generation_head", "lm_head"):
            used = any(p.grad is not None for p in tiny_policy.part(name).parameters())
            assert used == (name == head)
    tiny_policy.zero_grad()


@torch.no_grad()
def test_entropy_is_that_of_the_distribution_drawn_from(tiny_policy):
    replay = lay_out([item(tiny_policy, 0, 2, credits=(OFF, LOOK))], tiny_policy.templates)
    found = token_logprobs(tiny_policy, replay, entropy=True)
    verdict = found.entropy[(replay.offset == 0)]
    p = found.logprobs[replay.offset == 0].exp()
    expected = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(verdict, expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_laid_out_is_named(tiny_policy):
    t = tiny_policy.templates
    with pytest.raises(ValueError, match="t0.*max_reflection_tokens is 3"):
        lay_out([item(tiny_policy, 0, 3, Sampling(max_reflection_tokens=3))], t)
    example = item(tiny_policy, 0, 2)
    with pytest.raises(ValueError, match="t0.*needs the pixels"):
        lay_out([replace(example, images=())], t)
    text = replace(example.trajectory.segments[1], token_ids=np.array([t.eos]))
    odd = replace(example.trajectory, segments=(example.trajectory.segments[0], text))
    with pytest.raises(ValueError, match="t0.*neither Yes nor No"):
        lay_out([replace(example, trajectory=odd)], t)
    with pytest.raises(ValueError, match="greedily"):
        lay_out([item(tiny_policy, 0, 1, Sampling(image_temperature=0.0))], t)
