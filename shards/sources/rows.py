"""The rows of tables: Parquet, text tables such as CSV, and JSON lines, behind one face."""

import codecs
import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.damage import Problem, Reason
from shards.sources.record import keeps, offers

_SEPARATORS = ("\t", ",", ";", "|")
_HEAD_BYTES = 1 << 16
_OFFERED_ROWS = 10_000
_ROWS_AT_ONCE = 1 << 16


class Rows(ABC):
    """The rows of one file.

    Attributes:
        path: The file.
        columns: Names, in order.
        problems: Lines that are no rows.
        numbers: For each row its number in the file, before any were taken out.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self.columns = list(columns)
        self.problems: list[Problem] = []
        self.numbers = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    @abstractmethod
    def row(self, index: int) -> dict[str, Any]:
        """The values of a row; text that is not UTF-8 holds surrogates."""

    @abstractmethod
    def texts(self, name: str) -> list[str | None]:
        """A column of strings; None where there is none."""

    @abstractmethod
    def kind(self, name: str) -> str:
        """What a column holds: `text`, `texts` (lists of them), or the name of another type."""

    @abstractmethod
    def keep(self, where: Mapping[str, Any]) -> None:
        """Drops the rows that `where` does not keep."""

    def offer(self, where: Mapping[str, Any]) -> str:
        """What there is in the columns of a filter that left nothing; call it before `keep`."""
        entries = (self.row(index) for index in range(min(len(self), _OFFERED_ROWS)))
        return f"{self.path.name} ({offers(where, entries) or 'it has none'})"

    def need(self, options: Mapping[str, Sequence[str]]) -> None:
        """Checks that columns are there.

        Args:
            options: The columns that each option names.

        Raises:
            ValueError: Naming the first that is not, and those that are.
        """
        for option, names in options.items():
            for name in names:
                if name not in self.columns:
                    raise ValueError(
                        f"{self.path} has no column {name!r}; it has {', '.join(self.columns)}; "
                        f"set {option}"
                    )


class ArrowRows(Rows):
    """Rows in an Arrow table, in memory.

    Args:
        path: The file they come from.
        table: What is in it.
    """

    def __init__(self, path: Path, table: pa.Table) -> None:
        super().__init__(path, table.column_names)
        self._table = table
        self.numbers = np.arange(len(table))

    def row(self, index: int) -> dict[str, Any]:
        """The values of a row."""
        values = self._table.slice(index, 1).to_pylist()[0]
        return {
            name: value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
            for name, value in values.items()
        }

    def texts(self, name: str) -> list[str | None]:
        """A column of strings."""
        values = self._table[name].to_pylist()
        return [
            value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
            for value in values
        ]

    def kind(self, name: str) -> str:
        """What a column holds."""
        kind = self._table.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if _is_text(kind):
            return "text"
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return "texts" if _is_text(kind.value_type) else str(kind)
        return str(kind)

    def keep(self, where: Mapping[str, Any]) -> None:
        """Drops the other rows."""
        kept = np.ones(len(self._table), bool)
        for name, wanted in where.items():
            values = list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]
            column = self._table[name]
            try:
                lookup = pc.SetLookupOptions(pa.array(values, column.type))
                kept &= np.asarray(pc.call_function("is_in", [column], lookup))
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
                raise ValueError(
                    f"{self.path}: column {name!r} holds {column.type}, which {wanted!r} cannot be"
                ) from None
        self._table = self._table.filter(pa.array(kept))
        self.numbers = self.numbers[kept]


class JsonRows(Rows):
    """The lines of a JSON lines file, or the entries of a JSON list; kept as text in memory.

    Args:
        path: The file.

    Raises:
        ValueError: If it is neither.
    """

    def __init__(self, path: Path) -> None:
        columns: dict[str, None] = {}
        lines: list[bytes] = []
        numbers: list[int] = []
        problems: list[Problem] = []
        for number, line in enumerate(_json_lines(path)):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                entry = f"line {number + 1}: {error}"
            if isinstance(entry, dict):
                columns |= dict.fromkeys(entry)
                lines.append(line)
                numbers.append(number)
                continue
            detail = entry if isinstance(entry, str) else f"line {number + 1} is no object"
            problems.append(Problem(path.name, "", Reason.BAD_JSON, detail[:200]))
        if not columns and problems:
            raise ValueError(f"{path} holds no row that is a JSON object; {problems[0].detail}")
        super().__init__(path, list(columns))
        self._lines = pa.array(lines, pa.large_binary())
        self.numbers = np.asarray(numbers, np.int64)
        self.problems = problems

    def row(self, index: int) -> dict[str, Any]:
        """The values of a row."""
        return json.loads(self._lines[index].as_py())

    def texts(self, name: str) -> list[str | None]:
        """A column of strings."""
        values = (self.row(index).get(name) for index in range(len(self)))
        return [value if isinstance(value, str) else None for value in values]

    def kind(self, name: str) -> str:
        """What a column holds."""
        first = (self.row(index).get(name) for index in range(min(len(self), _OFFERED_ROWS)))
        value = next((value for value in first if value is not None), "")
        if isinstance(value, list):
            return "texts" if all(isinstance(one, str) for one in value) else "list"
        return "text" if isinstance(value, str) else type(value).__name__

    def keep(self, where: Mapping[str, Any]) -> None:
        """Drops the other rows."""
        kept = np.array([keeps(where, self.row(index)) for index in range(len(self))], bool)
        self._lines = self._lines.filter(pa.array(kept))
        self.numbers = self.numbers[kept]


def read_text_table(path: Path, *, texts: Sequence[str] = ()) -> ArrowRows:
    """Reads a text table whose first line names the columns.

    Columns are separated by tabs, commas, semicolons or bars, whichever the first line has most of;
    values may stand in double quotes, and then hold separators and line breaks. Columns of nothing
    but whole or decimal numbers become numbers, unless that would change them (`007`). A line with
    too many or too few values is left out and told.

    Args:
        path: The file.
        texts: Columns that stay text, whatever is in them.

    Raises:
        ValueError: If the file is no such table.
    """
    separator, encoding = _head(path)
    bad: list[str] = []
    tables: list[pa.Table] = []
    try:
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter=separator, strict=True)
            names = [name.strip() for name in next(reader)]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{path} has two columns named {twice!r}")
            good = _whole_rows(reader, len(names), bad)
            while rows := list(islice(good, _ROWS_AT_ONCE)):
                columns = map(_bytes, zip(*rows, strict=True))
                tables.append(pa.table(dict(zip(names, columns, strict=True))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a text table ({error})") from None
    empty = pa.table({name: _bytes(()) for name in names})
    table = pa.concat_tables([empty, *tables])
    columns = {
        name: _texts(table[name]) if name in texts else _typed(table[name]) for name in names
    }
    rows = ArrowRows(path, pa.table(columns))
    rows.problems = [Problem(path.name, "", Reason.UNREADABLE, detail) for detail in bad]
    return rows


def _whole_rows(reader: Any, width: int, bad: list[str]) -> Iterator[list[str]]:
    """The rows that have a value for each column; what is wrong with others goes to `bad`."""
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # a value without end: the reader goes on behind it
            bad.append(f"line {reader.line_num}: {error}; is a quote left open?")
            continue
        if len(row) == width:
            yield row
        elif row:
            bad.append(f"line {reader.line_num} has {len(row)} values, not {width}")


def _bytes(values: Iterable[str]) -> pa.Array:
    """A column of text as bytes, those that were no UTF-8 included."""
    return pa.array(
        [value.encode("utf-8", "surrogateescape") for value in values], pa.large_binary()
    )


def _is_text(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks) or pa.types.is_large_binary(kind)


def _head(path: Path) -> tuple[str, str]:
    """What separates the columns, and the encoding."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" in head and not utf16:
        raise ValueError(f"{path} is no text table: it holds zero bytes")
    encoding = "utf-16" if utf16 else "utf-8-sig"
    first = head.decode(encoding, "replace").splitlines()[:1]
    if not first or not first[0].strip():
        raise ValueError(f"{path} is empty; its first line must name the columns")
    return max(_SEPARATORS, key=first[0].count), encoding


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of bytes as text; as bytes, if some of it is not UTF-8."""
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        return column


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of bytes as whole numbers, decimal numbers or text, if all of it is."""
    text = _texts(column)
    if pa.types.is_large_binary(text.type):
        return text
    given = pc.call_function("if_else", [pc.call_function("equal", [text, ""]), None, text])
    try:
        decimal = given.cast(pa.float64())
    except pa.ArrowInvalid:
        return text
    if given.null_count == len(given) or not _all_finite(decimal):
        return text
    try:
        whole = given.cast(pa.int64())
    except pa.ArrowInvalid:
        return decimal
    # Whole numbers that would not come back as they were written, such as 007, are names.
    return whole if whole.cast(pa.large_string()).equals(given) else text


def _all_finite(numbers: pa.ChunkedArray) -> bool:
    return bool(np.isfinite(numbers.drop_null().to_numpy()).all())


def _json_lines(path: Path) -> list[bytes]:
    """The lines of a file, or the entries of the list that it holds."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if data.lstrip()[:1] != b"[":
        return [line for line in data.splitlines() if line.strip()]
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    return [json.dumps(entry, ensure_ascii=True).encode() for entry in entries]
