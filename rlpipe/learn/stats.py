"""Metrics as sums, counts and maxima, so that they add up over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable


class Stats:
    """Three kinds of numbers under their metric names.

    total:   a part of a sum (a loss term that is already divided by its denominator).
    mean:    a sum and its count; the value is their quotient and absent where nothing was counted.
    maximum: the largest value seen.

        stats.mean("kl/image", kl.sum(), kl.numel())
        stats.values()    # {"kl/image": 0.013}
    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._means: dict[str, tuple[float, float]] = {}
        self._maxima: dict[str, float] = {}

    def total(self, name: str, value: float) -> None:
        self._totals[name] = self._totals.get(name, 0.0) + float(value)

    def mean(self, name: str, value_sum: float, count: float) -> None:
        known_sum, known_count = self._means.get(name, (0.0, 0.0))
        self._means[name] = (known_sum + float(value_sum), known_count + float(count))

    def maximum(self, name: str, value: float) -> None:
        known, value = self._maxima.get(name, float("-inf")), float(value)
        # A NaN stays, whichever comes first: `max` would drop one that comes second.
        self._maxima[name] = value if value > known or math.isnan(value) else known

    def merge(self, others: Iterable[Stats]) -> Stats:
        """Add the numbers of others to these; returns self."""
        for other in others:
            for name, value in other._totals.items():
                self.total(name, value)
            for name, (value_sum, count) in other._means.items():
                self.mean(name, value_sum, count)
            for name, value in other._maxima.items():
                self.maximum(name, value)
        return self

    def values(self) -> dict[str, float]:
        means = {name: s / n for name, (s, n) in self._means.items() if n}
        return {**self._totals, **means, **self._maxima}
