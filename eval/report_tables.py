"""Figures as a reader meets them: headline tiles, tables with intervals, methods side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.report_charts import Scale, interval_bar, ticks
from eval.report_html import EN_DASH, MINUS, TIMES, Element, caption, element, only_for_ears
from eval.results import Figure, Report


@dataclass(frozen=True)
class Tile:
    """One key figure at the head of the page: a short label, the figure, a line beneath it."""

    label: str
    figure: Figure
    note: str = ""


@dataclass(frozen=True)
class Number:
    """A plain number at the head of the page, measured without error: a count, a size."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


def times_chance(figure: Figure) -> float | None:
    """How many times better than chance: value / chance, or chance / value where lower is better.

    None where no chance level is known or the ratio is not a number.

    >>> times_chance(Figure("recall@1", value=0.22, low=0.2, high=0.24, count=100, chance=0.002))
    110.0
    """
    if figure.chance is None:
        return None
    above, below = figure.value, figure.chance
    if not figure.higher_is_better:
        above, below = below, above
    if below == 0 or not math.isfinite(above / below):
        return None
    return above / below


def headline(tiles: Sequence[Tile | Number]) -> Element:
    """The key figures in a row.

    Raises:
        ValueError: there is no tile, or a figure is not finite.
    """
    if not tiles:
        raise ValueError("headline: no tiles; pass at least one figure")
    shown = [_tile(tile) if isinstance(tile, Tile) else _number_tile(tile) for tile in tiles]
    return element("div", *shown, class_="tiles")


def word_table(heads: Sequence[str], rows: Sequence[Sequence[str | int]]) -> Element:
    """A table of words and whole numbers; the first column names the rows.

    Raises:
        ValueError: there are no rows, or one has not a cell for each head.
    """
    if not rows or any(len(row) != len(heads) for row in rows):
        raise ValueError(f"table {', '.join(heads)}: no rows, or one of another length")
    body = [
        element(
            "tr",
            element("th", caption(str(first)), scope="row"),
            *[_cell(value) for value in rest],
        )
        for first, *rest in rows
    ]
    table = element(
        "table",
        element("thead", element("tr", *map(_head, heads))),
        element("tbody", *body),
        class_="sortable",
    )
    return element("div", table, class_="scroll")


def figure_table(report: Report, labels: Mapping[str, str]) -> Element:
    """One report, a row per figure; `labels` gives names for readers in place of figure names.

    Raises:
        ValueError: the report holds no figures, or one that is not finite.
    """
    figures = _figures(report)
    scales = {
        kind: _scale([figure for figure in figures if _kind(figure) == kind])
        for kind in {_kind(figure) for figure in figures}
    }
    rows = []
    for figure in figures:
        scale = scales[_kind(figure)]
        ratio = times_chance(figure)
        rows.append(
            element(
                "tr",
                element(
                    "th",
                    caption(labels.get(figure.name, figure.name)),
                    _turned(figure),
                    scope="row",
                ),
                element("td", _value(figure), _interval(figure), data_sort=figure.value),
                element("td", _bar(figure, scale), class_="wide"),
                element("td", _times(ratio), data_sort=ratio),
                element("td", f"{figure.count:,}", class_="minor", data_sort=figure.count),
            )
        )
    heads = [
        _head("Figure"),
        _head("Value", element("small", "95 % interval")),
        element("th", only_for_ears("Interval, drawn"), scope="col"),
        _head(f"{TIMES} chance"),
        _head("Items", class_="minor"),
    ]
    return _table(heads, rows, figures)


def method_table(
    reports: Mapping[str, Report], figures: Sequence[str] | None, labels: Mapping[str, str]
) -> Element:
    """Several methods on the same task, a row each; the best of each column is set in bold.

    Raises:
        ValueError: no reports, one without figures, or a figure that one of them lacks.
    """
    if not reports:
        raise ValueError("comparison: no reports; pass at least one method")
    names = (
        list(figures)
        if figures
        else [figure.name for figure in _figures(next(iter(reports.values())))]
    )
    columns = {
        name: [_found(name, method, reports[method]) for method in reports] for name in names
    }
    heads = [_head("Method")]
    cells: list[list[Element]] = [[] for _ in reports]
    for name, column in columns.items():
        first = column[0]
        heads.append(
            _head(
                labels.get(name, name),
                _turned(first),
                falls=None if first.higher_is_better else "",
            )
        )
        scale = _scale(column)
        pick = max if first.higher_is_better else min
        best = pick(figure.value for figure in column)
        for row, figure in enumerate(column):
            kind = "method best" if figure.value == best else "method"
            parts = (_value(figure), _interval(figure), _bar(figure, scale))
            cells[row].append(element("td", *parts, class_=kind, data_sort=figure.value))
    rows = [
        element("tr", element("th", caption(method), scope="row"), *cells[row])
        for row, method in enumerate(reports)
    ]
    return _table(heads, rows, [figure for column in columns.values() for figure in column])


