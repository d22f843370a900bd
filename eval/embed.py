"""Writing an embedding table: vectors and metadata in parts, each on disk whole or not at all.

The layout is the one clip-retrieval and embedding-reader read:

    img_emb/img_emb_0.npy      unit-length rows, float16 or float32
    text_emb/text_emb_0.npy    the same rows of the other modality
    metadata/metadata_0.parquet    id, key, caption, shard, and the samples' own fields
    table.json                 what there is: parts, rows, fingerprints, checksums

Their only join is the order of the rows. Here every row also has the stable id of its sample, ids
ascend through the table, and `table.json` holds the rows and the SHA-256 of every file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64
from numpy import ndarray
from pyarrow import parquet

from eval.cards import write_whole
from eval.metrics import check_rows
from eval.table import (
    MODALITIES,
    EmbeddingTable,
    Part,
    TableCard,
    unified_schema,
    unit_rows,
    verify_parts,
)

_COLUMNS = pa.schema(
    [("id", pa.int64()), ("key", pa.string()), ("caption", pa.string()), ("shard", pa.string())]
)


@dataclass(frozen=True)
class EmbeddedRows:
    """Some consecutive samples with their embeddings.

    Attributes:
        ids: Stable sample ids, ascending within and across batches.
        keys: The samples' keys.
        captions: Their captions; None where there is none.
        shards: The names of the files they came from.
        embeddings: Per modality one row per sample, of any length but zero.
        fields: The samples' own JSON members; nested ones become columns `outer.inner`, and a field
            named like one of the four columns above gives way to it.
    """

    ids: Int64[ndarray, " rows"]
    keys: Sequence[str]
    captions: Sequence[str | None]
    shards: Sequence[str]
    embeddings: Mapping[str, Float[ndarray, "rows dim"]]
    fields: Sequence[Mapping[str, Any]] | None = None


class TableWriter:
    """Write a table part by part; after a kill a new writer goes on behind the last whole part.

    Batches may have any size: the parts, and every byte of them, depend on the rows alone.

    Args:
        out: The table's folder, new, empty, or an unfinished table with the same options.
        modalities: What every batch will bring.
        dim: Length of an embedding.
        fingerprints: Which model and data the rows are from.
        dtype: How vectors are stored.
        rows_per_part: Rows of a part; two of them are held in memory at most.
        origin: Free JSON values, kept in the table and copied to indexes built from it.

    Raises:
        ValueError: The folder holds something else, or a table begun with other options.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        modalities: Sequence[str],
        dim: int,
        fingerprints: Mapping[str, str],
        dtype: Literal["float16", "float32"] = "float16",
        rows_per_part: int = 100_000,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(out)
        self._pending: list[EmbeddedRows] = []
        self._schema = _COLUMNS
        wanted = TableCard(
            modalities=tuple(name for name in MODALITIES if name in modalities),
            dim=dim,
            dtype=dtype,
            rows_per_part=rows_per_part,
            fingerprints=dict(fingerprints),
            origin=dict(origin or {}),
        )
        if len(wanted.modalities) != len(modalities) or not modalities:
            raise ValueError(f"modalities: {list(modalities)}, but know {list(MODALITIES)}")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype: {dtype!r}, but a table holds float16 or float32")
        if rows_per_part < 1 or dim < 1:
            raise ValueError(f"rows_per_part {rows_per_part} and dim {dim} must be at least 1")
        self.card = self._resume(wanted)

    @property
    def rows_done(self) -> int:
        """Rows in whole parts; later ones are not on disk yet."""
        return self.card.rows

    @property
    def next_id(self) -> int:
        """The least sample id that may come next, given the whole parts: where a source resumes."""
        return self.card.parts[-1].last_id + 1 if self.card.parts else 0

    def add(self, batch: EmbeddedRows) -> None:
        """Take the next rows, and write the parts they fill.

        Raises:
            ValueError: Ids do not ascend, columns differ in length, a modality is missing or too
                much, or a row has no direction (NaN, infinity, zeros); nothing of it is kept.
        """
        self._check(batch)
        if len(batch.ids) == 0:
            return
        self._pending.append(batch)
        waiting = sum(len(rows.ids) for rows in self._pending)
        while waiting >= self.card.rows_per_part:
            merged = _merge(self._pending)
            size = self.card.rows_per_part
            self._write_part(_slice(merged, 0, size))
            waiting -= size
            self._pending = [_slice(merged, size, size + waiting)] if waiting else []

    def finish(self) -> EmbeddingTable:
        """Write the last, shorter part, mark the table complete and open it.

        Raises:
            ValueError: No row was ever added.
        """
        if self._pending:
            self._write_part(_merge(self._pending))
            self._pending = []
        if not self.card.parts:
            raise ValueError(f"{self.folder}: no samples to embed")
        self._save(complete=True)
        return EmbeddingTable(self.folder, check="sizes")

    def _resume(self, wanted: TableCard) -> TableCard:
        if not self.folder.exists() or not any(self.folder.iterdir()):
            self.folder.mkdir(parents=True, exist_ok=True)
            wanted.save(self.folder)
            return wanted
        if not (self.folder / "table.json").exists():
            raise ValueError(f"{self.folder}: holds other files; embed into a new folder")
        found = TableCard.load(self.folder)
        for name in ("modalities", "dim", "dtype", "rows_per_part", "fingerprints"):
            there, here = getattr(found, name), getattr(wanted, name)
            if there != here:
                raise ValueError(
                    f"{self.folder}: begun with {name} {there}, now {here}; embed into a new folder"
                )
        verify_parts(self.folder, found.parts, check="sha256")
        for number in range(len(found.parts)):
            path = self.folder / f"metadata/metadata_{number}.parquet"
            self._schema = unified_schema([self._schema, parquet.read_schema(path)])
        return found

    def _check(self, batch: EmbeddedRows) -> None:
        rows = len(batch.ids)
        columns = {"keys": batch.keys, "captions": batch.captions, "shards": batch.shards}
        if batch.fields is not None:
            columns["fields"] = batch.fields
        for name, column in {**columns, **batch.embeddings}.items():
            if len(column) != rows:
                raise ValueError(f"embedded rows: {rows} ids but {len(column)} of {name}")
        last = self._pending[-1].ids[-1] if self._pending else self.next_id - 1
        steps = np.diff(batch.ids, prepend=last)
        if (steps < 1).any():
            row = int(np.argmax(steps < 1))
            raise ValueError(
                f"embedded rows: sample id {batch.ids[row]} (key {batch.keys[row]!r}) comes after "
                f"{batch.ids[row] - steps[row]}; ids must ascend, each once"
            )
        if set(batch.embeddings) != set(self.card.modalities):
            given, known = sorted(batch.embeddings), sorted(self.card.modalities)
            raise ValueError(f"embedded rows: modalities {given}, but the table has {known}")
        for name, vectors in batch.embeddings.items():
            if vectors.shape[1] != self.card.dim:
                width = vectors.shape[1]
                raise ValueError(f"{name} embeddings: {width} wide, the table {self.card.dim}")
            if rows:
                check_rows(vectors, f"{name} (samples {batch.ids[0]} to {batch.ids[-1]})")

    def _write_part(self, rows: EmbeddedRows) -> None:
        number = len(self.card.parts)
        files = {}
        for name in self.card.modalities:
            folder = MODALITIES[name]
            vectors = unit_rows(rows.embeddings[name]).astype(self.card.dtype)
            path = f"{folder}/{folder}_{number}.npy"
            files[path] = write_whole(
                self.folder / path, lambda file, vectors=vectors: np.save(file, vectors)
            )
        table = _metadata(rows)
        self._schema = unified_schema([self._schema, table.schema])
        path = f"metadata/metadata_{number}.parquet"
        files[path] = write_whole(self.folder / path, lambda file: parquet.write_table(table, file))
        # The part exists from here on: files without an entry are overwritten by a resumed run.
        self._save(parts=(*self.card.parts, Part(len(rows.ids), int(rows.ids[-1]), files)))

    def _save(self, **changes: Any) -> None:
        self.card = TableCard(**{**vars(self.card), **changes})
        self.card.save(self.folder)


