"""The files of clip-retrieval's and autofaiss's folders, and an embedding table made of them."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64
from numpy import ndarray
from pyarrow import parquet

from eval.cards import file_sha256
from eval.index.folder import link
from eval.metrics import check_rows
from eval.table import MODALITIES, EmbeddingTable, Part, TableCard

FOLDERS = {"image": "img_emb", "text": "text_emb"}
"""Where clip-retrieval writes embeddings."""

BLOCK = 65_536
"""Rows of metadata or vectors looked at at a time."""


@dataclass(frozen=True)
class Vectors:
    """Files of embeddings, their rows one after the other; files without rows are left out."""

    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    dim: int
    dtype: str

    @classmethod
    def of(cls, paths: Sequence[Path]) -> "Vectors":
        """Look at the files.

        Raises:
            ValueError: One is no plain array of float16 or float32, or they differ in width.
        """
        arrays = {path: _array(path) for path in paths}
        full = {path: array for path, array in arrays.items() if len(array)}
        if not full:
            raise ValueError(f"{paths[0].parent}: no rows in it")
        first, *_ = full.values()
        for path, array in full.items():
            if array.shape[1] != first.shape[1]:
                raise ValueError(
                    f"{path}: rows of {array.shape[1]}, but {paths[0].name} has {first.shape[1]}"
                )
        return cls(
            tuple(full),
            tuple(len(array) for array in full.values()),
            first.shape[1],
            str(np.result_type(*(array.dtype for array in full.values()))),
        )

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.paths[0].parent

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(self.counts)

    def some(self, rows: Int64[ndarray, " some"]) -> Float32[ndarray, "some dim"]:
        """Rows by number, as they are."""
        ends = np.cumsum(self.counts)
        found = np.empty((len(rows), self.dim), np.float32)
        part_of = np.searchsorted(ends, rows, side="right")
        for number in np.unique(part_of):
            here = np.flatnonzero(part_of == number)
            first = ends[number] - self.counts[number]
            found[here] = _array(self.paths[number])[rows[here] - first]
        return found

    def check(self) -> None:
        """Refuse rows without a direction.

        Raises:
            ValueError: One is not finite or all zero; names its file and its number there.
        """
        for path in self.paths:
            check_rows(_array(path), str(path))


@dataclass(frozen=True)
class Metadata:
    """Parquet or Arrow files of metadata, their rows one after the other."""

    paths: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.paths[0].parent

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each file."""
        return tuple(sum(len(one) for one in _batches(path, columns=[])) for path in self.paths)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(self.counts)

    def cut(self, sizes: Sequence[int]) -> Iterator[pa.Table]:
        """All rows, so many at a time."""
        batches = (batch for path in self.paths for batch in _batches(path))
        waiting: list[pa.Table] = []
        for size in sizes:
            while sum(map(len, waiting)) < size:
                waiting.append(next(batches))
            whole = pa.concat_tables(waiting, promote_options="permissive")
            yield whole.slice(0, size)
            waiting = [whole.slice(size)]


@dataclass(frozen=True)
class PeerFiles:
    """What a folder of theirs holds; files in the order of their names as text, as they read them.

    Attributes:
        vectors: Embeddings by modality.
        metadata: None where there are none.
    """

    vectors: dict[str, Vectors]
    metadata: Metadata | None


