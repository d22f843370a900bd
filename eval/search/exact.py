"""Exact search over some rows of an index, by the vectors that it keeps."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.index.rows import IndexRows
from eval.search.filters import Allowed

_BLOCK = 4096
"""Rows at a time."""
_PRODUCTS = 2**24
"""Scores in memory at a time."""
_DENSE = 0.3
"""From this share of the rows on, all are read in order, which is quicker than picking them."""


def exact_among(
    rows: IndexRows,
    queries: Float32[ndarray, "queries dim"],
    k: int,
    allowed: Allowed | None = None,
) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
    """Scores and numbers of the `k` best of the allowed rows, best first.

    Of equal scores the lesser row comes first, so that a longer list begins with the shorter one.
    Lists of fewer rows end with minus infinity and -1. One block of vectors is in memory at a time.

    Args:
        rows: The rows of the index.
        queries: Unit length.
        k: How many.
        allowed: Which rows; None = all.
    """
    scores = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    if not len(queries):
        return scores, found
    step = max(1024, _PRODUCTS // len(queries))
    for numbers, vectors in _blocks(rows, allowed):
        for start in range(0, len(numbers), step):
            products = queries @ vectors[start : start + step].T
            here = numbers[start : start + step]
            for query, product in enumerate(products):
                _take_better(scores[query], found[query], product, here)
    return scores, found


def best_first(
    scores: Float32[ndarray, "queries some"], rows: Int64[ndarray, "queries some"], k: int
) -> tuple[Float32[ndarray, "queries k"], Int64[ndarray, "queries k"]]:
    """The `k` best of each list, the lesser row first among equal scores; filled up with -1."""
    short = k - scores.shape[1]
    if short > 0:
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
        rows = np.pad(rows, ((0, 0), (0, short)), constant_values=-1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _blocks(
    rows: IndexRows, allowed: Allowed | None
) -> Iterator[tuple[Int64[ndarray, " some"], Float32[ndarray, "some dim"]]]:
    if allowed is not None and allowed.count < _DENSE * len(rows):
        for start in range(0, allowed.count, _BLOCK):
            numbers = allowed.rows[start : start + _BLOCK]
            yield numbers, rows.vectors(numbers)
        return
    mask = None if allowed is None else allowed.mask
    first = 0
    for vectors in rows.blocks():
        numbers = np.arange(first, first + len(vectors))
        first += len(vectors)
        if mask is not None:
            here = mask[numbers]
            numbers, vectors = numbers[here], vectors[here]
        yield numbers, vectors


def _take_better(
    scores: Float32[ndarray, " k"],
    rows: Int64[ndarray, " k"],
    new: Float32[ndarray, " some"],
    numbers: Int64[ndarray, " some"],
) -> None:
    """Put the better ones of new rows, whose numbers are higher, into a list."""
    k = len(scores)
    good = np.flatnonzero(new > scores[-1])
    if len(good) > 4 * k:
        least = np.partition(new[good], len(good) - k)[len(good) - k]
        good = good[new[good] >= least]
    if len(good):
        all_scores = np.concatenate([scores, new[good]])
        all_rows = np.concatenate([rows, numbers[good]])
        order = np.argsort(-all_scores, kind="stable")[:k]
        scores[:], rows[:] = all_scores[order], all_rows[order]
