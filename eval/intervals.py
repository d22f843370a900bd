"""Bootstrap intervals: how far a figure may lie from the truth, given the items it was taken on.

All are percentile bootstrap intervals (Efron and Tibshirani, An Introduction to the Bootstrap,
1993, section 13.3). Drawing n items with replacement and counting how often each *distinct* outcome
came up is one multinomial draw over the distinct outcomes; recall has two of them, so that 2,000
resamples of 25,000 items cost milliseconds instead of 50 million look-ups. The same view makes an
interval independent of the order of the items, to the last bit.

Known limits: an outcome that never varied (every item right) gives an interval of width zero, and
fewer than about 20 items or groups give intervals that are too narrow.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray

_CELLS_AT_ONCE = 4_000_000
"""Counts held in memory at a time: 32 MB of int64."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval.

    Attributes:
        value: The statistic on the items themselves.
        low: Lower end.
        high: Upper end.
        count: How many items there were (items, not groups).
    """

    value: float
    low: float
    high: float
    count: int


def bootstrap_mean(
    values: Float[ndarray, " items"],
    *,
    groups: Int64[ndarray, " items"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of the items with its interval.

    With `groups`, whole groups are drawn instead of single items (cluster bootstrap; Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 3.8), because items of one
    group, such as five captions of one picture, do not vary independently.

    Raises:
        ValueError: No items, a value that is not finite, or an option out of its range.
    """
    values = _checked(values, resamples=resamples, level=level)
    clusters = _Clusters(values, groups)
    means = [
        (counts @ clusters.sums) / (counts @ clusters.sizes)
        for counts in clusters.draws(resamples, seed=seed)
    ]
    mean = math.fsum(values) / len(values)
    return _interval(mean, np.concatenate(means), count=len(values), level=level)


def bootstrap_median(
    values: Float[ndarray, " items"],
    *,
    groups: Int64[ndarray, " items"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Median of the items with its interval; options and errors as in :func:`bootstrap_mean`."""
    values = _checked(values, resamples=resamples, level=level)
    clusters = _Clusters(values, groups)
    order = np.argsort(clusters.values, kind="stable")
    ascending, owner = clusters.values[order], clusters.owners[order]
    medians = []
    for counts in clusters.draws(resamples, seed=seed):
        reached = np.cumsum(counts[:, owner], axis=1)
        total = reached[:, -1:]
        lower = np.argmax(reached >= (total + 1) // 2, axis=1)
        upper = np.argmax(reached >= total // 2 + 1, axis=1)
        medians.append((ascending[lower] + ascending[upper]) / 2)
    median = float(np.median(values))
    return _interval(median, np.concatenate(medians), count=len(values), level=level)


def bootstrap_difference(
    a: Float[ndarray, " items"],
    b: Float[ndarray, " items"],
    *,
    groups: Int64[ndarray, " items"] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of `a - b` over the same items, with its interval; it is a real one if 0 is outside.

    Pairing removes what the two share (hard items are hard for both), which two separate intervals
    cannot: they may overlap although the difference is certain. Options and errors as in
    :func:`bootstrap_mean`.
    """
    difference = a.astype(np.float64) - b.astype(np.float64)
    return bootstrap_mean(difference, groups=groups, resamples=resamples, seed=seed, level=level)


class _Clusters:
    """The distinct groups of outcomes, each with the number of times it occurs.

    `sums` and `sizes` are per distinct group; `values` lists the outcomes of all distinct
    groups one after the other, `owners` the distinct group each belongs to.
    """

    def __init__(
        self, values: Float[ndarray, " items"], groups: Int64[ndarray, " items"] | None
    ) -> None:
        if groups is None:
            self.values, frequency = np.unique(values, return_counts=True)
            self.frequency = frequency
            self.sums = self.values
            self.sizes = np.ones(len(self.values))
            self.owners = np.arange(len(self.values))
            return
        order = np.lexsort((values, groups))
        starts = np.flatnonzero(np.diff(groups[order], prepend=groups[order[0]] - 1))
        members = Counter(part.tobytes() for part in np.split(values[order], starts[1:]))
        distinct = sorted(
            members
        )  # any fixed order makes the draws independent of the items' order
        parts = [np.frombuffer(part, dtype=np.float64) for part in distinct]
        self.frequency = np.array([members[part] for part in distinct])
        self.values = np.concatenate(parts)
        self.sums = np.array([math.fsum(part) for part in parts])
        self.sizes = np.array([float(len(part)) for part in parts])
        self.owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def draws(self, resamples: int, *, seed: int) -> Iterator[Int64[ndarray, "some distinct"]]:
        """Yield how often each distinct group was drawn, a block of resamples at a time."""
        generator = np.random.default_rng(seed)
        total = int(self.frequency.sum())
        at_once = max(1, _CELLS_AT_ONCE // len(self.values))
        for start in range(0, resamples, at_once):
            block = min(at_once, resamples - start)
            yield generator.multinomial(total, self.frequency / total, size=block)


def _checked(
    values: Float[ndarray, " items"], *, resamples: int, level: float
) -> Float[ndarray, " items"]:
    if len(values) == 0:
        raise ValueError("interval: there are no items to average")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"interval: item {bad} is {values[bad]}, not a finite number")
    if resamples < 1:
        raise ValueError(f"interval: resamples must be at least 1, not {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"interval: level must lie between 0 and 1, not {level}")
    return values.astype(np.float64) + 0.0  # turns -0.0 into 0.0: one outcome, not two


def _interval(
    value: float, resampled: Float[ndarray, " resamples"], *, count: int, level: float
) -> Interval:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high), count=count)
