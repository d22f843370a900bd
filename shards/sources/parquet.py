"""Records out of Parquet tables, with the pictures in them or beside them."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.damage import BadSample, Reason
from shards.sources.rows import ArrowRows, Rows
from shards.sources.tables import TableSource

_KEPT_BYTES = 1 << 30


class ParquetSource(TableSource):
    """The rows of Parquet files as records; see `TableSource`.

    The column of pictures may hold paths, or encoded pictures as bytes or as a struct with a field
    `bytes`. Those are read one row group at a time, and the groups used last are kept, up to 1 GiB.
    To mix more than that, pack in order and mix the shards: they have no groups. Other columns of
    bytes are passed over.
    """

    endings = (".parquet", ".pq")

    def _load(self, path: Path) -> Rows:
        try:
            return _ParquetRows(path, self._image)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be read as Parquet ({line})") from None

    def _names(self, rows: Rows) -> list[str | None] | None:
        kind = rows.kind(self._image)
        if kind == "pictures":
            return None
        if kind != "text":
            raise ValueError(
                f"{rows.path}: column {self._image!r} holds {kind}; it must hold encoded pictures, "
                "or paths of pictures"
            )
        return super()._names(rows)

    def _picture(self, table: int, row: int, value: Any) -> bytes:
        rows = self._tables[table]
        assert isinstance(rows, _ParquetRows)
        if not rows.holds_pictures:
            return super()._picture(table, row, value)
        try:
            return rows.picture(row)
        except (pa.ArrowException, OSError) as error:
            line = str(error).splitlines()[0]
            raise BadSample(Reason.UNREADABLE, f"row {rows.numbers[row]}: {line}"[:200]) from None


class _ParquetRows(ArrowRows):
    """The rows of a Parquet file: pictures on request, all else in memory."""

    def __init__(self, path: Path, image: str) -> None:
        self._file = pq.ParquetFile(path)
        schema = self._file.schema_arrow
        bulky = {field.name for field in schema if _is_bulky(field.type)}
        super().__init__(path, self._file.read([n for n in schema.names if n not in bulky]))
        self.holds_pictures = image in bulky
        self._image = image
        self._of_struct = self.holds_pictures and pa.types.is_struct(schema.field(image).type)
        self.columns = list(schema.names)
        self._types = {field.name: field.type for field in schema}
        sizes = [
            self._file.metadata.row_group(group).num_rows
            for group in range(self._file.num_row_groups)
        ]
        self._ends = np.cumsum(sizes)
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def kind(self, name: str) -> str:
        if name == self._image and self.holds_pictures:
            return "pictures"
        return super().kind(name) if name in self._table.column_names else str(self._types[name])

    def keep(self, where: Mapping[str, Any]) -> None:
        """Drops the other rows."""
        if bulky := next((name for name in where if name not in self._table.column_names), None):
            raise ValueError(f"{self.path}: column {bulky!r} holds bytes; where cannot look at it")
        super().keep(where)

    def picture(self, index: int) -> bytes:
        """The encoded picture of a row; empty where there is none."""
        number = int(self.numbers[index])
        group = int(np.searchsorted(self._ends, number, side="right"))
        with self._lock:
            column = self._groups.pop(group, None)
            if column is None:
                column = self._read(group)
            self._groups[group] = column
            while (
                len(self._groups) > 1 and sum(c.nbytes for c in self._groups.values()) > _KEPT_BYTES
            ):
                self._groups.popitem(last=False)
        return column[number - int(self._ends[group]) + len(column)].as_py() or b""

    def _read(self, group: int) -> pa.ChunkedArray:
        if not self._of_struct:
            return self._file.read_row_group(group, [self._image])[self._image]
        struct = self._file.read_row_group(group, [f"{self._image}.bytes"])[self._image]
        parts = [chunk.field("bytes") for chunk in struct.chunks]
        return pa.chunked_array(parts)


def _is_bulky(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, or a struct with bytes in it."""
    if pa.types.is_struct(kind):
        return any(child.name == "bytes" and _is_bulky(child.type) for child in kind)
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)
