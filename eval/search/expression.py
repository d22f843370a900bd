"""Which SQL expressions a filter may be: one, over the values of a row, of harmless functions.

An expression may come from a stranger. DuckDB is interrupted only between blocks of rows, and
neither texts nor lists that it makes count towards its limit of memory. So what could take long or
much within one block is refused: functions that make long texts or lists, edit distances, lambdas;
types that are not plain; patterns and paths that are made anew for every row; and in all, more
texts and lists than `MOST_TEXT` times those of a row.
"""

from collections.abc import Mapping
from typing import Any

LONGEST = 10_000
"""Characters of an expression."""
NESTED = 200
"""Opening brackets in one; DuckDB's parser takes the square of their number where one is not
closed, and is not interrupted meanwhile."""

MOST_TEXT = 100.0
"""Texts and lists that an expression makes of a row, in texts of a row. A list that is written as
text may be twice as long, and so on when that text is put into a list: the sum is over all steps,
since all are in memory at once."""
_LETTERS = 256
"""Letters of a text in an expression that are taken for a text of a row."""
_PATTERN = 8.0
"""What a regular expression or a JSON document takes, in texts."""

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
_TEXT_NAMES = (
    "array_extract array_slice coalesce concat greatest ifnull json_extract json_extract_string "
    "lcase least left list_avg list_extract list_max list_min list_slice list_sum list_value lower "
    "ltrim nullif regexp_extract right row rtrim split_part strip_accents struct_extract substr "
    "substring trim ucase upper || -> ->>"
)
_TEXT = set(_TEXT_NAMES.split())
"""Functions that may give a text or a list; all others give something short."""
_LISTS = {"list_value", "row", "ARRAY_CONSTRUCTOR"}
_PATTERNS = {
    "json_extract", "json_extract_string", "->", "->>", "regexp_extract", "regexp_full_match",
    "regexp_matches",
}  # fmt: skip
"""Functions that prepare what follows their first argument."""
_TRUTHS = {
    "OPERATOR_NOT", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "COMPARE_IN", "COMPARE_NOT_IN",
}  # fmt: skip
_TYPE_NAMES = (
    "bool boolean tinyint smallint int integer bigint hugeint utinyint usmallint uinteger ubigint "
    "int1 int2 int4 int8 long short signed float float4 float8 real double decimal numeric varchar "
    "text string char date time timestamp timestamptz datetime interval uuid"
)
_TYPES = _TYPE_NAMES.split()
_TEXT_TYPES = {"varchar", "text", "string", "char"}


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
        _check_part(part)
    text = 0.0
    made: dict[int, float] = {}
    for part in reversed(_parts(selected[0])):  # what is within comes before what it is within
        given = sum((made[id(inner)] for inner in _within(part)), 0.0)
        made[id(part)], takes = _made(part, given)
        text += takes
        if text > MOST_TEXT:
            raise ValueError(
                "where: makes too many texts or lists of each row; join or convert fewer, and "
                "compare texts by ILIKE instead of lower() and upper()"
            )


def _check_part(part: Mapping[str, Any]) -> None:
    """Refuse a part of an expression by what it is and is called.

    Raises:
        ValueError: It is none of what an expression may hold.
    """
    if part["class"] not in _CLASSES:
        what = part["class"].lower().replace("_", " ")
        raise ValueError(f"where: only values of a row can be compared, here is a {what}")
    if part["class"] == "TYPE":
        name = _type_name(part)
        if name not in _TYPES:
            raise ValueError(f"where: the type {name!r} cannot be used; known: {', '.join(_TYPES)}")
    if part["class"] != "FUNCTION":
        return
    name = part.get("function_name", "+").lower()
    if name not in _CALLABLE:
        raise ValueError(
            f"where: the function {name!r} cannot be used; known: {', '.join(FUNCTIONS)}"
        )
    if name not in _PATTERNS:
        return
    for one in _within(part)[1:]:
        if one["class"] != "CONSTANT":
            raise ValueError(f"where: {name} takes a pattern or path in quotes, not an expression")
        if "regexp" not in name and "*" in _literal(one):
            raise ValueError(f"where: {name} takes a path to one value, without '*'")


def _made(part: Mapping[str, Any], given: float) -> tuple[float, float]:
    """How much text a part gives, and how much memory that takes, of how much it is given.

    Both are in texts of a row.
    """
    kind = part["class"]
    name = part.get("function_name", part.get("type", "")).lower()
    if kind == "COLUMN_REF":
        return 1.0, 0.0
    if kind == "CONSTANT":
        return len(_literal(part)) / _LETTERS, 0.0
    if kind == "CAST":
        text = _type_name(part["type_expr"]) in _TEXT_TYPES
        return (2 * given, 2 * given) if text else (0.0, 0.0)
    if name in _PATTERNS:
        return (given if name in _TEXT else 0.0), _PATTERN * max(given, 1.0)
    if name.upper() in _LISTS or name in _LISTS:
        return 2 * given, 2 * given
    if kind in ("COMPARISON", "CONJUNCTION", "BETWEEN", "TYPE") or name.upper() in _TRUTHS:
        return 0.0, 0.0
    if kind == "FUNCTION" and name not in _TEXT:
        return 0.0, 0.0
    return given, given


def _type_name(part: Mapping[str, Any]) -> str:
    return part.get("type_name", "").lower()


def _literal(part: Mapping[str, Any]) -> str:
    return str((part.get("literal") or {}).get("text", ""))


def _within(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts right within a part, in order, but types."""
    found: list[dict[str, Any]] = []
    waiting = [value for name, value in reversed(list(part.items())) if name != "type_expr"]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict) and "class" in one:
            found.append(one)
        elif isinstance(one, dict):
            waiting += reversed(list(one.values()))
        elif isinstance(one, list):
            waiting += reversed(one)
    return found


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
