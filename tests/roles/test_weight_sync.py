"""Weights on their way to the workers, through the object store and by a channel: identical, checked, acknowledged."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Prompt
from roles.buckets import WeightError, fill, write
from roles.group import ActorPool, RoleError
from roles.rollout import RolloutWorker
from roles.weight_sync import WeightSync
from roles.weights import install, publish
from roles.work import Ack, GroupRequest
from tests.roles.death import kill

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def some_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.bias": torch.randn(7, generator=generator),
        "a.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "c.scale": torch.randn((), generator=generator),
        "d.weight": torch.randn(64, 33, generator=generator),
    }


def blank(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in weights.items()}


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 20])
def test_published_weights_arrive_bit_for_bit_whatever_the_size_of_the_buckets(bucket_bytes: int) -> None:
    weights = some_weights()
    model = blank(weights)
    manifest = publish(weights, 3, bucket_bytes)
    assert install(manifest, model) == Ack(3, manifest.checksum)
    assert all(torch.equal(model[name], weights[name]) for name in weights)


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_a_holder_of_some_tensors_acknowledges_the_whole_version_and_checks_its_part(bucket_bytes: int) -> None:
    weights = some_weights()
    manifest = publish(weights, 3, bucket_bytes)
    part = {"d.weight": torch.zeros_like(weights["d.weight"]), "own": torch.zeros(2)}
    assert install(manifest, part, some=True) == Ack(3, manifest.checksum)
    assert torch.equal(part["d.weight"], weights["d.weight"]) and not part["own"].any()
    damaged = [np.array(ray.get(bucket)) for bucket in manifest.buckets]
    damaged[-1][-1] ^= 1  # the end of d.weight
    with pytest.raises(WeightError, match="checksum"):
        install(replace(manifest, buckets=tuple(map(ray.put, damaged))), part, some=True)


def test_slots_never_overlap_and_a_bucket_holds_no_more_than_it_may() -> None:
    ends = {}
    slots = [
        s
        for b in fill(some_weights().items(), lambda _, n: torch.zeros(n, dtype=torch.uint8), None, 200)
        for s in b.slots
    ]
    for slot in slots:
        assert slot.offset >= ends.get(slot.bucket, 0)
        ends[slot.bucket] = slot.end
        assert slot.offset == 0 or slot.end <= 200
    assert [slot.name for slot in slots] == list(some_weights())


def test_damaged_bytes_are_refused() -> None:
    weights = some_weights()
    manifest = publish(weights, 1)
    bytes_ = np.array(ray.get(manifest.buckets[0]))
    bytes_[-1] ^= 1
    with pytest.raises(WeightError, match=r"version 1: bucket 0, d.weight: checksum"):
        install(replace(manifest, buckets=(ray.put(bytes_),)), blank(weights))


def test_buckets_in_each_others_place_are_refused() -> None:
    weights = {name: torch.full((64,), value) for name, value in (("a", 1.0), ("b", 2.0))}
    manifest = publish(weights, 1, bucket_bytes=1)
    with pytest.raises(WeightError, match="bucket 0, a: checksum"):
        install(replace(manifest, buckets=manifest.buckets[::-1]), blank(weights))


@pytest.mark.parametrize("size", [3, 1023, 300_001])
def test_every_changed_byte_and_every_moved_block_changes_the_checksum(size: int) -> None:
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(source)
    original = write(source, target)
    assert torch.equal(source, target)
    for place in (0, size // 2, size - 1):
        changed = source.clone()
        changed[place] ^= 1
        assert write(changed, target) != original
    if size > 8192:
        assert write(torch.cat([source[4096:8192], source[:4096], source[8192:]]), target) != original


def test_what_is_copied_in_another_type_has_the_checksum_of_that_type() -> None:
    source = torch.randn(500, 1001)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    own = write(source, target)
    assert torch.equal(target, source.bfloat16()) and own == write(target.clone(), torch.empty_like(target))


@pytest.mark.parametrize(
    "change", [lambda t: t.double(), lambda t: t[:-1], lambda t: None], ids=["type", "shape", "missing"]
)
def test_a_model_that_does_not_fit_is_refused_by_the_tensors_name(change) -> None:
    weights = some_weights()
    model = {**blank(weights), "d.weight": change(blank(weights)["d.weight"])}
    if model["d.weight"] is None:
        del model["d.weight"]
    with pytest.raises(WeightError, match="d.weight"):
        install(publish(weights, 1), model)


@pytest.fixture
def worker(config_for, prompts_file, tmp_path) -> RolloutWorker:
    return RolloutWorker(config_for(tmp_path, prompts_file))


def request() -> GroupRequest:
    return GroupRequest(5, Prompt("p", "a photo of two red circles"), 2, seed=0)


def trained_parts(policy: JanusPolicy, noise: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = {n: p for n, p in policy.janus.named_parameters() if "language_model" in n or "generation" in n}
    return {name: p.detach() + noise * torch.randn_like(p) for name, p in named.items()}


def test_a_worker_serves_nothing_before_its_first_version_and_only_the_one_it_holds(worker) -> None:
    with pytest.raises(WeightError, match="holds no version"):
        next(worker.generate(0, [request()]))
    manifest = publish(trained_parts(worker.policy, 0.0), 4)
    assert worker.load_weights(manifest) == Ack(4, manifest.checksum)
    next(worker.generate(4, [request()]))
    with pytest.raises(WeightError, match="asked to work with version 5, holds version 4"):
        next(worker.generate(5, [request()]))
    with pytest.raises(WeightError, match="checksum"):
        worker.load_weights(replace(manifest, checksum=1))
    with pytest.raises(WeightError, match="holds no version"):
        next(worker.generate(4, [request()]))


def test_new_weights_change_what_a_worker_draws_and_old_ones_bring_it_back(worker) -> None:
    first, second = (publish(trained_parts(worker.policy, noise), v) for v, noise in ((1, 0.0), (2, 0.5)))

    def draw(manifest) -> np.ndarray:
        worker.load_weights(manifest)
        *_, group, _, _, _ = worker.generate(manifest.version, [request()])
        return np.stack([rollout.trajectory.segments[0].logprobs for rollout in group])

    original = draw(first)
    assert not np.array_equal(draw(second), original)
    assert np.array_equal(draw(first), original)


def holder_class():
    class Holder:
        """Acknowledges weights as a rollout worker does; a broken one never rightly."""

        def __init__(self, broken: bool) -> None:
            self.broken, self.version = broken, None

        def ready(self) -> None:
            pass

        def load_weights(self, manifest) -> Ack:
            self.version = manifest.version
            return Ack(manifest.version, 0 if self.broken else manifest.checksum)

        def held(self, expected: int) -> tuple[int, int]:
            return expected, self.version

    return Holder


def holders(broken: bool = False, size: int = 2, **options) -> ActorPool:
    actor = ray.remote(holder_class()).options(num_cpus=0.1)
    return ActorPool("rollout", lambda index: actor.remote(broken), size, **options)


def test_every_worker_acknowledges_and_one_that_died_gets_the_weights_before_any_work() -> None:
    async def scenario() -> None:
        pool = holders()
        sync = WeightSync(pool, 30)
        await pool.start()
        await sync.send(publish(some_weights(), 1))
        await kill(pool.replicas[0].handle)
        held = [await pool.call("held", timeout_s=30, before=lambda r: (sync.version_of(r),)) for _ in range(4)]
        assert held == [(1, 1)] * 4
        await kill(pool.replicas[1].handle)
        await sync.send(publish(some_weights(), 2))
        assert await pool.broadcast("held", 2, timeout_s=30) == [(2, 2), (2, 2)]
        assert sync.version == 2
        pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_worker_that_acknowledges_something_else_is_named() -> None:
    async def scenario() -> None:
        pool = holders(broken=True, size=1)
        sync = WeightSync(pool, 30)
        await pool.start()
        with pytest.raises(RoleError, match=r"no acknowledgement from rollout\[0\]"):
            await sync.send(publish(some_weights(), 1))
        assert sync.version == -1
        pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_worker_that_is_given_up_is_not_waited_for_as_long_as_there_is_another() -> None:
    async def scenario() -> None:
        pool = holders(failures=0)
        sync = WeightSync(pool, 30)
        await pool.start()
        await kill(pool.replicas[0].handle)
        await sync.send(publish(some_weights(), 1))
        assert [replica.name for replica in pool.replicas] == ["rollout[1]"] and sync.version == 1
        await kill(pool.replicas[0].handle)
        with pytest.raises(RoleError, match=r"no acknowledgement from rollout\[1\]; .*1 losses in a row"):
            await sync.send(publish(some_weights(), 2))
        pool.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
