"""Filters over the metadata of an index: an SQL expression, or values by field, into allowed rows.

DuckDB reads the mapped Arrow files, so that only the columns asked for are touched. Expressions may
come from strangers: a parser looks that each is one expression without a subquery, and DuckDB can
reach no file, no network and no setting, has a limit of memory, and is interrupted in time; rows
come to it in small chunks, since neither holds within one.
"""

import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64, UInt8
from numpy import ndarray

from eval.index.rows import IndexRows
from eval.search.expression import check_length, check_parsed
from eval.search.fields import Column, column_of, conditions, quoted

T = TypeVar("T")

_REMEMBERED_BYTES = 64 * 2**20
"""Of the answers that are kept, because pages of one search ask the same again."""
_CHUNK_BYTES = 2**20
"""Metadata that is filtered at a time, about: texts that an expression makes of it are in memory
together."""
_THREADS = 4
"""That one filter may take, each with a chunk."""
_LOCKED = (
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET autoload_known_extensions = false",
    "SET autoinstall_known_extensions = false",
    "SET python_enable_replacements = false",
    "SET lock_configuration = true",
)


class FilterTimeoutError(ValueError):
    """A filter took too long and was interrupted."""


class Allowed:
    """Rows that may be found, as a bitmap.

    Args:
        mask: Per row of the index whether it may be found.
    """

    def __init__(self, mask: Bool[ndarray, " rows"]) -> None:
        self.of = len(mask)
        self.bits: UInt8[ndarray, " bytes"] = np.packbits(mask, bitorder="little")
        self.count = int(np.count_nonzero(mask))

    @property
    def mask(self) -> Bool[ndarray, " rows"]:
        """One truth value a row."""
        return np.unpackbits(self.bits, count=self.of, bitorder="little").view(bool)

    @cached_property
    def rows(self) -> Int64[ndarray, " allowed"]:
        """Their row numbers, ascending."""
        return np.flatnonzero(self.mask)

    def has(self, rows: Int64[ndarray, "*any"]) -> Bool[ndarray, "*any"]:
        """Whether each of these rows is among them; -1 never is."""
        return (rows >= 0) & ((self.bits[rows >> 3] >> (rows & 7)) & 1).astype(bool)

    @property
    def bytes(self) -> int:
        """Memory held, row numbers included where they were asked for."""
        return len(self.bits) + (8 * self.count if "rows" in vars(self) else 0)


