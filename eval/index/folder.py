"""An index folder: its files written beside the card, opened only when they agree with it."""

import errno
import hashlib
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
from jaxtyping import Int64
from numpy import ndarray

from align.folders import flush
from eval.cards import file_sha256
from eval.index.card import IndexCard, Source
from eval.index.rows import ARROW_ROWS, IndexRows
from eval.table import EmbeddingTable


@dataclass(frozen=True)
class OpenIndex:
    """An index that was checked on opening.

    Attributes:
        folder: Where it lies.
        card: What the folder says of it.
        index: The FAISS index, its knobs set.
        rows: What its vectors stand for.
        removed: Numbers of the rows that no search may find, ascending.
    """

    folder: Path
    card: IndexCard
    index: faiss.Index
    rows: IndexRows
    removed: Int64[ndarray, " removed"]


def open_index(
    folder: Path | str,
    *,
    check: Literal["sha256", "sizes"] = "sha256",
    memory_map: bool = False,
) -> OpenIndex:
    """Open an index and compare its files with its card.

    Args:
        folder: The index folder.
        check: `sha256` reads every file once and compares; `sizes` only compares counts.
        memory_map: Leave the FAISS index on disk, for one that is larger than the memory; FAISS
            maps inverted lists and flat codes, and reads other kinds whole.

    Raises:
        FileNotFoundError: There is no index, or one of its files is missing.
        ValueError: A file was changed or does not fit the card; the line names it.
    """
    folder = Path(folder)
    card = IndexCard.load(folder)
    while True:
        try:
            return _opened(folder, card, check=check, memory_map=memory_map)
        except (FileNotFoundError, ValueError):
            before, card = card, IndexCard.load(folder)
            if card == before:
                raise  # else a change was completed meanwhile, and removed the files of before


