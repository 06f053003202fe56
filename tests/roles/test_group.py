"""Calling sets of actors that die, hang and fail."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray import ObjectRef

from roles.group import ActorPool, RoleError
from tests.roles.death import kill

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def worker_class():
    """Defined in a function, so that it travels by value."""

    class Worker:
        def __init__(self, index: int, fails: bool = False) -> None:
            if fails:
                raise ValueError("policy.path: no such folder")
            self.index, self.served, self.greeting, self.under_way = index, 0, "", 0

        def ready(self) -> int:
            return os.getpid()

        def greet(self, word: str) -> None:
            self.greeting = word

        def add(self, a: int, b: int = 0) -> tuple[int, str]:
            self.served += 1
            return a + b, self.greeting

        def pair(self, a: int) -> tuple[int, int]:
            return a, a * a

        def sleep(self, seconds: float) -> int:
            time.sleep(seconds)
            return self.index

        def die(self) -> None:
            os._exit(1)

        def die_once(self, marker: str) -> str:
            if not os.path.exists(marker):
                open(marker, "w").close()
                os._exit(1)
            return "survived"

        def refuse(self) -> None:
            raise KeyError("bad input")

        def overlap(self, seconds: float) -> int:
            """The calls that were under way when this one began, itself included."""
            self.under_way += 1
            seen = self.under_way
            time.sleep(seconds)
            self.under_way -= 1
            return seen

        def count_to(self, last: int, marker: str = "", end: str = "") -> Iterator[Any]:
            """Pairs (text, number); at the second it ends as asked, unless the marker file is there already."""
            for number in range(last):
                if number == 1 and end and not os.path.exists(marker):
                    open(marker, "w").close()
                    {"die": self.die, "refuse": self.refuse, "sleep": lambda: time.sleep(30)}[end]()
                yield f"object {number}"
                yield number

    return Worker


def pool_of(size: int = 1, fails: bool = False, **options) -> ActorPool:
    actor = ray.remote(worker_class()).options(num_cpus=0.1, max_concurrency=options.get("slots", 0) + 1)
    return ActorPool("worker", lambda index: actor.remote(index, fails), size, **options)


def counts_of(pool: ActorPool) -> tuple[int, int, int]:
    counts = pool.counts()
    return tuple(counts[f"failures/worker/{name}"] for name in ("restarts", "retries", "given_up"))


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_call_that_loses_its_actor_is_sent_once_more_and_counted(tmp_path) -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        assert await pool.call("die_once", str(tmp_path / "marker"), timeout_s=30) == "survived"
        assert counts_of(pool) == (1, 1, 0)
        pool.close()

    run(scenario)


def test_a_call_that_kills_every_actor_ends_with_the_role_and_the_call_in_the_error() -> None:
    async def scenario() -> None:
        pool = pool_of(attempts=2)
        await pool.start()
        with pytest.raises(RoleError, match=r"worker\.die: lost 2 times"):
            await pool.call("die", timeout_s=30)
        assert await pool.call("add", 1, 2, timeout_s=30) == (3, "")
        pool.close()

    run(scenario)


def test_an_actor_that_hangs_is_replaced_after_the_timeout() -> None:
    async def scenario() -> None:
        pool = pool_of(attempts=1)
        await pool.start()
        before = await pool.call("ready", timeout_s=30)
        with pytest.raises(RoleError, match=r"worker\[0\]\.sleep: no answer within 0\.3 s"):
            await pool.call("sleep", 30.0, timeout_s=0.3)
        assert await pool.call("ready", timeout_s=30) != before
        pool.close()

    run(scenario)


def test_errors_of_the_actors_own_code_come_through_without_a_retry() -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        with pytest.raises(KeyError, match="bad input"):
            await pool.call("refuse", timeout_s=30)
        assert counts_of(pool) == (0, 0, 0)
        pool.close()

    run(scenario)


def test_a_constructor_that_raises_is_told_with_its_own_words_and_not_tried_again() -> None:
    async def scenario() -> None:
        with pytest.raises(RoleError, match=r"worker\[0\] did not start: .*policy\.path: no such folder"):
            await pool_of(fails=True).start()

    run(scenario)


def test_a_replica_gets_its_greeting_before_any_work_also_after_a_restart() -> None:
    async def scenario() -> None:
        pool = pool_of()
        words = iter(["first", "second"])

        async def greet(replica) -> None:
            await replica.ask("greet", next(words), timeout_s=30)

        pool.on_start = greet
        await pool.start()
        assert await pool.call("add", 1, timeout_s=30) == (1, "first")
        await kill(pool.replicas[0].handle)
        assert await pool.call("add", 1, timeout_s=30) == (1, "second")
        pool.close()

    run(scenario)


def test_two_replicas_share_the_calls_and_each_does_one_at_a_time() -> None:
    async def scenario() -> None:
        pool = pool_of(2)
        await pool.start()
        started = time.monotonic()
        served = await asyncio.gather(*(pool.call("sleep", 0.4, timeout_s=30) for _ in range(4)))
        assert sorted(served) == [0, 0, 1, 1]
        assert time.monotonic() - started >= 0.8
        pool.close()

    run(scenario)


def test_further_returns_stay_references() -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        first, second = await pool.call("pair", 7, timeout_s=30, num_returns=2)
        assert first == 7 and isinstance(second, ray.ObjectRef) and await second == 49
        pool.close()

    run(scenario)


def test_a_broken_pool_raises_its_error_at_every_later_call() -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        await kill(pool.replicas[0].handle)
        with pytest.raises(RoleError, match=r"worker\.add"):
            await pool.broadcast("add", 1, timeout_s=30)
        with pytest.raises(RoleError, match=r"worker\.add"):
            await pool.broadcast("add", 1, timeout_s=30)
        pool.close()

    run(scenario)


def test_the_idle_share_is_the_part_of_the_time_without_a_call() -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        pool.idle_share()
        await pool.call("sleep", 0.3, timeout_s=30)
        await asyncio.sleep(0.3)
        assert 0.3 < pool.idle_share() < 0.7
        pool.close()

    run(scenario)


def test_a_replica_with_slots_does_that_many_calls_at_once_and_no_more() -> None:
    async def scenario() -> None:
        pool = pool_of(2, slots=2)
        await pool.start()
        overlaps = await asyncio.gather(*(pool.call("overlap", 0.1, timeout_s=30) for _ in range(12)))
        assert max(overlaps) == 2
        assert [replica.free for replica in pool.replicas] == [2, 2]
        pool.close()

    run(scenario)


def test_all_calls_of_a_dead_replica_are_asked_again_and_its_slots_come_back_once() -> None:
    async def scenario() -> None:
        pool = pool_of(2, slots=3)
        await pool.start()
        calls = [asyncio.ensure_future(pool.call("overlap", 1.0, timeout_s=30)) for _ in range(10)]
        await asyncio.sleep(0.3)
        await kill(pool.replicas[0].handle)
        assert len(await asyncio.gather(*calls)) == 10 and max(call.result() for call in calls) <= 3
        await pool.revive(pool.replicas[0])
        assert [replica.free for replica in pool.replicas] == [3, 3]
        assert counts_of(pool) == (1, 3, 0)
        overlaps = await asyncio.gather(*(pool.call("overlap", 0.1, timeout_s=30) for _ in range(12)))
        assert max(overlaps) <= 3
        pool.close()

    run(scenario)


def test_cancelled_calls_give_their_slots_back() -> None:
    async def scenario() -> None:
        pool = pool_of(slots=2)
        await pool.start()
        calls = [asyncio.ensure_future(pool.call("sleep", 0.2, timeout_s=30)) for _ in range(5)]
        await asyncio.sleep(0.1)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert pool.replicas[0].free == 2
        assert await pool.call("add", 1, 2, timeout_s=30) == (3, "")
        pool.close()

    run(scenario)


def test_a_pool_goes_on_with_the_replicas_that_are_left_and_breaks_without_any() -> None:
    async def scenario() -> None:
        pool = pool_of(2, failures=0)
        await pool.start()
        for left in (1, 0):
            await kill(pool.replicas[0].handle)
            if left:
                answers = await asyncio.gather(*(pool.call("add", 1, timeout_s=30) for _ in range(4)))
                assert answers == [(1, "")] * 4
            else:
                with pytest.raises(RoleError, match=r"worker\[1\]: 1 losses in a row; last: ActorDiedError"):
                    await pool.call("add", 1, timeout_s=30)
            assert len(pool.replicas) == left
        with pytest.raises(RoleError, match=r"worker\[1\]: 1 losses in a row"):
            await pool.call("add", 1, timeout_s=30)
        assert counts_of(pool) == (2, 2, 2)
        pool.close()

    run(scenario)


def follow(pool: ActorPool, *args: Any, timeout_s: float = 30) -> tuple[Any, list[list[tuple[int, ObjectRef]]]]:
    """The awaitable of a stream, and what came by attempt."""
    attempts: list[list[tuple[int, ObjectRef]]] = []

    def begin():
        attempts.append([])
        return lambda record, reference: attempts[-1].append((record, reference))

    return pool.stream("count_to", *args, timeout_s=timeout_s, begin=begin), attempts


def test_a_stream_hands_on_each_record_with_a_reference_as_they_come() -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        stream, attempts = follow(pool, 3)
        await stream
        assert [[record for record, _ in attempt] for attempt in attempts] == [[0, 1, 2]]
        assert [await reference for _, reference in attempts[0]] == ["object 0", "object 1", "object 2"]
        assert pool.replicas[0].free == 1
        pool.close()

    run(scenario)


@pytest.mark.parametrize(("end", "timeout_s"), [("die", 30), ("sleep", 2.0)])
def test_a_stream_that_is_lost_midway_starts_again_on_another_actor(tmp_path, end, timeout_s) -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        stream, attempts = follow(pool, 3, str(tmp_path / "marker"), end, timeout_s=timeout_s)
        await stream
        lost, whole = [[record for record, _ in attempt] for attempt in attempts]
        # What an actor sent right before its end may be lost with it.
        assert lost in ([0], [] if end == "die" else [0]) and whole == [0, 1, 2]
        assert counts_of(pool) == (1, 1, 0)
        pool.close()

    run(scenario)


def test_an_error_of_the_actors_own_code_ends_a_stream(tmp_path) -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        stream, attempts = follow(pool, 3, str(tmp_path / "marker"), "refuse")
        with pytest.raises(KeyError, match="bad input"):
            await stream
        assert [[record for record, _ in attempt] for attempt in attempts] == [[0]]
        assert counts_of(pool) == (0, 0, 0) and pool.replicas[0].free == 1
        pool.close()

    run(scenario)