class RowFilter:
    """Finds the rows that filters and removals leave; many threads may ask at once.

    Args:
        rows: The rows of an index.
        removed: Numbers of those that nothing may find.
        seconds: When a filter is interrupted.
        memory: What DuckDB may take.
    """

    def __init__(
        self,
        rows: IndexRows,
        removed: Int64[ndarray, " removed"],
        *,
        seconds: float = 5.0,
        memory: str = "1GB",
    ) -> None:
        self._rows = rows
        self._seconds = seconds
        self._memory = memory
        self._kept: OrderedDict[str, Allowed] = OrderedDict()
        self._lock = threading.Lock()
        self._removed = pa.table({"id": rows.ids[removed]})
        self.live: Allowed | None = None  # None: all rows are
        if len(removed):
            mask = np.ones(len(rows), bool)
            mask[removed] = False
            self.live = Allowed(mask)

    @cached_property
    def _database(self) -> Any:
        database = duckdb.connect(":memory:")
        database.execute(f"SET memory_limit = '{self._memory}'")
        database.execute(f"SET threads = {min(_THREADS, os.cpu_count() or 1)}")
        for line in _LOCKED:
            database.execute(line)
        return database

    @cached_property
    def _chunked(self) -> pa.Table:
        """The metadata that filters see, in chunks of about `_CHUNK_BYTES`.

        DuckDB takes names that differ only in case for one. Such columns are left out, so that a
        filter by them is refused instead of looking at the other.
        """
        table = self._rows.table
        times = Counter(name.lower() for name in table.column_names)
        table = table.select([n for n in table.column_names if n == "id" or times[n.lower()] == 1])
        of_a_row = table.nbytes / max(len(table), 1)
        rows = max(int(_CHUNK_BYTES / max(of_a_row, 1.0)), 16)
        return pa.Table.from_batches(table.to_batches(max_chunksize=rows), table.schema)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The columns of the metadata by name."""
        described = self._ask("DESCRIBE rows", (), lambda cursor: cursor.fetchall())
        return {name: column_of(name, kind) for name, kind, *_ in described}

    def allowed(
        self, where: str | None = None, fields: Mapping[str, Any] | None = None
    ) -> Allowed | None:
        """The rows that filters and removals leave; None where that is all.

        Args:
            where: An SQL expression over the columns; rows of which it is true stay.
            fields: What columns must hold, as :func:`eval.search.fields.conditions` says.

        Raises:
            ValueError: An unknown column, a bad value, or no such expression; lists the columns.
            FilterTimeoutError: It took too long.
        """
        where = (where or "").strip()
        if not where and not fields:
            return self.live
        clauses, values = conditions(fields or {}, self.columns)
        if where:
            clauses.append(f"({where}\n)")  # the new line ends a comment
        if not clauses:
            return self.live
        name = json.dumps([clauses, values], default=str)
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        if where:
            self._check(where)
        found = self._look(" AND ".join(clauses), values)
        with self._lock:
            self._kept[name] = found
            while sum(one.bytes for one in self._kept.values()) > _REMEMBERED_BYTES:
                self._kept.popitem(last=False)
        return found

    def run(self, sql: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a query of our own over the views `rows` and `removed`, which holds ids.

        Raises:
            duckdb.Error: It takes too long or too much memory.
        """
        return self._ask(sql, values, lambda cursor: cursor.fetchall())

    def _look(self, condition: str, values: list[Any]) -> Allowed:
        sql = f"SELECT id FROM rows WHERE {condition}"
        try:
            ids = self._ask(sql, tuple(values), lambda cursor: cursor.fetchnumpy()["id"])
        except duckdb.InterruptException as error:
            raise FilterTimeoutError(
                f"where: took longer than {self._seconds:g} s; make the filter simpler"
            ) from error
        except duckdb.Error as error:
            raise ValueError(f"where: {self._one_line(error)}") from error
        mask = self._marked(np.asarray(ids, np.int64))
        if self.live is not None:
            mask &= self.live.mask
        return Allowed(mask)

    def _marked(self, ids: Int64[ndarray, " some"]) -> Bool[ndarray, " rows"]:
        """Which rows have these ids, in any order."""
        own = self._rows.ids
        mask = np.zeros(len(own), bool)
        if len(own) and int(own[-1]) - int(own[0]) + 1 == len(own):
            mask[ids - own[0]] = True  # the ids have no gaps
        else:
            mask[np.searchsorted(own, ids)] = True
        return mask

    def _check(self, where: str) -> None:
        """Refuse what is more than one expression over one row.

        Raises:
            ValueError: It is; says what.
        """
        check_length(where)
        try:
            parsed = self._parsed(f"SELECT {where}\n")
        except RecursionError as error:
            raise ValueError("where: nested too deeply") from error
        if parsed.get("error"):
            raise ValueError(f"where: {self._one_line(parsed.get('error_message', ''))}")
        check_parsed(parsed, self._plain)

    def _parsed(self, sql: str) -> dict[str, Any]:
        ask = "SELECT json_serialize_sql(?)"
        try:
            text = self._ask(ask, (sql,), lambda cursor: cursor.fetchall()[0][0], views=False)
        except duckdb.Error as error:
            raise ValueError(f"where: {self._one_line(error)}") from error
        return json.loads(text)

    @cached_property
    def _plain(self) -> dict[str, Any]:
        return self._parsed("SELECT 1")

    def _ask(
        self,
        sql: str,
        values: tuple[Any, ...],
        read: Callable[[Any], T],
        *,
        views: bool = True,
    ) -> T:
        with self._lock:
            cursor = self._database.cursor()
            tables = {"rows": self._chunked, "removed": self._removed} if views else {}
        timer = threading.Timer(self._seconds, cursor.interrupt)
        timer.daemon = True
        try:
            for name, table in tables.items():
                cursor.register(name, table)
            timer.start()
            return read(cursor.execute(sql, values))
        finally:
            timer.cancel()
            cursor.close()

    def _one_line(self, error: Exception | str) -> str:
        said = str(error).strip().split("\n")[0]
        said = said.split(" Error: ", 1)[-1].rstrip("!.")
        names = [quoted(name) for name in self.columns]
        listed = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        return f"{said}; columns: {listed}"
