"""What the columns of an index's metadata hold, for filters that a page offers."""

from typing import Any

import duckdb

from eval.search.fields import Column, always_quoted
from eval.search.filters import RowFilter
from eval.search.hits import FieldSummary

MOST_VALUES = 50
"""A column with more distinct values is not listed."""


_LOOKED_AT = 10_000
"""Rows among which a column of many distinct values shows."""
_LIVE = "(SELECT {} AS v FROM rows ANTI JOIN removed USING (id))"


def summaries(filter_: RowFilter) -> list[FieldSummary]:
    """Kind, range and, where they are few, values with counts of every column but `id`.

    A column that cannot be summed up in time is described without its values.
    """
    found = []
    for name, column in filter_.columns.items():
        if name == "id":
            continue
        try:
            found.append(_summary(filter_, column))
        except duckdb.Error:
            found.append(FieldSummary(name, column.kind, []))
    return found


def _summary(filter_: RowFilter, column: Column) -> FieldSummary:
    if column.kind == "other":
        return FieldSummary(column.name, column.kind, [])
    value = always_quoted(column.name)
    if column.lists:
        value = f"unnest({value})"
    if column.kind == "number" and column.type.startswith(("FLOAT", "DOUBLE", "DECIMAL")):
        value = f"CAST({value} AS DOUBLE)"
    rows, sound = _LIVE.format(value), "v IS NOT NULL"
    low = high = None
    if column.kind == "number":
        sound = "isfinite(CAST(v AS DOUBLE))"
        [(low, high)] = filter_.run(f"SELECT min(v), max(v) FROM {rows} WHERE {sound}")
    [(distinct,)] = filter_.run(
        f"SELECT count(DISTINCT v) FROM (SELECT v FROM {rows} LIMIT {_LOOKED_AT})"
    )
    values: list[tuple[Any, int]] = []
    if distinct <= MOST_VALUES:
        values = filter_.run(
            f"SELECT v, count(*) AS n FROM {rows} WHERE {sound} GROUP BY v ORDER BY n DESC, v "
            f"LIMIT {MOST_VALUES + 1}"
        )
    return FieldSummary(
        column.name, column.kind, values if len(values) <= MOST_VALUES else [], low, high
    )
