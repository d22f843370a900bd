"""How many of each size: bars over one axis, as inline SVG in the page's own colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eval.report_charts import Numbers, Scale, compact, ticks
from eval.report_html import Element, element

_WIDTH, _HEIGHT = 360.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 8.0, 12.0, 36.0
_BARS = 24


@dataclass(frozen=True)
class Histogram:
    """Counts of values between edges.

    Attributes:
        title: What is counted.
        edges: Where the bars begin and end, rising; one more than `counts`.
        counts: How many values lie between two edges.
        x_label: What the values are, with their unit.
        log: Whether the axis of the values is logarithmic.
    """

    title: str
    edges: Sequence[float]
    counts: Sequence[int]
    x_label: str
    log: bool = False

    @classmethod
    def of(cls, title: str, values: Numbers, *, x_label: str, log: bool = False) -> "Histogram":
        """Counts in at most 24 bars between the smallest and the largest value.

        Whole numbers in a short range get a bar each. The rare ends (a hundredth above all) are
        counted in the last bar, so that one long caption does not flatten all others.

        Args:
            title: What is counted.
            values: Finite numbers, at least one; positive where `log`.
            x_label: What they are.
            log: Whether bars get wider by a constant factor.

        Raises:
            ValueError: There are no values, or a logarithm is asked of one that has none.
        """
        numbers = np.asarray(values, np.float64)
        if not len(numbers) or not np.isfinite(numbers).all():
            raise ValueError(f"histogram {title!r}: no values, or some that are not finite")
        if log and numbers.min() <= 0:
            raise ValueError(f"histogram {title!r}: a logarithmic axis needs positive values")
        edges = _log_edges(numbers) if log else _edges(numbers)
        counts, _ = np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)
        return cls(title, edges.tolist(), counts.tolist(), x_label, log)


def histogram(chart: Histogram) -> Element:
    """A `<figure>` with the title and the bars.

    Raises:
        ValueError: Edges do not rise, or there is not one more of them than of counts.
    """
    edges, counts = list(chart.edges), list(chart.counts)
    if len(edges) != len(counts) + 1 or any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"histogram {chart.title!r}: {len(counts)} bars need rising edges")
    across = Scale(edges[0], edges[-1], log=chart.log)
    marks = ticks(0.0, float(max([*counts, 1])), at_most=4)
    up = Scale(0.0, marks[-1])

    def x(value: float) -> float:
        return round(_LEFT + across.share(value) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - up.share(value) * (_HEIGHT - _BOTTOM - _TOP), 1)

    parts: list[Element] = []
    for mark in marks:
        kind = "grid" if mark else "axis"
        level = {"y1": y(mark), "y2": y(mark)}
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, **level, class_=kind))
        place = {"x": _LEFT - 6, "y": y(mark) + 4}
        parts.append(element("text", compact(mark), **place, text_anchor="end", class_="tick"))
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        gap = min(1.5, 0.2 * (x(high) - x(low)))
        width = round(x(high) - x(low) - gap, 1)
        # A bar of one among a million is still to be seen.
        height = max(y(0.0) - y(float(count)), 1.0) if count else 0.0
        bar = {"x": x(low), "width": width, "y": round(y(0.0) - height, 1), "height": height}
        said = f"{compact(low)} to {compact(high)}: {count:,}"
        parts.append(element("rect", element("title", said), **bar, class_="bar"))
    for mark in _marks(across):
        place = {"x": x(mark), "y": _HEIGHT - 20}
        parts.append(element("text", compact(mark), **place, text_anchor="middle", class_="tick"))
    place = {"x": (_LEFT + _WIDTH - _RIGHT) / 2, "y": _HEIGHT - 4}
    parts.append(element("text", chart.x_label, **place, text_anchor="middle", class_="axis-label"))
    fullest = int(np.argmax(counts))
    said = f"most lie between {compact(edges[fullest])} and {compact(edges[fullest + 1])}"
    drawing = element(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=f"{chart.title}, {sum(counts):,} by {chart.x_label}: {said}",
    )
    return element("figure", element("figcaption", chart.title), drawing, class_="chart")


def _edges(numbers: np.ndarray) -> np.ndarray:
    low, high = float(numbers.min()), float(np.quantile(numbers, 0.99))
    whole = bool((numbers == np.round(numbers)).all())
    if whole and high - low < _BARS:
        return np.arange(low - 0.5, high + 1)
    covering = ticks(low, high, at_most=_BARS)
    return np.array(covering)


def _log_edges(numbers: np.ndarray) -> np.ndarray:
    low, high = float(numbers.min()), float(np.quantile(numbers, 0.99))
    if high / low < 1.1:
        low, high = low / 1.5, max(high, low) * 1.5
    return np.geomspace(low, high, _BARS + 1)


def _marks(scale: Scale) -> list[float]:
    """Round numbers on the axis: powers of two where a logarithmic one holds three of them."""
    if scale.log:
        first, last = math.ceil(math.log2(scale.low)), math.floor(math.log2(scale.high))
        if last - first >= 2:
            step = max(1, -(-(last - first) // 6))
            return [2.0**power for power in range(first, last + 1, step)]
    return [mark for mark in ticks(scale.low, scale.high) if scale.low <= mark <= scale.high]
