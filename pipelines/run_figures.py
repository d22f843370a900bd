"""The figures of a run's lines as the curves of its page."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.report import Chart, Series

RECENT = 20
"""Lines that speeds and the budget of a step are taken from."""


class Columns:
    """Lines by figure: at which sample, and what; in few bytes, for runs of any length."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[array, array]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in the numbers of a line; what is unknown is left out."""
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "samples"):
                samples, values = self._columns.setdefault(name, (array("d"), array("d")))
                samples.append(line["samples"])
                values.append(value)

    def has(self, name: str) -> bool:
        """Whether a figure was ever known."""
        return name in self._columns

    def names(self) -> list[str]:
        """Of figures, without the ends of their intervals."""
        ends = {f"{name}_{edge}" for name in self._columns for edge in ("low", "high")}
        return [name for name in self._columns if name not in ends]

    def column(self, name: str) -> tuple[Sequence[float], Sequence[float]]:
        """Samples and values of a figure."""
        return self._columns.get(name, (array("d"), array("d")))

    def recent(self, name: str) -> float | None:
        """The mean of a figure's latest values."""
        _, values = self.column(name)
        latest = values[-RECENT:]
        return sum(latest) / len(latest) if latest else None

    def chart(
        self,
        title: str,
        names: Mapping[str, str],
        unit: str = "",
        *,
        log: bool = False,
        banded: bool = False,
    ) -> Chart | None:
        """A chart of those figures that there are; None where there are none."""
        lines = []
        for name, said in names.items():
            samples, values = self.column(name)
            if not values:
                continue
            ends = [self.column(f"{name}_{edge}")[1] for edge in ("low", "high")]
            whole = banded and all(len(end) == len(values) for end in ends)
            low, high = ends if whole else (None, None)
            lines.append(Series(said, samples, values, low, high))
        if not lines:
            return None
        positive = all(min(line.y) > 0 for line in lines)
        return Chart(title, lines, unit=unit, log=log and positive)


def is_rank(name: str) -> bool:
    """Whether a figure is a rank, of which 1 is the best; else it is a fraction."""
    return name.endswith("_rank")


def in_words(name: str) -> str:
    """A figure's name for readers.

    >>> in_words("unseen/image_to_text_recall@5"), in_words("mean_per_class_recall")
    ('unseen: image to text recall@5', 'mean per class recall')
    """
    title, slash, figure = name.rpartition("/")
    return f"{title}{': ' if slash else ''}{figure.replace('_', ' ')}"


def grouped(names: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Figures that belong on one chart, by its title and unit; each with its own short name."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        title, slash, figure = name.rpartition("/")
        above = f"{title}: " if slash else ""
        stem, at, k = figure.partition("@")
        if at:
            group, said = (in_words(stem), "fraction"), f"@{k}"
        elif is_rank(figure):
            direction = figure.removesuffix("_median_rank")
            group, said = ("median rank", "rank"), in_words(direction)
        else:
            group, said = ("accuracy", "fraction"), in_words(figure).removeprefix("mean ")
        heading = above + group[0]
        groups.setdefault((heading[:1].upper() + heading[1:], group[1]), {})[name] = said
    return groups
