"""Weights by a collective channel: identical to those of the object store, whoever dies on the way."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from roles.buckets import WeightError, fill
from roles.channel import ChannelBroken, Meeting, Member
from roles.group import RoleError
from roles.learner import LearnerActor
from roles.weights import Publisher, Receiver
from roles.work import Ack, Channel, Invitation
from tests.roles.crew import Crew, blank, weights_of
from tests.roles.death import kill
from tests.roles.office import Office

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def channel_of(size: int, timeout_s: float = 20.0) -> tuple[Meeting, Channel]:
    meeting = Meeting(timeout_s)
    return meeting, meeting.open(size, "gloo", None)


def test_all_members_receive_the_same_bytes_version_after_version() -> None:
    meeting, channel = channel_of(3)
    publisher, receivers, models = Publisher(None, 1000), [Receiver(20.0) for _ in range(2)], [blank(), blank()]
    with ThreadPoolExecutor(2) as threads:
        for version in (4, 5):
            acks = [threads.submit(receivers[i].take, Invitation(channel, 1 + i, version), models[i]) for i in range(2)]
            manifest = publisher.publish(weights_of(version).items(), version, channel)
            assert [ack.result() for ack in acks] == [Ack(version, manifest.checksum)] * 2
            assert all(torch.equal(model[n], t) for model in models for n, t in weights_of(version).items())
    assert manifest.buckets == () and len({slot.bucket for slot in manifest.slots}) > 1


def test_a_bucket_that_is_not_what_its_checksum_says_is_refused() -> None:
    meeting, channel = channel_of(2)

    def send() -> None:
        member = Member(channel, 0)
        (bucket,) = fill(weights_of(1).items(), lambda _, nbytes: torch.zeros(nbytes, dtype=torch.uint8))
        bucket.data[200] ^= 1  # in c
        member.send(1, bucket)
        member.send(1, None)

    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(send)
        with pytest.raises(WeightError, match="version 1: bucket 0, c: checksum"):
            Receiver(20.0).take(Invitation(channel, 1, 1), blank())
        sent.result()


def test_another_version_than_the_one_asked_for_is_refused() -> None:
    meeting, channel = channel_of(2)
    with ThreadPoolExecutor(1) as threads:
        member = threads.submit(Member, channel, 1)
        Publisher().publish(weights_of(1).items(), 1, channel)
        with pytest.raises(ChannelBroken, match="bucket 0 of version 1 came for bucket 0 of version 2"):
            list(member.result().receive(2))


def test_who_waits_for_a_member_that_does_not_come_is_freed() -> None:
    meeting, channel = channel_of(2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(Member, channel, 0)
        time.sleep(0.1)
        meeting.end(channel)
        with pytest.raises(ChannelBroken, match="a member is lost"):
            waiting.result(5)
    meeting, channel = channel_of(2, 1.0)
    with pytest.raises(ChannelBroken, match=r"1 of 2 members came within 1 s"):
        Member(channel, 0)


def test_who_turns_to_the_object_store_says_why_once(caplog) -> None:
    meeting, channel = channel_of(9)
    meeting.end(channel)
    publisher, receiver, model = Publisher(), Receiver(20.0), blank()
    learner = SimpleNamespace(share=SimpleNamespace(remote=lambda: ray.put(publisher.share())))
    for version in (1, 2):
        publisher.publish(weights_of(version).items(), version, channel)
        ack = receiver.take(Invitation(replace(channel, learner=learner), 1, version), model)
        assert (ack.version, ack.as_asked) == (version, False)
    told = [line for line in caplog.messages if "a member is lost" in line]
    assert sorted("version 1" in line for line in told) == [False, True], "the learner and the worker, once each"


def test_frozen_parts_do_not_travel(config_for, prompts_file, tmp_path: Path) -> None:
    config = config_for(tmp_path, prompts_file)
    config.policy.trainable = ["language_model"]
    learner = LearnerActor(config)
    learner.start("")
    names = {slot.name for slot in learner.publish(0).slots}
    assert names and all(name.startswith("model.language_model.") for name in names)


@pytest.mark.slow
def test_a_worker_that_came_back_is_brought_to_the_version_that_went_by_the_channel() -> None:
    crew = Crew()

    async def scenario() -> None:
        first = await crew.update(1)
        await crew.check(1, [True, True])
        assert await crew.update(2) == first
        await kill(crew.pool.replicas[0].handle)
        # Its death shows at the next call of it; the one that is made in its place gets the weights first.
        assert (await crew.pool.call("held", timeout_s=20))[0].version == 2
        await crew.pool.revive(crew.pool.replicas[0])
        assert crew.pool.restarts == 1
        await crew.check(2, [True, True])
        assert await crew.update(3) != first
        await crew.check(3, [True, True])

    crew.run(scenario)


@pytest.mark.slow
def test_a_worker_that_dies_amid_a_transfer_costs_the_others_the_channel_and_not_the_version() -> None:
    crew = Crew("dies")

    async def scenario() -> None:
        first = await crew.update(1)
        assert crew.pool.restarts == 1
        held = await crew.pool.broadcast("held", timeout_s=20)
        await crew.check(1, [ack.as_asked for ack, _ in held])  # the other may have had it all before
        assert crew.sync.fallbacks == (not held[1][0].as_asked)
        assert await crew.update(2) != first
        await crew.check(2, [True, True])

    crew.run(scenario)


@pytest.mark.slow
def test_a_worker_that_was_dead_before_the_transfer_does_not_hold_up_the_others() -> None:
    crew = Crew(failures=0)

    async def scenario() -> None:
        await crew.update(1)
        await kill(crew.pool.replicas[0].handle)
        await crew.update(2)
        assert [replica.name for replica in crew.pool.replicas] == ["rollout[1]"]
        await crew.check(2, [False])
        await crew.update(3)
        await crew.check(3, [True])

    crew.run(scenario)


@pytest.mark.slow
def test_workers_that_do_not_answer_are_named() -> None:
    crew = Crew("hangs", timeout_s=1.0, size=1, failures=0)

    async def scenario() -> None:
        with pytest.raises(RoleError, match=r"version 1: no acknowledgement from rollout\[0\]; .* within 2 s"):
            await crew.update(1)
        assert crew.sync.version == -1

    crew.run(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_by_gloo_has_the_numbers_of_a_run_by_the_object_store(
    config_for, prompts_file, tmp_path: Path, staleness: int
) -> None:
    office = Office(config_for(tmp_path, prompts_file))
    try:
        runs = [
            office.train(office.config(tmp_path / t, sync__transport=t, max_staleness=staleness))
            for t in ("object_store", "gloo")
        ]
    finally:
        office.close()
    assert len(runs[0]) == len(runs[1]) == 4
    if staleness == 0:
        assert runs[0] == runs[1]
