"""Inverted lists in one file on disk: merged from pieces, and written anew for a changed index."""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from align.folders import flush
from eval.index.card import IndexCard
from eval.index.folder import faiss_call, read_faiss, write_faiss

SHARE_ROWS = 500_000
"""Rows of a share at most, unless a single part of a table has more."""


def relisted(
    card: IndexCard,
    folder: Path,
    vectors: Iterable[Float32[ndarray, "_ dim"]],
    *,
    behind: faiss.Index | None,
    share_rows: int = SHARE_ROWS,
) -> tuple[IndexCard, faiss.Index]:
    """New lists on disk for a changed index, and the card that names them.

    Pieces of them lie in the index folder meanwhile; those of a killed change go with the next.

    Args:
        card: As it will be, but for its FAISS files, which are those before.
        folder: The index folder.
        vectors: Of the rows, in order.
        behind: The index whose rows these follow; None where they are all that there is.
        share_rows: So many are in memory at once.

    Raises:
        OSError: The disk has no room for them.
    """
    before = card.index_file, card.lists_file
    names, place = [], behind.ntotal if behind else 0
    for share in _gathered(vectors, share_rows):
        index = emptied(read_faiss(folder / before[0], lists=before[1]))
        for block in share:
            place = add_numbered(index, block, place)
        names.append(folder / f"share-{len(names)}.faiss")
        write_faiss(index, names[-1])
    pieces = [*([] if behind is None else [behind])]
    pieces += [read_faiss(name, memory_map=True) for name in names]
    index_file, lists_file = f"index-{card.generation}.faiss", f"lists-{card.generation}.ivfdata"
    empty = emptied(read_faiss(folder / before[0], lists=before[1]))
    digest = write_lists(empty, pieces, folder, index_file, lists_file)
    del pieces
    for name in names:
        name.unlink()
    card = replace(
        card,
        index_file=index_file,
        lists_file=lists_file,
        bytes_per_vector=size_of(folder, index_file, lists_file) / card.rows,
        files={**card.files, index_file: digest},
    )
    return card, read_faiss(folder / index_file, lists=lists_file)


def emptied(index: faiss.Index) -> faiss.Index:
    """An index with lists on disk, without its rows: trained, its lists new and in memory."""
    ivf = faiss.extract_index_ivf(index)
    lists = faiss.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(lists, True)
    lists.this.disown()  # pyright: ignore[reportAttributeAccessIssue]
    ivf.ntotal = index.ntotal = 0
    return index


def write_lists(
    empty: faiss.Index,
    pieces: list[faiss.Index],
    folder: Path,
    index_file: str,
    lists_file: str,
) -> str:
    """Write the lists of all pieces, one behind the other, and the index that refers to them.

    The index names its lists without a folder, so that both can be moved together. Each piece has
    the row numbers of the whole: FAISS 1.15 can count them on from piece to piece, but does it
    wrongly where pieces differ in size.

    Returns:
        SHA-256 of the index file.

    Raises:
        OSError: The disk has no room: FAISS maps the file, and would be killed by the system.
    """
    ivf = faiss.extract_index_ivf(empty)
    rows = sum(piece.ntotal for piece in pieces)
    need = rows * (ivf.code_size + 8)
    free = shutil.disk_usage(folder).free
    if need > 0.98 * free:
        raise OSError(28, f"No space left on device ({need:,} bytes, {free:,} free)", str(folder))
    path = folder / lists_file
    vector = faiss.InvertedListsPtrVector()  # pyright: ignore[reportAttributeAccessIssue]
    for piece in pieces:
        vector.push_back(faiss.extract_index_ivf(piece).invlists)
    lists = faiss.OnDiskInvertedLists(ivf.nlist, ivf.code_size, str(path))
    with _silent():
        faiss_call(f"{path}", lambda: lists.merge_from_multiple(vector.data(), vector.size()))
    ivf.replace_invlists(lists, True)
    lists.this.disown()  # pyright: ignore[reportAttributeAccessIssue]
    ivf.ntotal = empty.ntotal = rows
    lists.filename = lists_file
    digest = write_faiss(empty, folder / index_file)
    lists.filename = str(path)
    flush(path)
    return digest


@contextmanager
def _silent() -> Iterator[None]:
    """Standard output goes nowhere: FAISS says on it what size a file of lists takes."""
    sys.stdout.flush()
    libc = ctypes.CDLL(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _gathered(blocks: Iterable[ndarray], rows: int) -> Iterator[Iterable[ndarray]]:
    """Runs of blocks, each of about as many rows; blocks are not held."""
    source = iter(blocks)
    for first in source:

        def run(first: ndarray = first) -> Iterator[ndarray]:
            count = len(first)
            yield first
            while count < rows:
                block = next(source, None)
                if block is None:
                    return
                count += len(block)
                yield block

        yield run()


def add_numbered(index: faiss.Index, block: Float32[ndarray, "rows dim"], first: int) -> int:
    """Add vectors whose row numbers begin at `first`; return the number behind the last."""
    numbers = np.arange(first, first + len(block))
    faiss_call("index", lambda: index.add_with_ids(block, numbers))
    return first + len(block)


def size_of(folder: Path, *names: str) -> int:
    """Bytes of these files together."""
    return sum((folder / name).stat().st_size for name in names)
