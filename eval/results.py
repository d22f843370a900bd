"""What an evaluation says: figures with intervals, the protocol behind them, their JSON form."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int64
from numpy import ndarray

from eval.intervals import Interval

SCHEMA_VERSION = 1
"""Version of the JSON form of a report; a reader refuses any other."""


@dataclass(frozen=True)
class Figure:
    """One measured number with its 95 % interval.

    Attributes:
        name: What was measured, e.g. `image_to_text_recall@1`.
        value: The point estimate, in `unit`.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        count: How many items (queries, images) were averaged.
        chance: What guessing without looking would reach, where that can be said exactly.
        unit: `fraction` (0 to 1, printed as percent), `points` (a difference of two fractions,
            printed as signed percentage points), `rank` (1 is best), or any other word.
        higher_is_better: The direction of the figure.
    """

    name: str
    value: float
    low: float
    high: float
    count: int
    chance: float | None = None
    unit: str = "fraction"
    higher_is_better: bool = True

    @classmethod
    def of(
        cls,
        name: str,
        interval: Interval,
        *,
        chance: float | None = None,
        unit: str = "fraction",
        higher_is_better: bool = True,
    ) -> "Figure":
        """A figure from an estimate and its 95 % interval."""
        return cls(
            name=name,
            value=interval.value,
            low=interval.low,
            high=interval.high,
            count=interval.count,
            chance=chance,
            unit=unit,
            higher_is_better=higher_is_better,
        )

    def format(self, number: float) -> str:
        """Write a number in this figure's unit: percent for fractions, else one decimal."""
        if self.unit == "fraction":
            return f"{100 * number:.1f} %"
        return f"{100 * number:+.1f}" if self.unit == "points" else f"{number:.1f}"


@dataclass(frozen=True)
class Outcomes:
    """What each single item scored, so that two reports can be compared pair by pair.

    Attributes:
        values: One score per item (for recall@k: 1.0 where a right candidate is among the k).
        groups: Which items belong together (the same base concept, say) and are resampled as one;
            None where every item stands alone.
    """

    values: Float[ndarray, " items"]
    groups: Int64[ndarray, " items"] | None = None


@dataclass(frozen=True)
class Report:
    """The result of one task on one model and one set of data.

    Attributes:
        task: The task's name, a key of `eval.tasks.TASKS`.
        figures: The measured numbers, the most important first.
        protocol: Everything two figures must share to be comparable (items, candidates, tie rule,
            data fingerprint). JSON values only; the model is *not* part of it.
        details: What a reader wants to look at: confused pairs, galleries. JSON values only.
        title: How a page or table names this report; the task's name where it is empty.
        outcomes: Per figure, the score of every item. Held in memory only, never serialised.
    """

    task: str
    figures: tuple[Figure, ...]
    protocol: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> Figure:
        """The figure of this name.

        Raises:
            KeyError: There is none; the message lists those there are.
        """
        for figure in self.figures:
            if figure.name == name:
                return figure
        known = ", ".join(figure.name for figure in self.figures)
        raise KeyError(f"report {self.task!r} has no figure {name!r}; it has: {known}")

    def to_json(self) -> dict[str, Any]:
        """The report as values `json.dumps` accepts, without the per-item outcomes."""
        return {
            "version": SCHEMA_VERSION,
            "task": self.task,
            "title": self.title,
            "figures": [dataclasses.asdict(figure) for figure in self.figures],
            "protocol": self.protocol,
            "details": self.details,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Report":
        """Read back what :meth:`to_json` wrote.

        Raises:
            ValueError: The version is unknown, or a key is missing or not known.
        """
        if value.get("version") != SCHEMA_VERSION:
            raise ValueError(
                f"report: schema version {value.get('version')!r}, but this release reads "
                f"version {SCHEMA_VERSION}; evaluate again"
            )
        try:
            return cls(
                task=value["task"],
                title=value["title"],
                figures=tuple(Figure(**figure) for figure in value["figures"]),
                protocol=dict(value["protocol"]),
                details=dict(value["details"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"report: not a complete report ({error}); evaluate again") from error


def format_table(reports: Iterable[Report]) -> str:
    """Lay reports out as one aligned plain-text table, a line per figure.

    Fractions are percent; `-` stands where no exact chance level is known.
    """
    header = ("task", "figure", "value", "95 % interval", "chance", "items")
    rows: list[tuple[str, ...]] = [header]
    for report in reports:
        name = report.title or report.task
        for figure in report.figures:
            rows.append((name, *_cells(figure)))
            name = ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(figure: Figure) -> tuple[str, str, str, str, str]:
    if math.isfinite(figure.low) and math.isfinite(figure.high):
        low = figure.format(figure.low).removesuffix(" %")
        interval = f"{low} to {figure.format(figure.high)}"
    else:
        interval = "-"
    if figure.chance is None:
        chance = "-"
    elif figure.unit == "fraction":
        chance = f"{100 * figure.chance:.3g} %"  # one decimal would print small chances as zero
    else:
        chance = figure.format(figure.chance)
    return figure.name, figure.format(figure.value), interval, chance, str(figure.count)
