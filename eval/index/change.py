"""Changing an index folder: rows added, removed, and left out for good.

Every change writes new files beside those there, then replaces the card, then removes what the card
names no more: a kill at any instant leaves the index before the change or after it, and the next
change clears away what a killed one left. A process that has the index open goes on with what it
opened. While a change is made the folder is locked, and another one is refused at once; where a
file system has no locks, the later one to finish is refused, or finds its files gone.
"""

import fcntl
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int64
from numpy import ndarray
from pyarrow import parquet

from eval.index.asked import joined, keep_queries, kept_queries, measured_again, renumbered, shifted
from eval.index.blocks import blocks
from eval.index.card import IndexCard, Source
from eval.index.folder import (
    OpenIndex,
    commit,
    faiss_call,
    open_index,
    remove_leftovers,
    set_knobs,
    take_rows,
    write_array,
    write_arrow,
    write_faiss,
)
from eval.index.lists import relisted
from eval.index.recall import draw_queries
from eval.index.rows import IndexRows, mapped
from eval.index.train import Progress
from eval.table import EmbeddingTable, unified_schema


def append(
    folder: Path | str, table: EmbeddingTable, *, seed: int = 0, progress: Progress | None = None
) -> IndexCard:
    """Add a table's rows behind those of an index, under ids of their own, and measure it again.

    Sample `s` of the table gets the id `first_id + s`, where `first_id` follows the ids set aside
    for the tables before. What was trained stays as it is.

    A table is known by its data as a whole. One of the same samples and some more (a data set that
    has grown by a shard) is another table, and adds all its rows: embed the new shards alone. So
    does a table whose rows were all removed and compacted away.

    Args:
        folder: The index folder.
        table: Rows of the same model (and fusion head) as those there.
        seed: Draws the queries that measure the new rows.
        progress: Told of long work.

    Raises:
        ValueError: The table is of another model, dimension or modality, its rows are in the index
            already, a column has another type than there, the index is damaged, or another
            process changes it.
    """
    folder = Path(folder)
    with _locked(folder):
        return _appended(folder, table, seed, progress)


def _appended(
    folder: Path, table: EmbeddingTable, seed: int, progress: Progress | None
) -> IndexCard:
    opened = _opened(folder)
    card = opened.card
    _check_fit(opened, table)
    generation, number = card.generation + 1, _next_number(card)
    last = card.sources[-1]
    source = take_rows(
        table,
        card.modality,
        folder,
        number=number,
        first_id=last.first_id + last.ids,
        first_part=number,
    )
    card = replace(
        card,
        rows=card.rows + table.rows,
        sources=(*card.sources, source),
        generation=generation,
    )
    if card.lists_file is None:
        index = opened.index
        for block in blocks(table, card.modality):
            faiss_call(f"{folder}", lambda block=block: index.add(block))
            _tell(progress, "add", index.ntotal - opened.card.rows, table.rows)
        card = _with_index(card, folder, index)
    else:
        more = blocks(table, card.modality)
        card, index = relisted(card, folder, more, behind=opened.index)
        set_knobs(index, card.knobs)
    new = draw_queries(table, card.modality, count=_QUERIES, generator=np.random.default_rng(seed))
    before = kept_queries(folder, card)
    if before:
        share = table.rows / card.rows
        asked = joined(before, shifted(new, opened.card.rows), share=share)
        card = replace(card, queries_file=keep_queries(asked, folder, generation=generation))
        _tell(progress, "measure", 0, 1)
        card = measured_again(card, index, IndexRows(folder, card.sources, index), asked)
        _tell(progress, "measure", 1, 1)
    return commit(card, folder)


_QUERIES = 1000


def remove(folder: Path | str, ids: Collection[int] | Int64[ndarray, " ids"]) -> IndexCard:
    """Have no search find these rows any more; :func:`compact` takes them out of the files.

    Ids that were removed before stay so; unknown ones (compacted away, say) are passed over. The
    figures of the card are those before the change.

    Raises:
        ValueError: The index holds no row with any of the ids, would have no row left, or another
            process changes it.
    """
    folder = Path(folder)
    with _locked(folder):
        return _removed(folder, ids)


