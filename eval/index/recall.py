"""What an index finds of what exact search finds, for each kind of query that will be asked."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.index.blocks import blocks, chosen_rows
from eval.index.card import DEPTHS, Reached, Speed
from eval.index.rows import IndexRows
from eval.intervals import bootstrap_mean
from eval.results import Figure
from eval.table import EmbeddingTable, unit_rows

_TIE = 1e-6
"""Scores this near are equal: float32 products differ by as much between two kinds of search."""
_SECONDS = 0.5
"""How long a batch for timing takes at most, about."""
_SCANNED, _SCANS = 32_768, 4
"""Rows of an exact scan that is timed, and how often; the first time warms up."""


@runtime_checkable
class Rows(Protocol):
    """What gives back rows by their number, such as an embedding table."""

    def vectors(self, modality: str, rows: Int64[ndarray, " rows"]) -> Float32[ndarray, "rows dim"]:
        """Unit-length rows in the order asked for."""
        ...


@dataclass(frozen=True)
class Queries:
    """Queries of one kind with what exact search answers.

    Attributes:
        kind: `text`, `image` or `fused`.
        vectors: Unit length.
        own: The row that a query may not count as its neighbour, itself; -1 where there is none.
        right: The row that is its one right answer, such as a caption's picture; -1 for none.
        scores: Of the exact best rows without its own, best first; at most 100.
        rows: Their numbers.
    """

    kind: str
    vectors: Float32[ndarray, "queries dim"]
    own: Int64[ndarray, " queries"]
    right: Int64[ndarray, " queries"]
    scores: Float32[ndarray, "queries depth"]
    rows: Int64[ndarray, "queries depth"]

    def some(self, chosen: slice) -> "Queries":
        """A part of them."""
        return Queries(
            self.kind,
            self.vectors[chosen],
            self.own[chosen],
            self.right[chosen],
            self.scores[chosen],
            self.rows[chosen],
        )


def draw_queries(
    table: EmbeddingTable, modality: str, *, count: int, generator: np.random.Generator
) -> dict[str, Queries]:
    """Draw queries of every kind that a table allows, and answer them exactly, in one pass over it.

    - `text`: captions; the right answer of each is the row that it came with.
    - `image`: pictures; where pictures are indexed, one is not its own neighbour.
    - `fused`: the unit-length mean of a picture and the caption of another, as in composed
      retrieval; the picture is not its own neighbour.

    Where pictures are indexed, the pictures asked for are rows of the index itself: they helped to
    train it, lie in the right list, and have edges to their neighbours in a graph. Pictures from
    elsewhere may be answered somewhat worse than `image` and `fused` say; texts are never rows.

    Args:
        table: The table that is indexed.
        modality: Which of its embeddings are.
        count: Queries of each kind, fewer where there are fewer rows.
        generator: Draws the rows.

    Raises:
        ValueError: A vector has no direction; names its file and row.
    """
    rows = np.sort(generator.choice(table.rows, size=min(table.rows, count), replace=False))
    none = np.full(len(rows), -1)
    has = {kind: chosen_rows(table, kind, rows) for kind in table.card.modalities}
    drawn: dict[str, tuple[ndarray, ndarray, ndarray]] = {}
    if "text" in has:
        itself = rows if modality == "text" else none
        drawn["text"] = has["text"], itself, none if modality == "text" else rows
    if "image" in has:
        itself = rows if modality == "image" else none
        drawn["image"] = has["image"], itself, none if modality == "image" else rows
    if "text" in has and "image" in has:
        other = generator.permutation(len(rows))
        drawn["fused"] = unit_rows(has["image"] + has["text"][other]), rows, none
    elif "fused" in has:
        drawn["fused"] = has["fused"], rows, none
    answers = answer_exactly(
        {kind: one[:2] for kind, one in drawn.items()}, blocks(table, modality)
    )
    return {
        kind: Queries(kind, vectors, own, right, *answers[kind])
        for kind, (vectors, own, right) in drawn.items()
    }


def answer_exactly(
    queries: Mapping[str, tuple[ndarray, ndarray]], blocks: Iterable[ndarray]
) -> dict[str, tuple[ndarray, ndarray]]:
    """Scores and rows of the exact best 100 of each query but its own row, by kind."""
    asked = np.concatenate([vectors for vectors, _ in queries.values()])
    scores, rows = exact_neighbours(asked, blocks, max(DEPTHS) + 1)
    answers, start = {}, 0
    for kind, (vectors, own) in queries.items():
        stop = start + len(vectors)
        keep = _first_others(rows[start:stop], own, rows.shape[1] - bool((own >= 0).any()))
        answers[kind] = (
            np.take_along_axis(scores[start:stop], keep, axis=1),
            np.take_along_axis(rows[start:stop], keep, axis=1),
        )
        start = stop
    return answers


def exact_neighbours(
    queries: Float32[ndarray, "queries dim"], blocks: Iterable[Float32[ndarray, "_ dim"]], k: int
) -> tuple[Float32[ndarray, "queries found"], Int64[ndarray, "queries found"]]:
    """Scores and rows of the `k` best of all blocks by exact search, one block in memory at a time.

    Where there are fewer than `k` vectors in all, all of them are found.
    """
    scores, rows = knn_ground_truth(queries, blocks, k, faiss.METRIC_INNER_PRODUCT)
    found = int((rows[:1] >= 0).sum()) if len(rows) else 0
    return scores[:, :found], rows[:, :found]


def _first_others(rows: ndarray, own: ndarray, depth: int) -> ndarray:
    """Places of the first rows of each list that are not the query's own."""
    is_own = rows == own[:, None]
    return np.argsort(is_own, axis=1, kind="stable")[:, :depth]


