"""The last save of a run: tried once more where it failed, and told where there is none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rlpipe.config import Config
from rlpipe.learn.checkpoint import CheckpointError
from rlpipe.learn.saver import Saved
from roles.placement import learner_demands
from roles.trainer import Trainer

DISK_FULL = "OSError: No space left on device"


class Ranks:
    """Answers as ranks do whose saves go on in the background and end so, one after the other."""

    def __init__(self, *errors: str | None) -> None:
        self.errors, self.under_way = list(errors), None

    async def broadcast(self, method: str, *args, timeout_s: float) -> list:
        if method == "save":
            self.under_way = Saved(args[1], 0.1, self.errors.pop(0))
            return [None]
        saved = self.under_way if args[0] else None
        return [saved]


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    config = Config()
    config.run.dir = str(tmp_path)
    trainer = Trainer(config, learner_demands(config)["learner"])
    trainer.step, trainer.said = 3, []
    trainer.say = trainer.said.append
    return trainer


def train(trainer: Trainer, ranks: Ranks, error: Exception | None = None) -> None:
    """To the end, or to an error, with a save of the last step under way."""
    trainer.ranks = ranks

    async def scenario() -> None:
        async with trainer.saving(dict):
            await trainer.save({})
            if error is not None:
                raise error

    asyncio.run(scenario())


def test_a_last_save_that_fails_once_is_made_up_for(trainer: Trainer) -> None:
    ranks = Ranks(DISK_FULL, None)
    train(trainer, ranks)
    assert trainer.saved_step == 3 and not ranks.errors and trainer.failed_saves == 1


def test_a_run_whose_last_step_is_not_on_disk_ends_with_an_error(trainer: Trainer) -> None:
    ranks = Ranks(DISK_FULL, DISK_FULL, None)
    with pytest.raises(CheckpointError, match=f"no checkpoint of step 3: {DISK_FULL}; the newest usable one is none"):
        train(trainer, ranks)
    assert ranks.errors == [None], "tried once more, and no more"


@pytest.mark.parametrize(("second", "told"), [(None, "checkpoint of step 3 saved"), (DISK_FULL, "newest usable")])
def test_a_save_that_fails_while_the_run_stops_is_tried_once_more(trainer: Trainer, second, told: str) -> None:
    ranks = Ranks(DISK_FULL, second)
    with pytest.raises(ZeroDivisionError):
        train(trainer, ranks, ZeroDivisionError())
    assert not ranks.errors and told in trainer.said[-1]