def _removed(folder: Path, ids: Collection[int] | Int64[ndarray, " ids"]) -> IndexCard:
    opened = _opened(folder, check="sizes")
    card = opened.card
    wanted = np.unique(np.array(list(ids), dtype=np.int64))
    rows = opened.rows.places(wanted)
    if (rows < 0).all():
        unknown = wanted[rows < 0]
        more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise ValueError(f"{folder}: holds no row with the id {unknown[0]}{more}; nothing removed")
    removed = np.union1d(opened.removed, rows[rows >= 0])
    if len(removed) == card.rows:
        raise ValueError(f"{folder}: no row would be left; remove the folder instead")
    if len(removed) == card.removed:
        return card
    name = f"removed-{card.generation + 1}.npy"
    write_array(folder / name, removed)
    card = replace(card, removed=len(removed), removed_file=name, generation=card.generation + 1)
    return commit(card, folder)


def compact(folder: Path | str, *, progress: Progress | None = None) -> IndexCard:
    """Take removed rows out of all files; the rows that stay keep their ids, and are measured.

    The FAISS index is what its trained parts make of the vectors that stay, in their order: row
    numbers close up, and nothing is trained again. Files without removed rows are kept.

    Raises:
        ValueError: The index is damaged, or another process changes it.
    """
    folder = Path(folder)
    with _locked(folder):
        return _compacted(folder, progress)


