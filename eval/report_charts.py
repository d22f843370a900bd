"""Line charts and interval bars as inline SVG, drawn with the page's own colours.

Hand-made rather than plotted: the text stays text in the reader's font, the colours follow light
and dark through the style sheet's classes, and a chart costs a few kilobytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eval.report_html import Element, element

_WIDTH, _HEIGHT = 360.0, 216.0
_TOP, _BOTTOM = 12.0, 30.0
_GLYPH = 6.3  # mean width of a character at the chart's 11 px, on the generous side
_LABEL_STEP = 13.0
_MOST_POINTS, _BUCKETS = 240, 120
_LONGEST_LABEL = 16

Numbers = Sequence[float] | Sequence[int] | np.ndarray

COLOURS = 6
"""Series one chart can tell apart by colour."""


@dataclass(frozen=True)
class Series:
    """One line: `y` measured at `x`; NaN leaves a gap. `low` and `high` draw a band around it.

    More than 240 points are drawn as the means of 120 equal stretches, over a pale band from the
    smallest to the largest value of each (unless a band is given).
    """

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes.

    `unit` is written beside the title; `"fraction"` shows y as a percentage. `log` takes the
    logarithm of y (values must be positive).
    """

    title: str
    series: Sequence[Series]
    unit: str = ""
    x_label: str = "samples seen"
    log: bool = False


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic (then both are positive)."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies on the way from `low` (0) to `high` (1).

        >>> Scale(1.0, 100.0, log=True).share(10.0)
        0.5
        """
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class _Line:
    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None


@dataclass(frozen=True)
class _Axes:
    left: float
    right: float
    across: Scale
    up: Scale

    def x(self, value: float) -> float:
        return self.left + self.across.share(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - self.up.share(value) * (_HEIGHT - _BOTTOM - _TOP)


def compact(value: float) -> str:
    """A number as an axis shows it.

    >>> [compact(v) for v in (0.0, 0.0005, 14.25, 1500.0, 250_000.0, 2e6)]
    ['0', '0.0005', '14.25', '1.5k', '250k', '2M']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}".replace("e-0", "e-")