def found_by(index: faiss.Index, queries: Queries, depth: int) -> Int64[ndarray, "queries depth"]:
    """The first rows that an index answers with, without each query's own; -1 ends a short list.

    The index is asked for no more than these: asked for more, graphs and refinements look further.
    """
    has_own = bool((queries.own >= 0).any())
    _, rows = index.search(queries.vectors, depth + has_own)
    own = np.where(queries.own >= 0, queries.own, -2)
    return np.take_along_axis(rows, _first_others(rows, own, depth), axis=1)


def shares(
    found: Int64[ndarray, "queries depth"], queries: Queries, table: Rows, modality: str,
    k: int,
) -> ndarray:  # fmt: skip
    """Per query, the share of the first `k` rows found whose score reaches the exact k-th best.

    Rows with equal vectors may stand for each other.
    """
    listed = found[:, :k]
    hits = (listed[:, :, None] == queries.rows[:, None, :k]).any(axis=2)
    unsure = ~hits & (listed >= 0)
    if unsure.any():  # a tie with the k-th best counts
        places = np.argwhere(unsure)
        vectors = table.vectors(modality, listed[unsure])
        score = np.einsum("nd,nd->n", vectors, queries.vectors[places[:, 0]])
        hits[unsure] = score >= queries.scores[places[:, 0], k - 1] - _TIE
    return np.minimum(hits.sum(axis=1) / k, 1.0)


def reached(
    index: faiss.Index, table: Rows, modality: str, queries: Mapping[str, Queries]
) -> tuple[Reached, ...]:
    """Measure an index, as it is set, for each kind of query."""
    return tuple(_reached(index, table, modality, kind, asked) for kind, asked in queries.items())


def _reached(index: faiss.Index, table: Rows, modality: str, kind: str, asked: Queries) -> Reached:
    most = asked.rows.shape[1]
    if most == 0:  # a single row, asked for its neighbours: nothing can be missed
        return Reached(kind, (_figure(10, np.ones(len(asked.vectors))),))
    against, by_exact, by_index = [], [], []
    for k in [k for k in DEPTHS if k <= most] or [most]:
        found = found_by(index, asked, k)
        against.append(_figure(k, shares(found, asked, table, modality, k)))
        right = asked.right[:, None]
        by_exact.append(_figure(k, (asked.rows[:, :k] == right).any(axis=1)))
        by_index.append(_figure(k, (found == right).any(axis=1)))
    own_pair = {}
    if (asked.right >= 0).all():
        own_pair = {"exact": tuple(by_exact), "index": tuple(by_index)}
    return Reached(kind, tuple(against), own_pair)


def _figure(k: int, values: ndarray) -> Figure:
    return Figure.of(f"recall@{k}", bootstrap_mean(values.astype(np.float64)))


def speed(index: faiss.Index, vectors: Float32[ndarray, "queries dim"], k: int = 10) -> list[Speed]:
    """Queries a second of batches, at one thread and at all; the best of three."""
    every = faiss.omp_get_max_threads()
    measured = []
    try:
        for threads in sorted({1, every}):
            faiss.omp_set_num_threads(threads)
            asked = vectors[: max(4, int(_SECONDS / _search_seconds(index, vectors[:4], k) * 4))]
            taken = min(_search_seconds(index, asked, k) for _ in range(3))
            measured.append(Speed(threads, len(asked) / taken))
    finally:
        faiss.omp_set_num_threads(every)
    return measured


def measured_costs(rows: IndexRows, speeds: Iterable[Speed]) -> dict[str, float]:
    """What the planner of filtered search weighs, in seconds.

    `query_s` a query by the index at one thread; `exact_row_s` a row of an exact scan in row order
    over the index's vectors on disk, as search does it, after they were read once.
    """
    one = next(some for some in speeds if some.threads == 1)
    scans = [_scan_seconds(rows) for _ in range(_SCANS)]
    return {"query_s": 1 / one.queries_per_second, "exact_row_s": min(scans[1:])}


def _scan_seconds(rows: IndexRows) -> float:
    """Seconds a row, of the first so many."""
    query = np.ones((1, rows.dim), np.float32)
    started, count = time.perf_counter(), 0
    for block in rows.blocks():
        np.matmul(query, block.T)
        count += len(block)
        if count >= _SCANNED:
            break
    return (time.perf_counter() - started) / count


def _search_seconds(index: faiss.Index, vectors: ndarray, k: int) -> float:
    started = time.perf_counter()
    index.search(vectors, k)
    return time.perf_counter() - started
