"""What the columns of an index's metadata hold, for filters that a page offers."""

from typing import Any

from eval.search.fields import Column, always_quoted
from eval.search.filters import RowFilter
from eval.search.hits import FieldSummary

MOST_VALUES = 50
"""A column with more distinct values is not listed."""


def summaries(filter_: RowFilter) -> list[FieldSummary]:
    """Kind, range and, where they are few, values with counts of every column but `id`."""
    return [_summary(filter_, one) for name, one in filter_.columns.items() if name != "id"]


def _summary(filter_: RowFilter, column: Column) -> FieldSummary:
    name = always_quoted(column.name)
    listed = f"unnest({name})" if column.lists else name
    low = high = None
    if column.kind == "number":
        [(low, high)] = filter_.run(f"SELECT min(v), max(v) FROM (SELECT {listed} AS v FROM rows)")
    values: list[tuple[Any, int]] = []
    if column.kind != "other":
        found = filter_.run(
            f"SELECT v, count(*) AS n FROM (SELECT {listed} AS v FROM rows) WHERE v IS NOT NULL "
            f"GROUP BY v ORDER BY n DESC, v LIMIT {MOST_VALUES + 1}"
        )
        if len(found) <= MOST_VALUES:
            values = [(value, int(count)) for value, count in found]
    return FieldSummary(column.name, column.kind, values, low, high)