def ticks(low: float, high: float, *, at_most: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at most `low` to at least `high`.

    >>> ticks(0.0, 0.23)
    [0.0, 0.1, 0.2, 0.3]
    """
    rough = (high - low) / (at_most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < at_most:
            break
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]


def line_chart(chart: Chart) -> Element:
    """A `<figure>` with the chart's title, unit and drawing.

    Raises:
        ValueError: no series, a series without points or with lengths that differ, no finite value,
            a value that is not positive on a logarithmic axis, or more series than colours.
    """
    lines = _checked(chart)
    across, up = _x_scale(lines), _y_scale(lines, log=chart.log)
    y_ticks = _log_ticks(up) if chart.log else _inside(ticks(up.low, up.high), up)
    shown = [_y_text(tick, chart) for tick in y_ticks]
    labels = [_end_label(line, chart, alone=len(lines) == 1) for line in lines]
    axes = _Axes(
        left=8 + _GLYPH * max(len(text) for text in shown),
        right=_WIDTH - 12 - _GLYPH * max(len(text) for text in labels),
        across=across,
        up=up,
    )
    said = "; ".join(
        f"{line.name} ends at {_y_text(float(_finite(line.y)[-1]), chart)}" for line in lines
    )
    drawing = element(
        "svg",
        *_grid(axes, y_ticks, shown),
        *_x_axis(axes, _inside(ticks(across.low, across.high), across), chart.x_label),
        *[part for number, line in enumerate(lines) for part in _curve(axes, line, number)],
        *_labels(axes, lines, labels),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=f"{chart.title} against {chart.x_label}: {said}",
    )
    unit = {"fraction": "%"}.get(chart.unit, chart.unit)
    heading = element("figcaption", chart.title, element("small", unit) if unit else None)
    return element("figure", heading, drawing, class_="chart")


def interval_bar(
    value: float, low: float, high: float, *, scale: Scale, chance: float | None
) -> Element:
    """A value with its interval on `scale`, chance as a tick; stretches to its cell's width."""

    def at(number: float) -> str:
        return f"{2 + 96 * min(1.0, max(0.0, scale.share(number))):.2f}%"

    chance_mark = None
    if chance is not None and scale.low <= chance <= scale.high:
        chance_mark = element(
            "line", x1=at(chance), x2=at(chance), y1="1", y2="15", class_="chance"
        )
    return element(
        "svg",
        element("line", x1="2%", x2="98%", y1="8", y2="8", class_="track"),
        chance_mark,
        element("line", x1=at(low), x2=at(high), y1="8", y2="8", class_="range"),
        element("circle", cx=at(value), cy="8", r="3.5", class_="point"),
        class_="interval-bar",
        height="16",
        aria_hidden="true",
    )


def _checked(chart: Chart) -> list[_Line]:
    if not chart.series:
        raise ValueError(f"chart {chart.title!r}: no series; pass at least one")
    if len(chart.series) > COLOURS:
        raise ValueError(
            f"chart {chart.title!r}: {len(chart.series)} series, at most {COLOURS} can be told "
            "apart; split it into several charts"
        )
    lines = []
    for series in chart.series:
        where = f"chart {chart.title!r}, series {series.name!r}"
        x = _numbers(series.x, where)
        y = _numbers(series.y, where)
        band = [
            None if edge is None else _numbers(edge, where) for edge in (series.low, series.high)
        ]
        if any(len(part) != len(x) for part in (y, *[edge for edge in band if edge is not None])):
            raise ValueError(f"{where}: x has {len(x)} points, y or the band another number")
        if not np.isfinite(x).all():
            raise ValueError(f"{where}: x is not finite everywhere")
        if len(_finite(y)) == 0:
            raise ValueError(f"{where}: no finite value to draw")
        if chart.log and (_finite(y) <= 0).any():
            raise ValueError(f"{where}: a logarithmic axis needs positive values")
        order = np.argsort(x, kind="stable")
        parts = [None if part is None else part[order] for part in (y, *band)]
        assert parts[0] is not None
        lines.append(_thinned(_Line(series.name, x[order], parts[0], parts[1], parts[2])))
    return lines


def _numbers(values: Numbers, where: str) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: not a list of numbers") from None
    if array.ndim != 1:
        raise ValueError(f"{where}: expected a flat list of numbers, got {array.ndim} dimensions")
    return array


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _thinned(line: _Line) -> _Line:
    if len(line.x) <= _MOST_POINTS:
        return line
    x, y, low, high = [], [], [], []
    for rows in np.array_split(np.arange(len(line.x)), _BUCKETS):
        here = rows[np.isfinite(line.y[rows])]
        x.append(line.x[rows].mean())
        y.append(line.y[here].mean() if len(here) else np.nan)
        bottom = line.y if line.low is None else line.low
        top = line.y if line.high is None else line.high
        low.append(bottom[here].min() if len(here) else np.nan)
        high.append(top[here].max() if len(here) else np.nan)
    # The last point stays itself: its value is what the label beside it says.
    x[-1], y[-1] = line.x[-1], _finite(line.y)[-1]
    return _Line(line.name, np.array(x), np.array(y), np.array(low), np.array(high))


def _x_scale(lines: Sequence[_Line]) -> Scale:
    low = min(float(line.x.min()) for line in lines)
    high = max(float(line.x.max()) for line in lines)
    if 0 < low <= 0.1 * high:
        low = 0.0  # the first log line comes after a few steps; the axis still begins at the start
    return Scale(low, high if high > low else low + 1.0)


def _y_scale(lines: Sequence[_Line], *, log: bool) -> Scale:
    drawn = [
        _finite(part)
        for line in lines
        for part in (line.y, line.low, line.high)
        if part is not None
    ]
    low = min(float(part.min()) for part in drawn if len(part))
    high = max(float(part.max()) for part in drawn if len(part))
    if log:
        bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return Scale(10.0**bottom, 10.0 ** max(top, bottom + 1), log=True)
    # Start at zero where that costs less than half of the height.
    if 0 <= low <= high / 2:
        low = 0.0
    if high - low <= 1e-9 * abs(high):  # means of one value may differ in their last bit
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    covering = ticks(low, high)
    near = covering[-1] - high < 0.12 * (high - low)
    return Scale(covering[0], covering[-1] if near else high)


def _log_ticks(scale: Scale) -> list[float]:
    first, last = round(math.log10(scale.low)), round(math.log10(scale.high))
    return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 4))]