def _compacted(folder: Path, progress: Progress | None) -> IndexCard:
    opened = _opened(folder)
    card = opened.card
    if not card.removed:
        return card
    stays = np.ones(card.rows, bool)
    stays[opened.removed] = False
    number = _next_number(card)
    sources, first = [], 0
    for source in card.sources:
        sources.append(_thinned(source, folder, stays[first : first + source.rows], number))
        number += 1 + len(source.vectors) + len(source.metadata)
        first += source.rows
    card = replace(
        card,
        rows=int(stays.sum()),
        removed=0,
        removed_file=None,
        sources=tuple(sources),
        generation=card.generation + 1,
    )
    live = _live_blocks(opened.rows, stays, card.rows, progress)
    if card.lists_file is None:
        index = opened.index if _has_vectors(opened.card) else faiss.clone_index(opened.index)
        index.reset()
        for block in live:
            faiss_call(f"{folder}", lambda block=block: index.add(block))
        card = _with_index(card, folder, index)
    else:
        card, index = relisted(card, folder, live, behind=None)
        set_knobs(index, card.knobs)
    asked = renumbered(kept_queries(folder, card), np.where(stays, np.cumsum(stays) - 1, -1))
    name = keep_queries(asked, folder, generation=card.generation) if asked else None
    card = replace(card, queries_file=name)
    _tell(progress, "measure", 0, 1)
    card = measured_again(card, index, IndexRows(folder, card.sources, index), asked)
    _tell(progress, "measure", 1, 1)
    return commit(card, folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other changes; the system lets go of it when a process ends."""
    if not folder.is_dir():  # opening it says what is wrong
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder}: another process changes this index; wait until it has ended"
            ) from error
        except OSError:
            pass  # no locks there
        yield
    finally:
        os.close(place)


def _opened(folder: Path, *, check: str = "sha256") -> OpenIndex:
    opened = open_index(folder, check="sizes" if check == "sizes" else "sha256")
    remove_leftovers(folder, opened.card)
    return opened


def _check_fit(opened: OpenIndex, table: EmbeddingTable) -> None:
    card, folder = opened.card, opened.folder
    table.vector_paths(card.modality)  # refuses a modality that the table lacks
    given = {name: one for name, one in table.card.fingerprints.items() if name != "data"}
    if given != card.fingerprints:
        names = " and ".join(
            name
            for name in sorted({*given, *card.fingerprints})
            if given.get(name) != card.fingerprints.get(name)
        )
        raise ValueError(
            f"{table.folder}: embedded by another {names} than the rows of {folder}; embed the "
            "data with that one, or build an index of its own"
        )
    if table.card.dim != card.dim:
        raise ValueError(f"{table.folder}: rows of {table.card.dim}, those of {folder} {card.dim}")
    data = table.card.fingerprints.get("data")
    for source in card.sources:
        same = source.table == table.fingerprint or (data and source.data == data)
        if source.rows and same:
            raise ValueError(f"{table.folder}: {folder} holds the rows of this data already")
    unified_schema([opened.rows.schema, table.metadata_schema()])


def _with_index(card: IndexCard, folder: Path, index: faiss.Index) -> IndexCard:
    """The card with a FAISS index that is written into the folder."""
    name = f"index-{card.generation}.faiss"
    digest = faiss_call(f"{folder / name}", lambda: write_faiss(index, folder / name))
    return replace(
        card,
        index_file=name,
        bytes_per_vector=(folder / name).stat().st_size / card.rows,
        files={**card.files, name: digest},
    )


def _has_vectors(card: IndexCard) -> bool:
    """Whether no row's vector is in the FAISS index alone."""
    return all(source.vectors or not source.rows for source in card.sources)


def _live_blocks(
    rows: IndexRows, stays: Bool[ndarray, " rows"], count: int, progress: Progress | None
) -> Iterator[ndarray]:
    first, done = 0, 0
    for block in rows.blocks():
        kept = block[stays[first : first + len(block)]]
        first += len(block)
        done += len(kept)
        if len(kept):  # FAISS aborts the process when some kinds are handed no rows
            yield kept
        _tell(progress, "add", done, count)


def _thinned(source: Source, folder: Path, stays: Bool[ndarray, " rows"], number: int) -> Source:
    """A source without the rows that do not stay; files that lose nothing are kept."""
    if stays.all():
        return source
    vectors = _thinned_files(
        source.vectors, folder, stays, number, lambda path: len(mapped(path)), _thin_array
    )
    metadata = _thinned_files(
        source.metadata,
        folder,
        stays,
        number,
        lambda path: parquet.read_metadata(path).num_rows,
        _thin_parquet,
    )
    arrow, id_file = f"rows-{number}.arrow", f"ids-{number}.npy"
    with pa.memory_map(str(folder / source.arrow)) as file:
        opened = pa.ipc.open_file(file)
        write_arrow(folder / arrow, opened.schema, _thinned_batches(opened, stays))
    write_array(folder / id_file, mapped(folder / source.id_file)[stays])
    return replace(
        source,
        rows=int(stays.sum()),
        vectors=vectors,
        metadata=metadata,
        arrow=arrow,
        id_file=id_file,
    )


def _thinned_files(
    names: Iterable[str],
    folder: Path,
    stays: Bool[ndarray, " rows"],
    number: int,
    rows_in: Callable[[Path], int],
    thin: Callable[[Path, Path, ndarray], None],
) -> tuple[str, ...]:
    """Names of files that hold together the rows that stay; what is new is numbered from here."""
    found, first = [], 0
    for name in names:
        rows = rows_in(folder / name)
        here = stays[first : first + rows]
        first += rows
        if here.all():
            found.append(name)
        elif here.any():
            found.append(re.sub(r"\d+(?=\.\w+$)", str(number), name))
            thin(folder / name, folder / found[-1], here)
            number += 1
    return tuple(found)


def _thin_array(path: Path, target: Path, stays: ndarray) -> None:
    write_array(target, mapped(path)[stays])


def _thin_parquet(path: Path, target: Path, stays: ndarray) -> None:
    parquet.write_table(parquet.ParquetFile(path).read().filter(pa.array(stays)), target)


def _thinned_batches(file: pa.RecordBatchFileReader, stays: ndarray) -> Iterator[pa.Table]:
    first = 0
    for number in range(file.num_record_batches):
        batch = file.get_batch(number)
        here = stays[first : first + batch.num_rows]
        first += batch.num_rows
        yield pa.Table.from_batches([batch]).filter(pa.array(here))


def _next_number(card: IndexCard) -> int:
    """A number that no file of the index bears, nor any greater one."""
    numbers = [int(found) for name in card.names for found in re.findall(r"\d+(?=\.\w+$)", name)]
    return 1 + max(numbers, default=-1)


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress:
        progress(what, done, total)
