"""The rows behind an index: ids, vectors and metadata by row number, mapped into memory."""

import math
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32, Int64
from numpy import ndarray

from eval.index.card import Source
from eval.table import unified_schema, unit_rows

ARROW_ROWS = 16_384
"""Rows of a record batch in `rows-N.arrow`; all but the last of a file have as many."""
BLOCK = 65_536
"""Vectors decoded at a time."""

_LARGE = 1 << 30


class IndexRows:
    """Ids, vectors and metadata of an index's sources, one after the other.

    Files are mapped: they may be removed while this is in use.

    Args:
        folder: The index folder.
        sources: Its sources.
        index: The FAISS index, which gives back the vectors of sources without files of them.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or holds another number of rows than its source says; the
            line names it.
    """

    def __init__(self, folder: Path, sources: Sequence[Source], index: faiss.Index) -> None:
        self.sources = tuple(sources)
        self.dim = index.d
        self._index = index
        self._first = np.concatenate([[0], np.cumsum([one.rows for one in sources])])
        ids = [_ids(folder / one.id_file, one.rows) for one in sources]
        self.ids: Int64[ndarray, " rows"] = ids[0] if len(ids) == 1 else np.concatenate(ids)
        self._metadata = [_Batches(folder / one.arrow, one.rows) for one in sources]
        self._parts: list[ndarray | None] = []  # None: a source whose vectors FAISS alone holds
        ends: list[int] = []
        for number, source in enumerate(sources):
            first = int(self._first[number])
            for name in source.vectors:
                part = mapped(folder / name)
                if part.ndim != 2 or part.shape[1] != self.dim:
                    raise ValueError(
                        f"{folder / name}: holds {part.shape}, not vectors of {self.dim}"
                    )
                self._parts.append(part)
                first += len(part)
                ends.append(first)
            if not source.vectors:
                self._parts.append(None)
                ends.append(int(self._first[number + 1]))
            elif first != self._first[number + 1]:
                raise ValueError(
                    f"{folder / source.vectors[0]} and those behind it: "
                    f"{first - self._first[number]} vectors for {source.rows} rows"
                )
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
                found[here] = _float32(part[rows[here] - (self._ends[number] - len(part))])
        return _scaled(found)

    def blocks(self) -> Iterator[Float32[ndarray, "_ dim"]]:
        """All vectors in row order, so many at a time."""
        start = 0
        for part, end in zip(self._parts, self._ends, strict=True):
            for first in range(start, int(end), BLOCK):
                stop = min(first + BLOCK, int(end))
                if part is None:
                    yield unit_rows(self._index.reconstruct_n(first, stop - first))
                else:
                    yield _scaled(_float32(part[first - start : stop - start]))
            start = int(end)

    def metadata(self, rows: Int64[ndarray, " some"]) -> list[dict[str, Any]]:
        """The metadata of these rows, in this order; a field that a row lacks is None."""
        found: list[dict[str, Any]] = [{}] * len(rows)
        sources = np.searchsorted(self._first, rows, side="right") - 1
        for source in np.unique(sources):
            here = np.flatnonzero(sources == source)
            known = self._metadata[source].rows(rows[here] - self._first[source])
            if len(self._metadata) > 1:
                known = [{name: one.get(name) for name in self._columns} for one in known]
            for place, one in zip(here, known, strict=True):
                one["id"] = int(self.ids[rows[place]])
                found[place] = one
        return found

    @cached_property
    def _columns(self) -> list[str]:
        """The columns of all sources, each once."""
        names = (name for one in self._metadata for name in one.schema.names)
        return list(dict.fromkeys(names))

    @property
    def schema(self) -> pa.Schema:
        """The columns of the metadata of all sources."""
        return unified_schema([one.schema for one in self._metadata])

    @cached_property
    def table(self) -> pa.Table:
        """The metadata of all rows, mapped; `id` is the id within this index."""
        tables = [one.table() for one in self._metadata]
        schema = self.schema
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


def _float32(rows: Float[ndarray, "rows dim"]) -> Float32[ndarray, "rows dim"]:
    """A copy in float32; torch converts half floats five times as fast as NumPy."""
    if rows.dtype != np.float16:
        return rows.astype(np.float32)
    return torch.from_numpy(rows if rows.flags.writeable else rows.copy()).float().numpy()


def _scaled(rows: Float32[ndarray, "rows dim"]) -> Float32[ndarray, "rows dim"]:
    """These rows, in place, of unit length."""
    rows /= np.sqrt(np.einsum("rd,rd->r", rows, rows))[:, None]
    return rows


class _Batches:
    """A source's metadata: an Arrow file, mapped, whose record batches may have any sizes."""

    def __init__(self, path: Path, rows: int) -> None:
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: damaged ({error})") from error
        self.schema = self._file.schema
        self._opened: dict[int, pa.RecordBatch] = {}
        full, left = divmod(rows, ARROW_ROWS)
        sizes = [ARROW_ROWS] * full + [left] * bool(left)
        if self._file.num_record_batches != len(sizes):  # texts so long that batches were split
            number = range(self._file.num_record_batches)
            sizes = [self._file.get_batch(one).num_rows for one in number]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        if sum(sizes) != rows:
            raise ValueError(f"{path}: metadata of {sum(sizes)} rows, not of {rows}")

    def rows(self, rows: Int64[ndarray, " some"]) -> list[dict[str, Any]]:
        """The fields of these rows, in this order; each batch among them is asked once."""
        found: list[dict[str, Any]] = [{}] * len(rows)
        numbers = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            batch = self._batch(int(number))
            places = rows[here] - self._ends[number] + batch.num_rows
            taken = batch.take(pa.array(places))
            values = zip(*(column.to_pylist() for column in taken.columns), strict=True)
            for place, one in zip(here, values, strict=True):
                found[place] = dict(zip(taken.schema.names, one, strict=True))
        return found

    def _batch(self, number: int) -> pa.RecordBatch:
        batch = self._opened.get(number)
        if batch is None:
            batch = self._opened[number] = self._file.get_batch(number)
        return batch

    def table(self) -> pa.Table:
        """All rows."""
        return self._file.read_all()


def _ids(path: Path, rows: int) -> Int64[ndarray, " rows"]:
    ids = mapped(path)
    if ids.shape != (rows,) or ids.dtype != np.int64:
        raise ValueError(f"{path}: holds {ids.dtype} {ids.shape}, not the ids of {rows} rows")
    return ids


def mapped(path: Path) -> ndarray:
    """The array in a `.npy` file, mapped into memory without keeping the file open.

    An index of thousands of parts would else run out of open files; a large one is left open, since
    a mapping without a file counts as memory that could be needed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no array, objects, or less than its head says.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, by_column, dtype = reader(file)
            start = file.tell()
        size = path.stat().st_size
        if (by_column and len(shape) > 1) or dtype.hasobject:
            raise ValueError("not rows of numbers")
        if size - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{size - start} bytes for an array of {shape}")
    except (ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if size == start:
        return np.empty(shape, dtype)
    if size > _LARGE:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    memory = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    array = np.frombuffer(memory.data, dtype, offset=start).reshape(shape)
    array.flags.writeable = False
    return array