def peer_files(folder: Path, modality: str) -> PeerFiles:
    """Find and look at the files of a folder.

    Args:
        folder: One of clip-retrieval's or autofaiss's.
        modality: What `.npy` files outside `img_emb/` and `text_emb/` are embeddings of.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: A file cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = {kind: sorted((folder / name).glob("*.npy")) for kind, name in FOLDERS.items()}
    if not any(paths.values()):
        paths = {modality: sorted(folder.glob("*.npy"))}
    vectors = {kind: Vectors.of(found) for kind, found in paths.items() if found}
    there = folder / "metadata"
    rows = sorted(there.glob("*.parquet")) or sorted(there.glob("**/*.arrow"))
    hdf5 = [*folder.glob("metadata*.hdf5"), *there.glob("*.hdf5")]
    if not rows and hdf5:
        raise ValueError(
            f"{hdf5[0]}: metadata in HDF5 are not read; put the Parquet files that they were made "
            f"from into {there}"
        )
    return PeerFiles(vectors, Metadata(tuple(rows)) if rows else None)


def write_peer_table(
    files: PeerFiles, out: Path, *, model_fingerprint: str, origin: Mapping[str, Any]
) -> EmbeddingTable:
    """A table in a new folder: vectors linked, metadata written anew with ids from 0.

    Raises:
        ValueError: Counts differ, or a row has no direction.
    """
    first, *others = files.vectors.values()
    for one in others:
        if one.counts != first.counts or one.dim != first.dim:
            raise ValueError(
                f"{one.folder}: {one.rows} rows of {one.dim} in {len(one.paths)} files, but "
                f"{first.folder} has {first.rows} of {first.dim} in {len(first.paths)}"
            )
    _refuse_other_counts(first, files.metadata)
    sizes = first.counts
    metadata = files.metadata.cut(sizes) if files.metadata else (_without(size) for size in sizes)
    parts = []
    row = 0
    for number, rows in enumerate(metadata):
        written = {}
        for kind, vectors in files.vectors.items():
            name = f"{MODALITIES[kind]}/{MODALITIES[kind]}_{number}.npy"
            link(vectors.paths[number].resolve(), out / name)  # not a link to a link
            written[name] = file_sha256(out / name)
        name = f"metadata/metadata_{number}.parquet"
        (out / "metadata").mkdir(parents=True, exist_ok=True)
        parquet.write_table(_named(rows, row), out / name)
        written[name] = file_sha256(out / name)
        row += sizes[number]
        parts.append(Part(sizes[number], row - 1, written))
    for vectors in files.vectors.values():
        vectors.check()
    prints = [digest for part in parts for digest in part.files.values()]
    TableCard(
        modalities=tuple(kind for kind in MODALITIES if kind in files.vectors),
        dim=first.dim,
        dtype=str(np.result_type(*(one.dtype for one in files.vectors.values()))),
        rows_per_part=max(sizes),
        fingerprints={"model": model_fingerprint, "data": _digest(prints)},
        origin=dict(origin),
        complete=True,
        parts=tuple(parts),
    ).save(out)
    return EmbeddingTable(out, check="sizes")


def _refuse_other_counts(vectors: Vectors, metadata: Metadata | None) -> None:
    """Vectors and metadata that slipped against each other would show other rows' pictures."""
    if metadata is None:
        return
    if metadata.rows != vectors.rows:
        raise ValueError(
            f"{metadata.folder}: {metadata.rows} rows, but {vectors.rows} vectors in "
            f"{vectors.folder}; hits would show other rows than were found"
        )
    counts = [count for count in metadata.counts if count]
    paths = [path for path, count in zip(metadata.paths, metadata.counts, strict=True) if count]
    if len(counts) != len(vectors.counts):
        return  # otherwise divided, such as into one file
    for count, path, size, other in zip(counts, paths, vectors.counts, vectors.paths, strict=True):
        if count != size or _number(path) != _number(other):
            raise ValueError(
                f"{path}: {count} rows beside {size} of {other.name}; these files do not belong "
                "together"
            )


def _number(path: Path) -> int | None:
    """The number at the end of a file's name."""
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else None


def _array(path: Path) -> ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: not a plain array of numbers ({error}); pickled arrays are never read"
        ) from error
    if array.ndim != 2 or array.dtype.name not in ("float16", "float32"):
        raise ValueError(
            f"{path}: {array.dtype} of shape {array.shape}, but embeddings are rows of float16 or "
            "float32"
        )
    return array


def _batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a metadata file, some at a time."""
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file:
                reader = pa.ipc.open_file(file)
                for number in range(reader.num_record_batches):
                    yield _plain(pa.table(reader.get_batch(number)))  # pyright: ignore
            return
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BLOCK, columns=columns):
                yield _plain(pa.Table.from_batches([batch]))
    except pa.ArrowException as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not readable as metadata ({line})") from error


def _plain(rows: pa.Table) -> pa.Table:
    """Without what pandas says of columns, without its index, dictionaries as their values."""
    names = [name for name in rows.column_names if not name.startswith("__index_level_")]
    columns = {}
    for name in names:
        column = rows[name]
        kind = column.type
        columns[name] = column.cast(kind.value_type) if pa.types.is_dictionary(kind) else column
    return pa.table(columns) if columns else pa.Table.from_batches(rows.to_batches())


def _without(rows: int) -> pa.Table:
    """Metadata for so many rows that have none."""
    return pa.table({"caption": pa.nulls(rows, pa.string())})


def _named(rows: pa.Table, first: int) -> pa.Table:
    """The columns that every table has (id, key, caption, shard), then those of the peer.

    A row's key is its `key`, else its `image_path` or `url`, else its number. Their own `id`, which
    numbers something else, is left out.
    """
    count = len(rows)
    own = [name for name in ("key", "image_path", "url") if name in rows.column_names]
    numbers = pa.array(np.arange(first, first + count))
    fixed = {
        "id": numbers,
        "key": (rows[own[0]] if own else numbers).cast(pa.string()),
        "caption": _text(rows, "caption"),
        "shard": _text(rows, "shard"),
    }
    others = {name: rows[name] for name in rows.column_names if name not in fixed}
    return pa.table({**fixed, **others})


def _text(rows: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    if name in rows.column_names:
        return rows[name].cast(pa.string())
    return pa.nulls(len(rows), pa.string())


def _digest(prints: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(prints).encode()).hexdigest()
