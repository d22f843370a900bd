"""Which SQL expressions a filter may be: one, over the values of a row, of harmless functions.

An expression may come from a stranger, and DuckDB is interrupted only between blocks of rows. So
what could take long within one block is not among the functions: those that make long texts or
lists, edit distances, lambdas.
"""

from collections.abc import Mapping
from typing import Any

LONGEST = 10_000
"""Characters of an expression."""
NESTED = 200
"""Opening brackets in one; DuckDB's parser takes the square of their number where one is not
closed, and is not interrupted meanwhile."""

_CLASSES = {
    "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT",
    "FUNCTION", "OPERATOR", "TYPE",
}  # fmt: skip
"""Classes of DuckDB's expressions that look at one row alone."""
_OPERATORS = "+ - * / // % ^ ** & | << >> || ~~ !~~ ~~* !~~* ~~~ ^@ -> ->> @>"
_NAMES = (
    "abs array_contains array_extract array_has array_has_all array_has_any array_length "
    "array_slice ceil ceiling coalesce concat contains cos current_date date date_diff date_part "
    "date_trunc datediff datepart datetrunc day dayofweek dayofyear ends_with epoch exp floor "
    "greatest hour ifnull instr isfinite isinf isnan isodow json_extract json_extract_string "
    "lcase least left len length list_avg list_contains list_count list_extract list_has "
    "list_has_all list_has_any list_max list_min list_position list_slice list_sum list_value ln "
    "log log10 log2 lower ltrim make_date mod month now nullif pow power prefix quarter radians "
    "regexp_extract regexp_full_match regexp_matches right round row rtrim sign sin split_part "
    "sqrt starts_with strip_accents strlen strpos strptime struct_extract substr substring suffix "
    "tan today trim trunc try_strptime ucase upper week weekday year"
)
FUNCTIONS = _NAMES.split()
"""Functions that may be called, beside the operators."""
_CALLABLE = {*FUNCTIONS, *_OPERATORS.split()}


def check_length(where: str) -> None:
    """Refuse what is too long to be parsed.

    Raises:
        ValueError: It is.
    """
    if len(where) > LONGEST:
        raise ValueError(f"where: longer than {LONGEST} characters")
    if where.count("(") > NESTED:
        raise ValueError(f"where: more than {NESTED} brackets")


def check_parsed(parsed: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Refuse what is more than one expression over the values of one row.

    Args:
        parsed: What DuckDB's `json_serialize_sql` makes of `SELECT <expression>`.
        plain: The same of `SELECT 1`.

    Raises:
        ValueError: It is; says what.
    """
    nodes = [one["node"] for one in parsed["statements"]]
    if len(nodes) != 1 or _frame(nodes[0]) != _frame(plain["statements"][0]["node"]):
        raise ValueError("where: must be one expression over the columns, not a statement")
    selected = nodes[0]["select_list"]
    if len(selected) != 1 or selected[0].get("alias"):
        raise ValueError("where: must be one expression over the columns, not several")
    for part in _parts(selected[0]):
        if part["class"] not in _CLASSES:
            what = part["class"].lower().replace("_", " ")
            raise ValueError(f"where: only values of a row can be compared, here is a {what}")
        name = part.get("function_name", "+")
        if part["class"] == "FUNCTION" and name.lower() not in _CALLABLE:
            raise ValueError(
                f"where: the function {name!r} cannot be used; known: {', '.join(FUNCTIONS)}"
            )


def _frame(node: Mapping[str, Any]) -> Any:
    """A query without what it selects and where in the text that stood."""
    return _without_places({**node, "select_list": []})


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _without_places(inner)
            for name, inner in value.items()
            if not name.startswith("query_location")
        }
    return [_without_places(inner) for inner in value] if isinstance(value, list) else value


def _parts(value: Any) -> list[dict[str, Any]]:
    """An expression and all within it."""
    found, waiting = [], [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            found += [one] if "class" in one else []
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return found