def _inside(values: Sequence[float], scale: Scale) -> list[float]:
    return [value for value in values if scale.low <= value <= scale.high]


def _y_text(value: float, chart: Chart) -> str:
    if chart.unit == "fraction":
        return f"{100 * value:.3g}"
    return compact(value)


def _end_label(line: _Line, chart: Chart, *, alone: bool) -> str:
    value = _y_text(float(f"{_finite(line.y)[-1]:.3g}"), chart)
    if alone:
        return value
    name = line.name if len(line.name) <= _LONGEST_LABEL else line.name[: _LONGEST_LABEL - 1] + "…"
    return f"{name} {value}"


def _grid(axes: _Axes, y_ticks: Sequence[float], shown: Sequence[str]) -> list[Element]:
    parts = []
    for tick, text in zip(y_ticks, shown, strict=True):
        y = round(axes.y(tick), 1)
        kind = "axis" if tick == y_ticks[0] else "grid"
        parts.append(element("line", x1=axes.left, x2=axes.right, y1=y, y2=y, class_=kind))
        parts.append(
            element("text", text, x=axes.left - 6, y=y + 4, text_anchor="end", class_="tick")
        )
    return parts


def _x_axis(axes: _Axes, x_ticks: Sequence[float], label: str) -> list[Element]:
    parts = []
    for tick in x_ticks:
        x = round(axes.x(tick), 1)
        parts.append(
            element("text", compact(tick), x=x, y=_HEIGHT - 15, text_anchor="middle", class_="tick")
        )
    parts.append(
        element(
            "text",
            label,
            x=round((axes.left + axes.right) / 2, 1),
            y=_HEIGHT - 2,
            text_anchor="middle",
            class_="axis-label",
        )
    )
    return parts


def _curve(axes: _Axes, line: _Line, number: int) -> list[Element]:
    parts = []
    if line.low is not None and line.high is not None:
        known = np.isfinite(line.low) & np.isfinite(line.high)
        along = line.x[known].tolist()
        edge = list(zip(along, line.high[known].tolist(), strict=True))
        edge += reversed(list(zip(along, line.low[known].tolist(), strict=True)))
        points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in edge)
        parts.append(element("polygon", points=points, class_=f"band s{number + 1}"))
    strokes, move = [], "M"
    x = y = 0.0
    for x_value, y_value in zip(line.x.tolist(), line.y.tolist(), strict=True):
        if not math.isfinite(y_value):
            move = "M"
            continue
        x, y = axes.x(x_value), axes.y(y_value)
        strokes.append(f"{move}{x:.1f} {y:.1f}")
        move = "L"
    parts.append(element("path", d="".join(strokes), class_=f"line s{number + 1}"))
    parts.append(
        element("circle", cx=round(x, 1), cy=round(y, 1), r=2.6, class_=f"dot s{number + 1}")
    )
    return parts


def _labels(axes: _Axes, lines: Sequence[_Line], labels: Sequence[str]) -> list[Element]:
    """Each line's name and last value at its end, pushed apart where they would overlap."""
    wanted = [axes.y(float(_finite(line.y)[-1])) for line in lines]
    order = sorted(range(len(lines)), key=lambda number: wanted[number])
    places = dict(enumerate(wanted))
    for above, below in pairwise(order):
        places[below] = max(places[below], places[above] + _LABEL_STEP)
    overshoot = max(0.0, places[order[-1]] - (_HEIGHT - _BOTTOM))
    places[order[-1]] -= overshoot
    for above, below in reversed(list(pairwise(order))):
        places[above] = min(places[above], places[below] - _LABEL_STEP)
    return [
        element(
            "text",
            labels[number],
            x=round(axes.right + 6, 1),
            y=round(places[number] + 4, 1),
            class_=f"end s{number + 1}",
        )
        for number in order
    ]
