"""Calling sets of actors that die, hang and fail."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
import ray

from roles.group import ActorPool, RoleError
from tests.roles.death import kill

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def worker_class():
    """Defined in a function, so that it travels by value."""

    class Worker:
        def __init__(self, index: int, fails: bool = False) -> None:
            if fails:
                raise ValueError("policy.path: no such folder")
            self.index, self.served, self.greeting = index, 0, ""

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

    return Worker


def pool_of(size: int = 1, fails: bool = False, **options) -> ActorPool:
    actor = ray.remote(worker_class()).options(num_cpus=0.1)
    return ActorPool("worker", lambda index: actor.remote(index, fails), size, **options)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_call_that_loses_its_actor_is_sent_once_more_and_counted(tmp_path) -> None:
    async def scenario() -> None:
        pool = pool_of()
        await pool.start()
        assert await pool.call("die_once", str(tmp_path / "marker"), timeout_s=30) == "survived"
        assert pool.counts() == {"failures/worker/restarts": 1, "failures/worker/retries": 1}
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
        assert pool.counts() == {"failures/worker/restarts": 0, "failures/worker/retries": 0}
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
