"""Which rows are drawn next, where there are more of them than a worker has memory for.

After each image and the look at it, rows that are done leave, and those that draw again wait. As soon as as many wait
as may be drawn at once they are drawn together, whatever wave they come from; until then new rows take the places. So
every batch but the last few is full, and no row is read through another row's padding: redraws look back at two to
three times as many slots as first images, which docs/rollout.md weighs against batches that hold both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from rlpipe.rollout.batch import Batch
from rlpipe.rollout.wave import Wave


class Schedule:
    """The rows of a batch in turns of at most `limit` rows each.

    together: names of rows; those of one name are looked at in one turn. None: every row is by itself.

        schedule = Schedule(batch, 16)
        while (turn := schedule.turn()) is not None:
            wave, contexts = turn
            for part in schedule.parts(wave):
                part.said, part.rooms = batch.look(part), rooms
                schedule.wait(part.pick(those_that_said_no))
    """

    def __init__(self, batch: Batch, limit: int, together: Sequence[str] | None = None) -> None:
        self.batch, self.limit, self.together = batch, limit, together
        self.queue = self._units()
        self._waiting: dict[int, list[Wave]] = {}
        self._settled: set[Wave] = set()

    def _units(self) -> list[list[int]]:
        """Rows that start in one turn: those that share a first image, or are to be looked at together."""
        units: dict[object, list[int]] = {}
        for row, name in enumerate(self.together or self.batch.first_images):
            units.setdefault(name, []).append(row)
        largest = max(map(len, units.values()))
        if self.together is not None and largest > self.limit:
            raise ValueError(
                f"rollout.rows: {self.limit} is fewer than the {largest} rows of one prompt, which "
                f"rollout.reflection_room group looks at together; give {largest} or more, or another reflection_room"
            )
        return list(units.values())

    @property
    def waiting(self) -> int:
        """Rows that are to be drawn again."""
        return sum(len(wave) for waves in self._waiting.values() for wave in waves)

    def turn(self) -> tuple[Wave, torch.Tensor | None] | None:
        """One more image for some rows, and what `Batch.redraw` says beside them; None when all rows are done."""
        if self.queue and self.waiting < self.limit:
            self._settle()
            return self.batch.draw(self._admitted()), None
        if not self.waiting:
            return None
        taken = self._taken()
        self._settle()
        return self.batch.redraw(taken)

    def parts(self, wave: Wave) -> Iterator[Wave]:
        """The rows of a wave, at most `limit` at a time."""
        part: list[int] = []
        for unit in self._units_of(wave):
            if part and len(part) + len(unit) > self.limit:
                yield wave.pick(part)
                part = []
            part += unit
        if part:
            yield wave.pick(part)

    def wait(self, wave: Wave) -> None:
        """Have rows drawn again; they were looked at."""
        units = [range(len(wave))] if self.together is None else self._units_of(wave)
        for unit in units:
            # With `history: all` a later image has far more before it than an earlier one.
            stage = wave.rounds[unit[0]] if self.batch.sampling.history == "all" else 0
            self._waiting.setdefault(stage, []).append(wave.pick(unit))

    def _units_of(self, wave: Wave) -> list[list[int]]:
        """Entries of a wave that stay together, which stand side by side."""
        names = wave.rows if self.together is None else [self.together[row] for row in wave.rows]
        return [list(unit) for _, unit in groupby(range(len(wave)), key=names.__getitem__)]

    def _admitted(self) -> list[int]:
        """The next rows of the queue: at most `limit` first images."""
        first, rows, images = self.batch.first_images, [], set()
        while self.queue:
            more = images | {first[row] for row in self.queue[0]}
            if images and len(more) > self.limit:
                break
            rows, images = rows + self.queue.pop(0), more
        return rows

    def _taken(self) -> list[Wave]:
        """Waiting rows of one stage, those that have waited longest first, at most `limit`."""
        sizes = {stage: sum(map(len, waves)) for stage, waves in self._waiting.items()}
        most = max(sizes, key=sizes.get)
        # Without new rows an early stage goes first, for it hands rows on to the next.
        stage = most if self.queue or sizes[most] >= self.limit else min(sizes)
        waves, taken, room = self._waiting.pop(stage), [], self.limit
        while waves and (self.together is None or len(waves[0]) <= room) and room:
            wave = waves.pop(0)
            if len(wave) > room:
                waves.insert(0, wave.pick(range(room, len(wave))))
                wave = wave.pick(range(room))
            taken.append(wave)
            room -= len(wave)
        if waves:
            self._waiting[stage] = waves
        return taken

    def _settle(self) -> None:
        """Give rows that go on waiting memory of their own, so that the rest of their waves' is free again."""
        for waves in self._waiting.values():
            waves[:] = [wave if wave in self._settled else wave.copied(self.batch.guided) for wave in waves]
        self._settled = {wave for waves in self._waiting.values() for wave in waves}
