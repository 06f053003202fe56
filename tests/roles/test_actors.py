"""Each role alone, in this process: the actors are plain classes that Ray wraps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from rlpipe.config import ScorerSection
from rlpipe.learn.advantage import reference_items
from rlpipe.learn.replay import segment_logprobs
from rlpipe.observe.gallery import read_rollouts
from rlpipe.policy.janus import JanusPolicy
from rlpipe.rollout.memory import RowMemory
from rlpipe.types import Prompt, Rollout, Score, ScoreRequest, SegmentCredit
from rlpipe.world.models import build_judge
from roles.buckets import WeightError
from roles.factory import DrawActor
from roles.learner import LearnerActor
from roles.reference import ReferenceActor
from roles.reward import RewardActor
from roles.rollout import RolloutWorker
from roles.weights import publish
from roles.work import (
    DrawRecord,
    GroupRecord,
    GroupRequest,
    ImagesRecord,
    Sample,
    Share,
    image_id,
    sampling_of,
    trajectory_seed,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def config(config_for, prompts_file, tmp_path):
    return config_for(tmp_path / "run", prompts_file)


def requests(*texts: str, size: int = 3) -> list[GroupRequest]:
    return [GroupRequest(10 + i, Prompt(str(i), text), size, seed=1) for i, text in enumerate(texts)]


def worker_with_weights(config) -> RolloutWorker:
    worker = RolloutWorker(config)
    worker.load_weights(publish(dict(worker.policy.janus.named_parameters()), 0))
    return worker


def generate(worker: RolloutWorker, wanted: list[GroupRequest], version: int = 0) -> list[tuple[Any, Any]]:
    """The records that a worker sends, each with its object."""
    items = worker.generate(version, wanted)
    return [(next(items), thing) for thing in items]


def groups_of(worker: RolloutWorker, wanted: list[GroupRequest]) -> list[tuple[Rollout, ...]]:
    return [thing for record, thing in generate(worker, wanted) if isinstance(record, GroupRecord)]


def draw(config, *texts: str) -> list[tuple[Rollout, ...]]:
    return groups_of(worker_with_weights(config), requests(*texts))


def test_a_group_does_not_depend_on_the_groups_it_is_drawn_with(config) -> None:
    worker = worker_with_weights(config)
    both = requests("a photo of two red circles", "a photo of three blue circles and a square")
    first, second = groups_of(worker, both)
    (alone,) = groups_of(worker, both[1:])
    for a, b in zip(second, alone, strict=True):
        assert a.trajectory.id == b.trajectory.id
        for x, y in zip(a.trajectory.segments, b.trajectory.segments, strict=True):
            assert np.array_equal(x.token_ids, y.token_ids)
    assert not np.array_equal(first[0].images[0], second[0].images[0])


def test_the_record_of_a_drawn_group_has_its_shape_and_no_tokens(config) -> None:
    (*_, (about, group), (last, nothing)) = generate(worker_with_weights(config), requests("two red circles"))
    assert isinstance(last, DrawRecord) and nothing is None
    assert about.ordinal == 10 and about.policy_version == 0
    assert about.num_images == tuple(len(rollout.images) for rollout in group)
    for outline, rollout in zip(about.outlines, group, strict=True):
        assert outline.trajectory.verdicts == rollout.trajectory.verdicts
        assert [s.kind for s in outline.trajectory.segments] == [s.kind for s in rollout.trajectory.segments]
        assert list(map(len, outline.trajectory.segments)) == list(map(len, rollout.trajectory.segments))
        assert not outline.images and not any(segment.token_ids.any() for segment in outline.trajectory.segments)


def test_seeds_of_trajectories_differ_by_run_prompt_and_member_and_stay_the_same() -> None:
    seeds = {trajectory_seed(s, o, m) for s in range(3) for o in range(5) for m in range(8)}
    assert len(seeds) == 120 and all(0 <= seed < 2**63 for seed in seeds)
    assert trajectory_seed(1, 2, 3) == trajectory_seed(1, 2, 3) != trajectory_seed(2, 1, 3)


def asked(worker: RolloutWorker, size: int = 6) -> list[tuple[ImagesRecord, list[ScoreRequest]]]:
    pairs = generate(worker, requests("a photo of two red circles", size=size))
    return [(record, things) for record, things in pairs if isinstance(record, ImagesRecord)]


def test_the_images_of_a_round_are_handed_out_before_anything_is_said_of_them(config) -> None:
    worker = worker_with_weights(config)
    looks = []
    extend, worker.decoder.extend = worker.decoder.extend, lambda *a, **k: looks.append(1) or extend(*a, **k)
    items = worker.generate(0, requests("a photo of two red circles", size=6))
    first, record = next(items), next(items)
    before = len(looks)
    assert record == ImagesRecord((0,), tuple(f"10-{member}/0" for member in range(6)))
    rest = list(items)
    assert len(looks) > before, "it looks and draws again after that"
    (group,) = [thing for thing, about in zip(rest[::2], rest[1::2], strict=True) if isinstance(about, GroupRecord)]
    for request, rollout in zip(first, group, strict=True):
        assert np.array_equal(request.image, rollout.images[0]) and request.prompt == rollout.trajectory.prompt


def test_every_image_of_every_rollout_is_asked_about_once(config) -> None:
    worker = worker_with_weights(config)
    (group,) = groups_of(worker, requests("a photo of two red circles", size=6))
    images = {image_id(r.trajectory.id, i): image for r in group for i, image in enumerate(r.images)}
    asked_about = [request for _, things in asked(worker) for request in things]
    assert sorted(request.id for request in asked_about) == sorted(images)
    assert all(np.array_equal(request.image, images[request.id]) for request in asked_about)
    assert {len(r.images) for r in group} == {1, 2}, "some are drawn again"


def test_each_scorer_is_asked_about_the_images_it_sees(config) -> None:
    every, first = (
        replace(config.reward[0], name="every"),
        replace(config.reward[0], name="first", sees=["first_image"]),
    )
    final, words = (
        replace(first, name="final", sees=["final_image"]),
        replace(first, name="words", sees=["every_image", "verdict"]),
    )
    config.reward = [every, first, final, words]
    worker = worker_with_weights(config)
    (group,) = groups_of(worker, requests("a photo of two red circles", size=6))
    number = {image_id(r.trajectory.id, i): (r, i) for r in group for i in range(len(r.images))}
    by_scorer: dict[int, list[ScoreRequest]] = {}
    for record, things in asked(worker):
        assert record.ids == tuple(request.id for request in things)
        for scorer in record.scorers:
            by_scorer.setdefault(scorer, []).extend(things)
    of = {place: sorted(request.id for request in things) for place, things in by_scorer.items()}
    assert of[0] == of[3] == sorted(number)
    assert of[1] == sorted(name for name, (_, i) in number.items() if i == 0)
    assert of[2] == sorted(name for name, (r, i) in number.items() if i == len(r.images) - 1)
    for request in by_scorer[3]:
        rollout, i = number[request.id]
        assert request.verdict == (rollout.texts[i] if i < len(rollout.texts) else None)
        if i < len(rollout.texts):
            assert request.verdict.startswith("Yes" if rollout.trajectory.verdicts[i] else "No")


def test_what_was_drawn_behind_an_accepted_image_is_not_scored_where_it_is_left_out(config) -> None:
    config.rollout.redraw = "always"
    worker = worker_with_weights(config)
    (group,) = groups_of(worker, requests("a photo of two red circles", size=6))
    assert {len(r.images) for r in group} == {1, 2}
    ids = [name for record, _ in asked(worker) for name in record.ids]
    assert sorted(ids) == sorted(image_id(r.trajectory.id, i) for r in group for i in range(len(r.images)))


def test_branches_share_a_first_image_that_counts_once_and_is_scored_once(config) -> None:
    config.rollout.branches = 3
    pairs = generate(worker_with_weights(config), requests("a photo of two red circles", size=6))
    ((record, group),) = [(record, thing) for record, thing in pairs if isinstance(record, GroupRecord)]
    first = [rollout.images[0].tobytes() for rollout in group]
    assert first == [first[0]] * 3 + [first[3]] * 3 and first[0] != first[3]
    assert record.num_drawn == sum(record.num_images) - 4
    assert len({rollout.trajectory.sampling.seed for rollout in group}) == 6
    asked_first = [thing for about, thing in pairs if isinstance(about, ImagesRecord)][0]
    counts = RewardActor(config.reward[0]).score(asked_first).counts
    assert counts.requests == 6 and counts.cached == 4


def test_new_weights_between_two_calls_leave_nothing_of_the_old_ones(config) -> None:
    config.rollout.rows, wanted = "2", requests("a photo of two red circles", "a photo of three blue circles")
    worker = worker_with_weights(config)
    before = groups_of(worker, wanted)
    moved = {n: w + 0.05 * w.std() * torch.randn_like(w) for n, w in worker.policy.janus.named_parameters()}
    manifest = publish({name: tensor.contiguous() for name, tensor in moved.items()}, 1)
    worker.load_weights(manifest)
    fresh = RolloutWorker(config)
    fresh.load_weights(manifest)
    one, two = (
        [thing for record, thing in generate(w, wanted, 1) if isinstance(record, GroupRecord)] for w in (worker, fresh)
    )
    for a, b, c in zip(sum(before, ()), sum(one, ()), sum(two, ()), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(b.images, c.images, strict=True))
        assert b.trajectory.policy_version == 1 and not np.array_equal(a.images[0], b.images[0])


def test_a_call_under_way_ends_where_the_weights_change(config) -> None:
    worker = worker_with_weights(config)
    items = worker.generate(0, requests("a photo of two red circles", size=6))
    next(items), next(items)
    worker.load_weights(publish(dict(worker.policy.janus.named_parameters()), 1))
    with pytest.raises(WeightError, match="asked to work with version 0, holds version 1"):
        list(items)


def test_rows_that_do_not_fit_are_refused_when_a_worker_starts(config) -> None:
    config.rollout.rows = "100000000"
    with pytest.raises(ValueError, match=r"rollout.rows: 100000000 rows do not fit: .*; give \d+ or fewer, or auto"):
        RolloutWorker(config)


def test_a_group_that_is_looked_at_together_has_to_fit(config, monkeypatch) -> None:
    config.rollout.reflection_room, config.train.group_size = "group", 5
    monkeypatch.setattr("roles.rollout.rows_that_fit", lambda *_: 4)
    words = "rollout.reflection_room: group looks at the train.group_size 5 rows of a prompt together, but 4 fit"
    with pytest.raises(ValueError, match=words):
        RolloutWorker(config)
    assert DrawActor(config).limit == 4
    monkeypatch.setattr("roles.rollout.rows_that_fit", lambda *_: 5)
    assert RolloutWorker(config).limit == 5


def test_an_evaluation_counts_all_its_prompts_and_goes_on_with_little_memory(config, monkeypatch) -> None:
    config.evaluate.batch_size = 50
    worker, sampling = RolloutWorker(config), sampling_of(config.rollout, 0)
    assert worker._evaluated_at_once(sampling) == 50
    row = RowMemory.of(worker.decoder, sampling, config.policy.max_prompt_tokens, prompts=50)
    monkeypatch.setattr("roles.rollout.free_bytes", lambda *_: row.shared + 7 * row.row)
    assert worker._evaluated_at_once(sampling) == 7
    monkeypatch.setattr("roles.rollout.free_bytes", lambda *_: 0)
    worker.limit = 3
    assert worker._evaluated_at_once(sampling) == 3


def score_requests(config, text: str) -> list[ScoreRequest]:
    (group,) = draw(config, text)
    return [
        ScoreRequest(image_id(r.trajectory.id, i), r.trajectory.prompt, image)
        for r in group
        for i, image in enumerate(r.images)
    ]


def test_a_reward_actor_answers_in_order(config) -> None:
    wanted = score_requests(config, "a photo of two red circles")
    record = RewardActor(config.reward[0]).score(wanted)
    assert [score.id for score in record.scores] == [request.id for request in wanted]
    assert [s.value for s in record.scores] == pytest.approx([r.image[..., 0].mean() / 255 for r in wanted])
    assert record.counts.requests == len(wanted) and record.counts.missing == 0


@pytest.mark.parametrize(
    ("scorer", "prompt", "reason"),
    [
        ("Raises", "a photo of two red circles", "the service is down"),
        ("Red", "an unscorable photo", "no red in this world"),
        ("Red", "a photo of a nan", "nan, not a finite number"),
    ],
)
def test_what_a_scorer_fails_to_give_is_missing_with_the_reason(config, scorer, prompt, reason) -> None:
    section = ScorerSection(scorer=f"role_scorers:{scorer}", path=None, retries=1, backoff_s=0.0)
    record = RewardActor(section).score(score_requests(config, prompt))
    assert all(score.missing and reason in score.error for score in record.scores)
    assert record.counts.missing == len(record.scores) and record.counts.retries == 1


def test_a_reward_actor_names_the_prompts_that_its_scorer_cannot_score() -> None:
    prompts = [Prompt("a", "two red circles"), Prompt("b", "an unscorable circle")]
    actor = RewardActor(ScorerSection(name="red", scorer="role_scorers:Red", path=None))
    assert actor.check(prompts) == ["reward[red]: prompt b: no red in this world"]
    assert RewardActor(ScorerSection(scorer="role_scorers:Raises", path=None)).check(prompts) == []


def test_the_tiny_judge_scores_drawn_images_as_probabilities(config, tmp_path: Path) -> None:
    model, tokenizer = build_judge(0, hidden=32, layers=1, intermediate=64, vision_layers=1)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    wanted = score_requests(config, "a photo of two red circles")
    section = ScorerSection(scorer="internvl", path=str(tmp_path / "judge"), threads=1)
    values = [score.value for score in RewardActor(section).score(wanted).scores]
    assert len(values) == len(wanted) and all(0 < value < 1 for value in values)


def test_the_reference_at_the_policys_own_weights_repeats_the_samplers_logprobs(config) -> None:
    groups = draw(config, "a photo of two red circles", "a photo of a blue square")
    _, *logprobs = ReferenceActor(config).logprobs([ray.put(group) for group in groups])
    for group, members in zip(groups, logprobs, strict=True):
        for rollout, arrays in zip(group, members, strict=True):
            for segment, array in zip(rollout.trajectory.segments, arrays, strict=True):
                assert array == pytest.approx(segment.logprobs, abs=1e-4)


def test_a_reference_with_the_policys_context_embeds_it_with_the_weights_it_was_sent(config) -> None:
    config.reference.context, config.loss.verdict = "policy", "full"
    worker = worker_with_weights(config)
    (group,) = groups_of(worker, requests("a photo of two red circles"))
    actor, groups = ReferenceActor(config), [ray.put(group)]
    before = actor.logprobs(groups)[1]
    with torch.no_grad():
        for part in ("aligner", "generation_aligner", "lm_head"):
            for weight in worker.policy.part(part).parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    manifest = publish(dict(worker.policy.janus.named_parameters()), 1)
    assert actor.load_weights(manifest) == worker.load_weights(manifest)
    items, options = reference_items(group), replace(actor.options, context="constant")
    expected = segment_logprobs(actor.policy, items, options, context_policy=worker.policy)
    for member, old, new in zip(actor.logprobs(groups)[1], before, expected, strict=True):
        for values, wanted in zip(member, new, strict=True):
            assert values == pytest.approx(wanted, abs=1e-5)
        assert abs(member[1] - old[1]).max() > 1e-3  # what is said of an image hangs on the aligner


def test_a_worker_runs_the_program_that_is_configured(config, tmp_path: Path) -> None:
    config.credit.rule, config.rollout.program = "single", "draw"
    (*_, (record, group), _) = generate(worker_with_weights(config), requests("a photo of two red circles"))
    assert all(len(rollout.trajectory.segments) == 1 for rollout in group)
    assert record.num_images == (1, 1, 1) and record.truncated == 0
    config.rollout.program = "edit"
    source = np.full((60, 48, 3), 200, np.uint8)
    Image.fromarray(source).save(tmp_path / "source.png")
    prompt = Prompt("e", "a red circle", source_image=str(tmp_path / "source.png"))
    (_, asked_about), (_, edited), _ = generate(worker_with_weights(config), [GroupRequest(0, prompt, 2, seed=1)])
    assert all(np.array_equal(request.source, source[:48]) for request in asked_about)
    for rollout in edited:
        assert np.array_equal(rollout.source, source[:48]) and rollout.trajectory.source_codes is not None


def shares_of(group: tuple[Rollout, ...]) -> list[Share]:
    """Advantages that differ by member, the last member left to another rank."""
    credits = [
        tuple(SegmentCredit(advantage=float(number - 1)) for _ in rollout.trajectory.segments)
        for number, rollout in enumerate(group[:-1])
    ]
    return [Share(ray.put(group), (*credits, None))]


def test_a_learner_assembles_its_share_steps_publishes_and_resumes(config, tmp_path: Path) -> None:
    (group,) = draw(config, "a photo of two red circles")
    learner = LearnerActor(config)
    learner.start("")
    learner.assemble(shares_of(group))
    assert [item.trajectory.id for item in learner.items] == ["10-0", "10-1"]
    before = learner.publish(0).checksum
    metrics = learner.step(6.0, 0, 4, True)
    assert metrics["mismatch/max_abs"] < 1e-4 and math.isfinite(metrics["loss/total"])
    after = learner.publish(1).checksum
    assert after != before == learner.publish_initial(0).checksum
    with pytest.raises(RuntimeError, match="asked for step 2, the learner is at 1"):
        learner.save(str(tmp_path / "checkpoints"), 2, {})
    learner.save(str(tmp_path / "checkpoints"), 1, {"cursor": 7})
    assert learner.saved(wait=True).error is None
    other = LearnerActor(config)
    other.start("")
    assert other.load(str(tmp_path / "checkpoints" / "step_000001")) == {"cursor": 7}
    assert other.publish(1).checksum == after
    other.export(str(tmp_path / "policy"))
    exported = publish(
        {
            n: p
            for n, p in JanusPolicy.load(tmp_path / "policy").janus.named_parameters()
            if n in learner.learner.parameters
        },
        1,
    )
    assert exported.checksum == after


def test_saved_samples_show_what_was_drawn_without_what_a_rule_added(config) -> None:
    config.credit.rule = "v2"
    worker = worker_with_weights(config)
    (group,) = groups_of(worker, requests("a photo of two red circles", size=8))
    assert any(len(r.trajectory.segments) == 3 and len(r.images) == 1 for r in group)
    ref = ray.put(group)
    samples = [
        Sample(ref, i, tuple(Score(str(k), 0.5) for k in range(len(r.images))), (float("nan"),), (0.1, 0.2, 0.3))
        for i, r in enumerate(group)
    ]
    worker.save_samples(config.run.dir, 3, samples)
    (step,) = read_rollouts(config.run.dir)
    assert step.step == 3
    for row, rollout in zip(step.rows, group, strict=True):
        kinds = [segment["kind"] for segment in row["segments"]]
        assert kinds.count("image") == len(rollout.images)
        assert row["segments"][1]["score"] is None
