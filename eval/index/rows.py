"""The rows behind an index: ids, vectors and metadata by row number, mapped into memory."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.index.card import Source
from eval.table import unified_schema, unit_rows

ARROW_ROWS = 16_384
"""Rows of a record batch in `rows-N.arrow`; all but the last of a file have as many."""
BLOCK = 65_536
"""Vectors decoded at a time."""


class IndexRows:
    """Ids, vectors and metadata of an index's sources, one after the other.

    Args:
        folder: The index folder.
        sources: Its sources.
        index: The FAISS index, which gives back the vectors of sources without files of them.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], index: faiss.Index) -> None:
        self.sources = tuple(sources)
        self.dim = index.d
        self._index = index
        self._first = np.concatenate([[0], np.cumsum([one.rows for one in sources])])
        self._files = [pa.ipc.open_file(pa.memory_map(str(folder / s.arrow))) for s in sources]
        ids = [np.load(folder / one.id_file, mmap_mode="r", allow_pickle=False) for one in sources]
        self.ids: Int64[ndarray, " rows"] = ids[0] if len(ids) == 1 else np.concatenate(ids)
        self._parts: list[ndarray | None] = []  # None: a source whose vectors FAISS alone holds
        ends = []
        for number, source in enumerate(sources):
            first = int(self._first[number])
            for name in source.vectors:
                self._parts.append(np.load(folder / name, mmap_mode="r", allow_pickle=False))
                first += len(self._parts[-1])  # type: ignore[arg-type]
                ends.append(first)
            if not source.vectors:
                self._parts.append(None)
                ends.append(int(self._first[number + 1]))
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def vectors(self, rows: Int64[ndarray, " some"]) -> Float32[ndarray, "some dim"]:
        """Unit-length vectors by row number, in the order asked for.

        Where the index came without files of vectors, they are what FAISS decodes.
        """
        found = np.empty((len(rows), self.dim), np.float32)
        part_of = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(part_of):
            here = np.flatnonzero(part_of == number)
            part = self._parts[number]
            if part is None:
                found[here] = self._index.reconstruct_batch(rows[here])
            else:
                found[here] = part[rows[here] - (self._ends[number] - len(part))]
        return unit_rows(found)

    def blocks(self) -> Iterator[Float32[ndarray, "_ dim"]]:
        """All vectors in row order, so many at a time."""
        start = 0
        for part, end in zip(self._parts, self._ends, strict=True):
            for first in range(start, int(end), BLOCK):
                stop = min(first + BLOCK, int(end))
                if part is None:
                    yield unit_rows(self._index.reconstruct_n(first, stop - first))
                else:
                    yield unit_rows(part[first - start : stop - start])
            start = int(end)

    def metadata(self, rows: Int64[ndarray, " some"]) -> list[dict[str, Any]]:
        """The metadata of these rows, in this order; a field that a row lacks is None."""
        found = []
        for row in rows:
            source = int(np.searchsorted(self._first, row, side="right")) - 1
            batch, place = divmod(int(row - self._first[source]), ARROW_ROWS)
            one = self._files[source].get_batch(batch).slice(place, 1).to_pylist()[0]
            one["id"] = int(self.ids[row])
            found.append(one)
        return found

    @cached_property
    def table(self) -> pa.Table:
        """The metadata of all rows, mapped; `id` is the id within this index."""
        tables = [file.read_all() for file in self._files]
        schema = unified_schema([one.schema for one in tables])
        whole = []
        for number, (source, one) in enumerate(zip(self.sources, tables, strict=True)):
            first = int(self._first[number])
            columns = {
                column.name: one[column.name].cast(column.type)
                if column.name in one.column_names
                else pa.nulls(len(one), column.type)
                for column in schema
            }
            columns["id"] = pa.array(self.ids[first : first + source.rows])
            whole.append(pa.table(columns))
        return pa.concat_tables(whole)

    def places(self, ids: Int64[ndarray, " some"]) -> Int64[ndarray, " some"]:
        """Row numbers of ids, -1 for those that the index does not hold."""
        rows = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[rows] == ids, rows, -1)

    def held(self, ids: Collection[int | np.integer]) -> Int64[ndarray, " held"]:
        """Row numbers of those of the ids that the index holds, each once."""
        rows = self.places(np.unique(np.array(list(ids), dtype=np.int64)))
        return rows[rows >= 0]

    def source_of(self, row: int | np.integer) -> Source:
        """The source that a row came from."""
        return self.sources[int(np.searchsorted(self._first, row, side="right")) - 1]
