"""Two reports side by side: which differences are real."""

import numpy as np

from eval.intervals import bootstrap_difference
from eval.results import Figure, Report


def compare(a: Report, b: Report, *, resamples: int = 2000, seed: int = 0) -> Report:
    """Differences `a - b` of every figure both have item by item, with paired bootstrap intervals.

    Both reports must be of the same task under the same protocol, and still hold their outcomes,
    which live in memory only. A difference is real, at the 5 % level, where its interval leaves
    out 0.

    Raises:
        ValueError: The protocols differ (the line names in what), or outcomes are missing.
    """
    if a.task != b.task:
        raise ValueError(f"cannot compare {a.task} with {b.task}: not the same task")
    keys = sorted(a.protocol.keys() | b.protocol.keys())
    if differing := [key for key in keys if a.protocol.get(key) != b.protocol.get(key)]:
        listed = "; ".join(
            f"{key}: {a.protocol.get(key)} / {b.protocol.get(key)}" for key in differing
        )
        raise ValueError(f"cannot compare these {a.task} reports, protocols differ in {listed}")
    names = [
        figure.name
        for figure in a.figures
        if figure.name in a.outcomes and figure.name in b.outcomes
    ]
    if not names:
        raise ValueError(f"cannot compare these {a.task} reports: evaluate both in one process")
    figures = []
    for name in names:
        one, other = a.outcomes[name], b.outcomes[name]
        if len(one.values) != len(other.values) or not _same_groups(one.groups, other.groups):
            raise ValueError(f"cannot compare {name}: the reports are not on the same items")
        interval = bootstrap_difference(
            one.values, other.values, groups=one.groups, resamples=resamples, seed=seed
        )
        figure = a[name]
        figures.append(
            Figure.of(
                name,
                interval,
                unit="points" if figure.unit == "fraction" else figure.unit,
                higher_is_better=figure.higher_is_better,
            )
        )
    return Report(
        task=a.task,
        figures=tuple(figures),
        protocol={**a.protocol, "comparison": "paired bootstrap", "resamples": resamples},
        title=f"{a.title or a.task} minus {b.title or b.task}",
    )


def _same_groups(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)
