"""Filters by field: what columns must hold, as SQL with bound values; what columns there are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "number", "flag", "other"]

_NUMBERS = re.compile(r"(U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\))$")
_RULES = ("min", "max", "contains")
MOST_VALUES = 10_000
"""Values of one filter, all fields together; DuckDB is not interrupted while it reads them."""


@dataclass(frozen=True)
class Column:
    """A column of the metadata.

    Attributes:
        name: Its name.
        type: DuckDB's type.
        kind: What its values, or the elements of its lists, are.
        lists: Whether every row holds a list of them.
    """

    name: str
    type: str
    kind: Kind
    lists: bool


def column_of(name: str, type_: str) -> Column:
    """A column by name and DuckDB's type."""
    element = type_.removesuffix("[]")
    kind: Kind = "other"
    if element == "VARCHAR":
        kind = "text"
    elif element == "BOOLEAN":
        kind = "flag"
    elif _NUMBERS.match(element):
        kind = "number"
    return Column(name, type_, kind, lists=element != type_)


def quoted(name: str) -> str:
    """A name as SQL reads it, quoted where it must be."""
    if re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        return name
    return always_quoted(name)


def conditions(
    fields: Mapping[str, Any], columns: Mapping[str, Column]
) -> tuple[list[str], list[Any]]:
    """SQL conditions of filters by field, and the values to bind to their question marks.

    A field is wanted as one value, as a list of which it must be one (none of an empty list), or as
    `{"min": a, "max": b}` with both ends included, or `{"contains": "red"}` (text, whatever the
    case). None stands for rows without the field. Of a column of lists, one element must fit.

    Raises:
        ValueError: An unknown field or rule, a value of another kind than the column's, or more
            than `MOST_VALUES` of them.
    """
    asked = sum(len(one) if isinstance(one, list | tuple) else 1 for one in fields.values())
    if asked > MOST_VALUES:
        raise ValueError(f"fields: {asked:,} values; at most {MOST_VALUES:,} can be asked for")
    clauses: list[str] = []
    values: list[Any] = []
    for name, wanted in fields.items():
        if name not in columns:
            raise ValueError(f"fields: no column {name!r}; columns: {', '.join(columns)}")
        column = columns[name]
        if isinstance(wanted, Mapping):
            parts = _rules(column, wanted, values)
        else:
            one_of = wanted if isinstance(wanted, list | tuple) else [wanted]
            parts = [_one_of(column, one_of, values)]
        clauses += parts
    return clauses, values


def _rules(column: Column, rules: Mapping[str, Any], values: list[Any]) -> list[str]:
    found = []
    for rule, wanted in rules.items():
        if rule not in _RULES:
            raise ValueError(
                f"fields: {column.name} cannot be asked for {rule!r}; known: {', '.join(_RULES)}"
            )
        if wanted is None:
            continue
        if rule == "contains":
            found.append(_contains(column, wanted, values))
            continue
        sign = ">=" if rule == "min" else "<="
        place = _bound(column, wanted, values)
        found.append(_of_some(column, "{} " + f"{sign} {place}"))
    return found


def _contains(column: Column, wanted: Any, values: list[Any]) -> str:
    if column.kind != "text" or not isinstance(wanted, str):
        raise ValueError(f"fields: {column.name}: `contains` compares a text with text columns")
    values.append(wanted)
    return _of_some(column, "contains(lower({}), lower(?))")


def _one_of(column: Column, wanted: list[Any] | tuple[Any, ...], values: list[Any]) -> str:
    said = [one for one in wanted if one is not None]
    places = ", ".join(_bound(column, one, values) for one in said)
    parts = [_of_some(column, "{} " + f"IN ({places})")] if said else []
    if len(said) < len(wanted):
        parts.append(f"{always_quoted(column.name)} IS NULL")
    return "(" + " OR ".join(parts or ["false"]) + ")"


def _of_some(column: Column, test: str) -> str:
    """The test of the value, or of one element where the column holds lists."""
    name = always_quoted(column.name)
    if not column.lists:
        return test.replace("{}", name)
    return f"len(list_filter({name}, lambda one: {test.replace('{}', 'one')})) > 0"


def _bound(column: Column, value: Any, values: list[Any]) -> str:
    expected = {"text": (str,), "number": (int, float), "flag": (bool,)}.get(column.kind)
    if expected is None:
        values.append(str(value))
        return f"CAST(? AS {column.type.removesuffix('[]')})"
    if not isinstance(value, expected) or (column.kind == "number" and isinstance(value, bool)):
        held = {"text": "text", "number": "numbers", "flag": "true or false"}[column.kind]
        raise ValueError(f"fields: {column.name} holds {held}, not {value!r}")
    values.append(value)
    return "?"


def always_quoted(name: str) -> str:
    """A name in double quotes."""
    return '"' + name.replace('"', '""') + '"'