def _opened(
    folder: Path, card: IndexCard, *, check: Literal["sha256", "sizes"], memory_map: bool
) -> OpenIndex:
    for name, expected in card.files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: this file of the index is missing; build it again")
        if check == "sha256" and file_sha256(path) != expected:
            raise ValueError(f"{path}: changed since it was written; build the index again")
    path = folder / card.index_file
    index = read_faiss(path, memory_map=memory_map, lists=card.lists_file)
    if (index.ntotal, index.d) != (card.rows, card.dim):
        raise ValueError(
            f"{path}: holds {index.ntotal} vectors of {index.d}, index.json says {card.rows} of "
            f"{card.dim}; build the index again"
        )
    set_knobs(index, card.knobs)
    try:
        rows = IndexRows(folder, card.sources, index)
        removed = np.empty(0, np.int64)
        if card.removed_file:
            removed = np.load(folder / card.removed_file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{error}; build the index again") from error
    if len(rows) != card.rows:
        raise ValueError(
            f"{folder}: {len(rows)} ids for {card.rows} vectors; build the index again"
        )
    if len(removed) != card.removed:
        raise ValueError(
            f"{folder / str(card.removed_file)}: lists {len(removed)} removed rows, index.json "
            f"says {card.removed}; build the index again"
        )
    return OpenIndex(folder, card, index, rows, removed)


def read_faiss(path: Path, *, memory_map: bool = False, lists: str | None = None) -> faiss.Index:
    """Read a FAISS index.

    Args:
        path: Its file.
        memory_map: Leave lists and flat codes in the file, which is read when they are.
        lists: Name of the file with its inverted lists, in the same folder; they stay in it.
    """
    if lists is None:
        flags = faiss.IO_FLAG_MMAP if memory_map else 0
        return faiss_call(f"{path}", lambda: faiss.read_index(str(path), flags))
    # The index names its lists without a folder. FAISS can look for them in the folder of the
    # index, and says so on standard output each time: here it is handed the whole path.
    place = str(path.resolve().with_name(lists)).encode()
    said, whole = (struct.pack("<Q", len(name)) + name for name in (lists.encode(), place))
    content = path.read_bytes()
    if content.count(said) != 1:  # made elsewhere, with a folder
        same = faiss.IO_FLAG_ONDISK_SAME_DIR | faiss.IO_FLAG_READ_ONLY
        return faiss_call(f"{path}", lambda: faiss.read_index(str(path), same))
    content = np.frombuffer(content.replace(said, whole), np.uint8)
    return faiss_call(f"{path}", lambda: faiss.deserialize_index(content, faiss.IO_FLAG_READ_ONLY))


def write_faiss(index: faiss.Index, path: Path) -> str:
    """Write a FAISS index to a new file and to the disk; return its SHA-256.

    FAISS's own writer does not tell when the last bytes find no room.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        writer = faiss.PyCallbackIOWriter(write)  # pyright: ignore[reportAttributeAccessIssue]
        faiss.write_index(index, writer)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def set_knobs(index: faiss.Index, knobs: str) -> None:
    """Set FAISS search parameters, such as `nprobe=16,k_factor_rf=4`.

    Raises:
        ValueError: FAISS does not know one of them.
    """
    if knobs:
        space = faiss.ParameterSpace()
        faiss_call(f"index knobs {knobs!r}", lambda: space.set_index_parameters(index, knobs))


def take_rows(table: EmbeddingTable, modality: str, folder: Path, *, number: int, first_id: int,
              first_part: int) -> Source:  # fmt: skip
    """Put a table's vectors and metadata into an index folder, as its source of that number.

    The files of a table are never written to again, so they are linked where both lie on one file
    system, and copied where not.

    Args:
        table: Where the rows come from.
        modality: Which embeddings.
        folder: The index folder, finished or not.
        number: How many sources there are before.
        first_id: Id of the table's sample 0.
        first_part: How many `.npy` files there are before.

    Raises:
        ValueError: Ids do not ascend, or a column has another type in each part.
    """
    vectors, metadata = [], []
    parts = zip(table.vector_paths(modality), table.metadata_paths, strict=True)
    for part, (vector_path, metadata_path) in enumerate(parts, first_part):
        kind = vector_path.parent.name
        vectors.append(f"{kind}/{kind}_{part}.npy")
        metadata.append(f"metadata/metadata_{part}.parquet")
        link(vector_path, folder / vectors[-1])
        link(metadata_path, folder / metadata[-1])
    arrow, id_file = f"rows-{number}.arrow", f"ids-{number}.npy"
    schema = table.metadata_schema()
    ids = write_arrow(folder / arrow, schema, table.metadata_parts(schema)) + first_id
    if (np.diff(ids) < 1).any():
        row = int(np.argmax(np.diff(ids) < 1)) + 1
        raise ValueError(
            f"{table.folder}: the id of row {row}, {ids[row] - first_id}, does not ascend from "
            f"{ids[row - 1] - first_id}; every row of an index has an id of its own"
        )
    write_array(folder / id_file, ids)
    return Source(
        data=table.card.fingerprints.get("data", ""),
        table=table.fingerprint,
        first_id=first_id,
        ids=int(ids[-1]) - first_id + 1,
        rows=table.rows,
        origin=table.card.origin,
        vectors=tuple(vectors),
        metadata=tuple(metadata),
        arrow=arrow,
        id_file=id_file,
    )


def link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # never write into a file that may be linked elsewhere
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            shutil.copyfile(source, target)
        except OSError as full:
            if full.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(full.errno, os.strerror(full.errno), str(target)) from full


_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def with_checksums(card: IndexCard, folder: Path) -> IndexCard:
    """The card with the SHA-256 of every file that it names; known ones are not read again."""
    known = card.files
    files = {name: known.get(name) or file_sha256(folder / name) for name in card.names}
    return replace(card, files=files)


def commit(card: IndexCard, folder: Path) -> IndexCard:
    """Make a change of an index final: replace the card, then remove the files it names no more.

    New files have new names and reach the disk first, so that a kill at any instant leaves the
    index before the change or after it. A process that has the index open keeps what it has mapped.

    Args:
        card: What the folder is to say; its generation follows that of the card there.
        folder: The index folder.

    Raises:
        ValueError: Another process changed the index meanwhile; this change is not made.
    """
    before = IndexCard.load(folder)
    card = with_checksums(card, folder)
    new = set(card.files) - set(before.files)
    for path in {folder / name for name in new} | {(folder / name).parent for name in new}:
        flush(path)
    if IndexCard.load(folder) != before or before.generation + 1 != card.generation:
        raise ValueError(f"{folder}: another process changed this index; run the change again")
    card.save(folder)
    flush(folder)
    remove_leftovers(folder, card)
    return card


_OURS = re.compile(
    r"(index|lists|removed|queries|rows|ids|share)(-\d+)?\.(faiss|ivfdata|npy|npz|arrow)"
    r"|(image|img|text|fused)_emb_\d+\.npy|metadata_\d+\.parquet|index\.json\.writing"
)
"""Names of files that we write in an index folder."""


def remove_leftovers(folder: Path, card: IndexCard) -> None:
    """Remove files of changes that were killed, or that this card ended; others stay."""
    named = set(card.files)
    for path in [*folder.glob("*"), *folder.glob("*_emb/*"), *folder.glob("metadata/*")]:
        is_named = path.relative_to(folder).as_posix() in named
        if path.is_file() and not is_named and _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def faiss_call(what: str, call: Callable[[], Any]) -> Any:
    """Run a FAISS call; its errors, many lines with C++ names, become one."""
    try:
        return call()
    except RuntimeError as error:
        line = " ".join(str(error).split())
        said = line.rsplit(" failed: ", 1)[-1] if " failed: " in line else line.rsplit(": ", 1)[-1]
        raise ValueError(f"{what}: FAISS says: {said}") from error


def write_array(path: Path, array: ndarray) -> None:
    """Write a `.npy` file."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> Int64[ndarray, " _"]:
    """Write metadata in record batches of `ARROW_ROWS`; return its sample ids."""
    ids = [np.empty(0, np.int64)]
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in _batches(tables):
            ids.append(batch["id"].to_numpy())
            writer.write_table(batch, max_chunksize=ARROW_ROWS)
    return np.concatenate(ids)


def _batches(parts: Iterable[pa.Table]) -> Iterable[pa.Table]:
    """Tables of `ARROW_ROWS` rows, the last one with what is left."""
    waiting: list[pa.Table] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count >= ARROW_ROWS:
            whole = pa.concat_tables(waiting)
            full = count - count % ARROW_ROWS
            for start in range(0, full, ARROW_ROWS):
                yield whole.slice(start, ARROW_ROWS).combine_chunks()
            waiting, count = [whole.slice(full)], count - full
    if count:
        yield pa.concat_tables(waiting).combine_chunks()
