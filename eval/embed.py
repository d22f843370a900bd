"""Writing an embedding table: vectors and metadata in parts, each on disk whole or not at all.

The layout is the one clip-retrieval and embedding-reader read:

    img_emb/img_emb_00000.npy      unit-length rows, float16 or float32
    text_emb/text_emb_00000.npy    the same rows of the other modality
    metadata/metadata_00000.parquet    id, key, caption, shard, and the samples' own fields
    parts/part_00000.json          what the part holds; written last, so it makes the part exist
    table.json                     what there is: parts, rows, fingerprints, checksums

Their only join is the order of the rows. Here every row also has the stable id of its sample, ids
ascend through the table, and the cards hold the rows and the SHA-256 of every file. Part `p` holds
the samples with ids from `p * rows_per_part` on, so that parts can be written in any order, by many
processes, and again after a kill. Numbers have five digits because readers sort names as text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64
from numpy import ndarray
from pyarrow import parquet

from eval.cards import write_whole
from eval.columns import OWN, agreed, columns_of, in_agreement, mixed_noted, names_of, notes_on
from eval.metrics import check_rows
from eval.table import (
    MODALITIES,
    EmbeddingTable,
    PartCard,
    TableCard,
    part_path,
    read_parts,
    unit_rows,
    verify_parts,
)

ROWS_PER_PART = 10_000
"""Samples of a part unless stated: what a kill can cost, and files of 10 MB at a width of 512."""

_MOST_PARTS = 100_000
_TYPES = {"id": pa.int64(), "key": pa.string(), "caption": pa.string(), "shard": pa.string()}


@dataclass(frozen=True)
class EmbeddedRows:
    """Some consecutive samples with their embeddings.

    Attributes:
        ids: Stable sample ids, ascending within and across batches.
        keys: The samples' keys.
        captions: Their captions; None where there is none.
        shards: The names of the files they came from.
        embeddings: Per modality one row per sample, of any length but zero.
        fields: The samples' own JSON members; nested ones become columns `outer.inner`, and what
            becomes of taken names and mixed types is told in `eval.columns`.
    """

    ids: Int64[ndarray, " rows"]
    keys: Sequence[str]
    captions: Sequence[str | None]
    shards: Sequence[str]
    embeddings: Mapping[str, Float[ndarray, "rows dim"]]
    fields: Sequence[Mapping[str, Any]] | None = None


class TableWriter:
    """Write the parts of a table in any order; several writers may share a folder.

    How its rows come in batches does not matter: every byte of a part depends on the rows alone.

    Args:
        out: The table's folder, new, empty, or a table begun with the same options.
        modalities: What every batch will bring.
        dim: Length of an embedding.
        fingerprints: Which model and data the rows are from.
        dtype: How vectors are stored.
        rows_per_part: Part `p` holds the samples with ids from `p * rows_per_part` on, so many at
            most; they are held in memory until they are written.
        options: What else the rows depend on, as JSON values.
        origin: Free JSON values, kept in the table and copied to indexes built from it.

    Attributes:
        card: What the table is.
        done: The cards of whole parts by number, of this writer and of those before it.
        notes: What a user should know of the table's columns, once it is finished.

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
        rows_per_part: int = ROWS_PER_PART,
        options: Mapping[str, Any] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(out)
        self.notes: list[str] = []
        wanted = TableCard(
            modalities=tuple(name for name in MODALITIES if name in modalities),
            dim=dim,
            dtype=dtype,
            rows_per_part=rows_per_part,
            fingerprints=dict(fingerprints),
            options=dict(options or {}),
            origin=dict(origin or {}),
        )
        if len(wanted.modalities) != len(modalities) or not modalities:
            raise ValueError(f"modalities: {list(modalities)}, but know {list(MODALITIES)}")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype: {dtype!r}, but a table holds float16 or float32")
        if rows_per_part < 1 or dim < 1:
            raise ValueError(f"rows_per_part {rows_per_part} and dim {dim} must be at least 1")
        self.card = self._begin(wanted)
        self.done: dict[int, PartCard] = read_parts(self.folder)

    def verify(self, numbers: Iterable[int]) -> None:
        """Compare the files of whole parts with their cards, by SHA-256.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file was changed.
        """
        for number in numbers:
            try:
                verify_parts(self.folder, [self.done[number].part], check="sha256")
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(
                    f"{error}; without {self.folder / part_path(number)} this part alone is "
                    "embedded anew"
                ) from error

    def write(
        self,
        number: int,
        batches: Sequence[EmbeddedRows],
        facts: Callable[[], Mapping[str, Any]] = dict,
    ) -> PartCard:
        """Write a part, whole or not at all.

        Args:
            number: Which part.
            batches: All of its rows; there may be none.
            facts: Gives free JSON values for its card, when all else is written.

        Raises:
            ValueError: Ids do not ascend or are not of this part, columns differ in length, a
                modality is missing or too much, or a row has no direction (NaN, infinity, zeros).
        """
        if not 0 <= number < _MOST_PARTS:
            raise ValueError(
                f"part {number}: a table has {_MOST_PARTS:,} parts at most; embed into a new "
                "folder with more rows_per_part"
            )
        size = self.card.rows_per_part
        last = number * size - 1
        for batch in batches:
            last = self._check(batch, last, (number + 1) * size)
        batches = [batch for batch in batches if len(batch.ids)]
        files = self._write_files(number, _merge(batches)) if batches else {}
        rows = sum(len(batch.ids) for batch in batches)
        card = PartCard(number, rows, last if rows else -1, files, dict(facts()))
        # The part exists from here on: files without a card are overwritten by a resumed run.
        card.save(self.folder)
        self.done[number] = card
        return card

    def finish(self) -> EmbeddingTable:
        """Mark the table, all of whose parts are written, as complete, and open it.

        Raises:
            ValueError: There is no row, or two fields of a sample would have one name.
        """
        known = {**read_parts(self.folder), **self.done}
        self.done = {number: known[number] for number in sorted(known)}
        if not any(card.rows for card in self.done.values()):
            raise ValueError(f"{self.folder}: no samples to embed")
        self._agree_on_columns()
        parts = tuple(card.part for card in self.done.values() if card.rows)
        self.card = replace(self.card, complete=True, parts=parts)
        self.card.save(self.folder)
        return EmbeddingTable(self.folder, check="sizes")

    def _agree_on_columns(self) -> None:
        """Give columns one name and one type through all parts; few tables need any of it."""
        paths = {
            number: self.folder / card.part.path("metadata")
            for number, card in self.done.items()
            if card.rows
        }
        schemas = {number: parquet.read_schema(path) for number, path in paths.items()}
        agreement = agreed(list(schemas.values()))
        names = {name for schema in schemas.values() for name in names_of(schema)}
        self.notes = notes_on({agreement.names.get(name, name) for name in names}, agreement)
        changing = {*agreement.names, *agreement.text}
        for number, path in paths.items():
            if changing.isdisjoint(schemas[number].names):
                continue
            table = in_agreement(parquet.ParquetFile(path).read(), agreement)
            if table is None:
                continue
            card = self.done[number]
            # Without its card the part does not exist: whoever is killed here makes it anew.
            (self.folder / part_path(number)).unlink()
            sums = write_whole(path, lambda file, table=table: parquet.write_table(table, file))
            name = card.part.path("metadata")
            self.done[number] = replace(card, files={**card.files, name: sums})
            self.done[number].save(self.folder)

    def _begin(self, wanted: TableCard) -> TableCard:
        self.folder.mkdir(parents=True, exist_ok=True)
        if {path.name for path in self.folder.iterdir()} <= {"table.json.writing"}:
            wanted.save(self.folder)
            return wanted
        if not (self.folder / "table.json").exists():
            raise ValueError(f"{self.folder}: holds other files; embed into a new folder")
        found = TableCard.load(self.folder)
        for name in ("modalities", "dim", "dtype", "rows_per_part", "fingerprints", "options"):
            there, here = getattr(found, name), getattr(wanted, name)
            if there != here:
                if isinstance(there, dict):
                    key = next(k for k in {**there, **here} if there.get(k) != here.get(k))
                    name, there, here = f"{name}.{key}", there.get(key), here.get(key)
                if isinstance(there, tuple):
                    there, here = " and ".join(there), " and ".join(here)
                raise ValueError(
                    f"{self.folder}: begun with {name} {there}, now {here}; embed into a new folder"
                )
        return found

    def _check(self, batch: EmbeddedRows, last: int, stop: int) -> int:
        """See whether a batch may follow the id `last`; its own last id."""
        rows = len(batch.ids)
        columns = {"keys": batch.keys, "captions": batch.captions, "shards": batch.shards}
        if batch.fields is not None:
            columns["fields"] = batch.fields
        for name, column in {**columns, **batch.embeddings}.items():
            if len(column) != rows:
                raise ValueError(f"embedded rows: {rows} ids but {len(column)} of {name}")
        _check_order(batch, last)
        if rows and batch.ids[-1] >= stop:
            raise ValueError(f"embedded rows: sample id {batch.ids[-1]} is of a later part")
        if set(batch.embeddings) != set(self.card.modalities):
            given, known = sorted(batch.embeddings), sorted(self.card.modalities)
            raise ValueError(f"embedded rows: modalities {given}, but the table has {known}")
        for name, vectors in batch.embeddings.items():
            if vectors.shape[1] != self.card.dim:
                width = vectors.shape[1]
                raise ValueError(f"{name} embeddings: {width} wide, the table {self.card.dim}")
            if rows:
                check_rows(vectors, f"{name} (samples {batch.ids[0]} to {batch.ids[-1]})")
        return int(batch.ids[-1]) if rows else last

    def _write_files(self, number: int, rows: EmbeddedRows) -> dict[str, str]:
        """Write vectors and metadata; their SHA-256 by path."""
        table = _metadata(rows)
        files = {}
        for name in self.card.modalities:
            folder = MODALITIES[name]
            vectors = unit_rows(rows.embeddings[name]).astype(self.card.dtype)
            path = f"{folder}/{folder}_{number:05d}.npy"
            files[path] = write_whole(
                self.folder / path, lambda file, vectors=vectors: np.save(file, vectors)
            )
        path = f"metadata/metadata_{number:05d}.parquet"
        files[path] = write_whole(self.folder / path, lambda file: parquet.write_table(table, file))
        return files


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
            from that id on, in ascending order and batches of any size.
        modalities: As for :class:`TableWriter`, like the remaining arguments.
        dim: Length of an embedding.
        fingerprints: Which model and data the rows are from.
        **options: `dtype`, `rows_per_part`, `options`, `origin` of :class:`TableWriter`.

    Raises:
        ValueError: As :class:`TableWriter` and its methods.
    """
    writer = TableWriter(out, modalities=modalities, dim=dim, fingerprints=fingerprints, **options)
    writer.verify(writer.done)
    if not writer.card.complete:
        size = writer.card.rows_per_part
        first = max(writer.done, default=-1) + 1
        for number, part in _by_part(batches(first * size), first * size - 1, size):
            writer.write(number, part)
        writer.finish()
    return EmbeddingTable(out, check="sizes")  # the writer has compared every checksum


def _by_part(
    batches: Iterable[EmbeddedRows], last: int, size: int
) -> Iterator[tuple[int, list[EmbeddedRows]]]:
    """Batches cut where parts begin; each part that has rows, by its number."""
    number, waiting = -1, []
    for batch in batches:
        _check_order(batch, last)
        numbers = batch.ids // size
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(batch.ids)]
        for start, stop in pairwise(cuts):
            if start == stop:
                continue
            if waiting and numbers[start] != number:
                yield number, waiting
                waiting = []
            number = int(numbers[start])
            waiting.append(_slice(batch, start, stop))
            last = int(batch.ids[stop - 1])
    if waiting:
        yield number, waiting


def _check_order(batch: EmbeddedRows, last: int) -> None:
    steps = np.diff(batch.ids, prepend=last)
    if (steps < 1).any():
        row = int(np.argmax(steps < 1))
        raise ValueError(
            f"embedded rows: sample id {batch.ids[row]} (key {batch.keys[row]!r}) comes after "
            f"{batch.ids[row] - steps[row]}; ids must ascend, each once"
        )


def _metadata(rows: EmbeddedRows) -> pa.Table:
    known = [rows.ids, rows.keys, rows.captions, rows.shards]
    own = dict(zip(OWN, known, strict=True))
    arrays, mixed = columns_of(rows.fields or [{}] * len(rows.ids), own)
    fixed = {name: pa.array(own[name], type=_TYPES[name]) for name in OWN}
    return mixed_noted(pa.table({**fixed, **arrays}), mixed)


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