def write_table(
    out: Path | str,
    batches: Callable[[int], Iterable[EmbeddedRows]],
    *,
    modalities: Sequence[str],
    dim: int,
    fingerprints: Mapping[str, str],
    **options: Any,
) -> EmbeddingTable:
    """Write a whole table, or the rest of one whose writing was killed.

    Args:
        out: The table's folder.
        batches: Called once with the least sample id that is not on disk yet; gives the samples
            from that id on, in ascending order.
        modalities: As for :class:`TableWriter`, like the remaining arguments.
        dim: Length of an embedding.
        fingerprints: Which model and data the rows are from.
        **options: `dtype`, `rows_per_part`, `origin` of :class:`TableWriter`.

    Raises:
        ValueError: As :class:`TableWriter` and its methods.
    """
    writer = TableWriter(out, modalities=modalities, dim=dim, fingerprints=fingerprints, **options)
    if writer.card.complete:
        return EmbeddingTable(out, check="sizes")  # the writer has compared every checksum
    for batch in batches(writer.next_id):
        writer.add(batch)
    return writer.finish()


def _metadata(rows: EmbeddedRows) -> pa.Table:
    columns: dict[str, list[Any]] = {}
    for row, sample in enumerate(rows.fields or ()):
        for name, value in _flatten(sample):
            if name not in _COLUMNS.names:
                columns.setdefault(name, [None] * len(rows.ids))[row] = value
    arrays = {}
    for name in sorted(columns):
        try:
            arrays[name] = pa.array(columns[name])
        except pa.ArrowException as error:
            raise ValueError(f"field {name!r} has values of several types: {error}") from error
    known = [rows.ids, rows.keys, rows.captions, rows.shards]
    fixed = {
        column.name: pa.array(values, type=column.type)
        for column, values in zip(_COLUMNS, known, strict=True)
    }
    return pa.table({**fixed, **arrays})


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _merge(batches: Sequence[EmbeddedRows]) -> EmbeddedRows:
    names = batches[0].embeddings
    fields = [sample for batch in batches for sample in batch.fields or [{}] * len(batch.ids)]
    return EmbeddedRows(
        ids=np.concatenate([batch.ids for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
        captions=[caption for batch in batches for caption in batch.captions],
        shards=[shard for batch in batches for shard in batch.shards],
        embeddings={
            name: np.concatenate([batch.embeddings[name] for batch in batches]) for name in names
        },
        fields=fields,
    )


def _slice(rows: EmbeddedRows, start: int, stop: int) -> EmbeddedRows:
    return EmbeddedRows(
        ids=rows.ids[start:stop],
        keys=rows.keys[start:stop],
        captions=rows.captions[start:stop],
        shards=rows.shards[start:stop],
        embeddings={name: vectors[start:stop] for name, vectors in rows.embeddings.items()},
        fields=None if rows.fields is None else rows.fields[start:stop],
    )
