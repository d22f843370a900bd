"""A table's vectors, so many at a time, each of them checked."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.metrics import check_rows
from eval.table import EmbeddingTable, unit_rows

BLOCK = 65_536
"""Rows decoded at a time, as long as they fit in `BLOCK_BYTES`."""
BLOCK_BYTES = 64 << 20
"""Bytes of a decoded block at most."""


def blocks(
    table: EmbeddingTable, modality: str, parts: range | None = None
) -> Iterator[Float32[ndarray, "_ dim"]]:
    """Yield unit-length rows of these parts of a table, in order; of all by default.

    Raises:
        ValueError: A row has no direction (NaN, infinity, zeros); names its file and its number
            there.
    """
    rows = max(1, min(BLOCK, BLOCK_BYTES // (4 * table.card.dim)))
    paths = table.vector_paths(modality)
    for number in range(len(paths)) if parts is None else parts:
        part = np.load(paths[number], mmap_mode="r", allow_pickle=False)
        for start in range(0, len(part), rows):
            raw = part[start : start + rows].astype(np.float32)
            try:
                check_rows(raw, str(paths[number]))
            except ValueError:  # once more over the whole file, for the rows' numbers in it
                check_rows(np.asarray(part, dtype=np.float32), str(paths[number]))
                raise
            yield unit_rows(raw)


def chosen_rows(
    table: EmbeddingTable, modality: str, rows: Int64[ndarray, " some"]
) -> Float32[ndarray, "some dim"]:
    """Unit-length rows by row number, in the order asked for.

    Raises:
        ValueError: As :func:`blocks`, of any row of the table.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        found = table.vectors(modality, rows)
    if not np.isfinite(found).all():
        for _ in blocks(table, modality):  # names the file and the row
            pass
    return found