def _tile(tile: Tile) -> Element:
    figure = _finite(tile.figure, "headline")
    ratio = times_chance(figure)
    return element(
        "div",
        element("div", caption(tile.label), class_="label"),
        element("div", _value(figure), class_="key"),
        _bar(figure, _scale([figure])),
        element(
            "div",
            _interval(figure),
            element("span", f"{_times(ratio)} chance", class_="times") if ratio else None,
            class_="beneath",
        ),
        element("div", caption(tile.note), class_="note") if tile.note else None,
        class_="tile",
    )


def _number_tile(number: Number) -> Element:
    unit = element("small", f"\u202f{number.unit}") if number.unit else None
    return element(
        "div",
        element("div", caption(number.label), class_="label"),
        element("div", element("span", number.value, unit, class_="value"), class_="key"),
        element("div", caption(number.note), class_="note") if number.note else None,
        class_="tile",
    )


def _cell(value: str | int) -> Element:
    if isinstance(value, int):
        return element("td", f"{value:,}", data_sort=value)
    return element("td", caption(value))


def _table(heads: Sequence[Element], rows: Sequence[Element], figures: Sequence[Figure]) -> Element:
    table = element(
        "table", element("thead", element("tr", *heads)), element("tbody", *rows), class_="sortable"
    )
    return element(
        "figure",
        element("div", table, class_="scroll"),
        element("figcaption", _legend(figures), class_="legend"),
        class_="table",
    )


def _head(
    text: str, note: Element | None = None, *, class_: str | None = None, falls: str | None = None
) -> Element:
    button = element("button", caption(text), type="button")
    return element("th", button, note, scope="col", class_=class_, data_lower_is_better=falls)


def _turned(figure: Figure) -> Element | None:
    return None if figure.higher_is_better else element("small", "lower is better")


def _figures(report: Report) -> list[Figure]:
    where = report.title or report.task
    if not report.figures:
        raise ValueError(f"report {where!r}: no figures; it has nothing to show")
    return [_finite(figure, where) for figure in report.figures]


def _found(name: str, method: str, report: Report) -> Figure:
    try:
        return _finite(report[name], method)
    except KeyError as error:
        raise ValueError(f"comparison, method {method!r}: {error.args[0]}") from None


def _finite(figure: Figure, where: str) -> Figure:
    if not math.isfinite(figure.value):
        raise ValueError(f"{where}: figure {figure.name!r} is {figure.value}; nothing was measured")
    return figure


def _kind(figure: Figure) -> tuple[str, bool]:
    return figure.unit, figure.higher_is_better


def _ends(figure: Figure) -> tuple[float, float]:
    """The interval, or the bare value where it could not be computed."""
    if math.isfinite(figure.low) and math.isfinite(figure.high):
        return figure.low, figure.high
    return figure.value, figure.value


def _scale(figures: Sequence[Figure]) -> Scale:
    """From zero (or the lowest value below it) to a round number above every interval.

    Ranks go by the logarithm from 1 to chance: from rank 2 to 1 is as far as from 200 to 100.
    """
    low = min(0.0, *[min(_ends(figure)) for figure in figures])
    high = max(max(_ends(figure)) for figure in figures)
    high = max([high, *[mark for mark in map(_mark, figures) if mark is not None]])
    if figures[0].unit == "rank" and all(min(_ends(figure)) >= 1 for figure in figures):
        return Scale(1.0, max(high, 10.0), log=True)
    if high <= low:
        return Scale(low, low + 1.0)
    covering = ticks(low, high, at_most=12)
    return Scale(covering[0], covering[-1])


def _bar(figure: Figure, scale: Scale) -> Element:
    low, high = _ends(figure)
    return interval_bar(figure.value, low, high, scale=scale, chance=_mark(figure))


def _mark(figure: Figure) -> float | None:
    """The level to hold a figure against: chance, or no difference at all for a difference."""
    return 0.0 if figure.unit == "points" and figure.chance is None else figure.chance


def _legend(figures: Sequence[Figure]) -> str:
    text = "● value with its 95 % bootstrap interval"
    if any(figure.chance is not None for figure in figures):
        text += "   ┆ chance"
    if any(figure.unit == "points" for figure in figures):
        text += "   ┆ no difference (points)"
    return text


def _number(figure: Figure, number: float) -> str:
    text = figure.format(number).removesuffix(" %")
    return text.removeprefix("-") if not float(text) else text.replace("-", MINUS)


def _value(figure: Figure) -> Element:
    unit = {"fraction": "%", "points": "points"}.get(figure.unit)
    return element(
        "span",
        _number(figure, figure.value),
        element("small", f"\u202f{unit}") if unit else None,
        class_="value",
    )


def _interval(figure: Figure) -> Element:
    if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return element("span", "no interval", class_="interval")
    low, high = _number(figure, figure.low), _number(figure, figure.high)
    return element("span", f"{low} {EN_DASH} {high}", class_="interval")


def _times(ratio: float | None) -> str:
    if ratio is None:
        return EN_DASH
    return f"{ratio:,.0f}\u202f{TIMES}" if ratio >= 10 else f"{ratio:.1f}\u202f{TIMES}"
