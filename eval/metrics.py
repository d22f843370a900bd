"""Retrieval and classification metrics: pure functions with a stated tie rule, exact in any order.

**Ties.** A wrong candidate whose score equals that of the best right one counts as ranked before
it, so that a collapsed model (all embeddings equal) scores 0, not 1.

**Exactness.** A matrix product in floating point depends, in its last bit, on the shape of the
tile it is computed in; ties, and with them ranks, would depend on the tile size and on the order
of the candidates. Here a score is a function of its two rows alone: rows are scaled to unit length
and rounded to a multiple of 2^-26 (about the precision of float32), so that their products and
sums are whole numbers of 2^-52, below 2^53 of them, which float64 adds without rounding in
whatever order. A float32 product only sorts out the candidates that are further from the decision
than its proven error. Ranks do not depend on tile size, threads, or the order of the rows.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int64
from numpy import ndarray

_STEPS = float(2**26)
"""Fixed-point steps per unit: unit rows then have whole-number products below 2^53."""

_PAIRS_AT_ONCE = 4096
"""Pairs whose exact scores are computed at a time."""


@dataclass(frozen=True)
class TopCandidates:
    """The best candidates of every query, best first; among equal scores the lower row is first.

    Attributes:
        rows: Candidate rows.
        scores: Their cosine similarities.
    """

    rows: Int64[ndarray, "queries k"]
    scores: Float64[ndarray, "queries k"]


@dataclass(frozen=True)
class ClassRecall:
    """Recall of each class that has items, ascending by label.

    Attributes:
        labels: The classes.
        recall: Mean of their items' hits.
        counts: How many items each has.
    """

    labels: Int64[ndarray, " classes"]
    recall: Float64[ndarray, " classes"]
    counts: Int64[ndarray, " classes"]


def first_hit_ranks(
    queries: Float[ndarray, "queries dim"],
    candidates: Float[ndarray, "candidates dim"],
    *,
    query_labels: Int64[ndarray, " queries"],
    candidate_labels: Int64[ndarray, " candidates"],
    excluded: Int64[ndarray, " queries"] | None = None,
    tile: int = 2048,
) -> Int64[ndarray, " queries"]:
    """How many wrong candidates come before the first right one, by cosine similarity (0 = first).

    `rank_i = #{c wrong : <q_i, c> >= max over right c' of <q_i, c'>}`, where a candidate is right
    if its label equals the query's. Several right candidates per query and several queries per
    candidate are the general case; with one of each this is the usual rank. The matrix of
    similarities never exists: memory is one `tile` x `tile` block.

    Args:
        queries: One row per query, of any length but zero.
        candidates: One row per candidate.
        query_labels: What each query asks for.
        candidate_labels: What each candidate is.
        excluded: Per query the row of a candidate that does not take part (the reference picture of
            a composed query), or -1.
        tile: Side of a block; changes speed and memory, never the result.

    Raises:
        ValueError: A row with NaN, infinity or length zero, or a query without a right candidate.
    """
    _require(tile >= 1, f"tile must be at least 1, not {tile}")
    left, right = _fixed_point(queries, "query"), _fixed_point(candidates, "candidate")
    if excluded is None:
        excluded = np.full(len(left), -1)
    inside = (excluded >= -1) & (excluded < len(right))
    _require(
        bool(inside.all()),
        f"query {np.argmin(inside)}: excluded row is not one of the {len(right)} candidates",
    )
    blocks = _right_blocks(query_labels, candidate_labels, tile)
    best, settled = _best_right(left, right, blocks, excluded)
    lost = np.flatnonzero(best == -np.inf)
    if len(lost):
        raise ValueError(
            f"{len(lost)} of {len(left)} queries have no right candidate, the first is query "
            f"{lost[0]} (label {query_labels[lost[0]]}); remove them or add their candidates"
        )
    # What reaches the best right score is wrong, except the right ones that do and the excluded.
    out = np.flatnonzero(excluded >= 0)
    settled[out] += _pair_scores(left, right, out, excluded[out]) >= best[out]
    return _count_reaching(left, right, best, tile) - settled


def top_candidates(
    queries: Float[ndarray, "queries dim"],
    candidates: Float[ndarray, "candidates dim"],
    k: int,
) -> TopCandidates:
    """The `min(k, candidates)` most similar candidates of each query, by exact search.

    Raises:
        ValueError: A row with NaN, infinity or length zero, or `k` below 1.
    """
    _require(k >= 1, f"k must be at least 1, not {k}")
    left, right = _fixed_point(queries, "query"), _fixed_point(candidates, "candidate")
    k = min(k, len(right))
    rows = np.empty((len(left), k), dtype=np.int64)
    scores = np.empty((len(left), k))
    for block in _blocks(len(left), max(1, 4_000_000 // max(1, len(right)))):
        exact = left[block] @ right.T
        rows[block] = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        scores[block] = np.take_along_axis(exact, rows[block], axis=1) / _STEPS**2
    return TopCandidates(rows, scores)


def hits_at_k(ranks: Int64[ndarray, " queries"], k: int) -> Float64[ndarray, " queries"]:
    """1.0 for each query with a right candidate among its first `k`, else 0.0."""
    _require(k >= 1, f"k must be at least 1, not {k}")
    return (ranks < k).astype(np.float64)


def recall_at_k(ranks: Int64[ndarray, " queries"], k: int) -> float:
    """Share of queries with at least one right candidate among their first `k`.

    This is the field's recall@k (Karpathy and Fei-Fei, CVPR 2015), and top-k accuracy where the
    candidates are classes.
    """
    return _mean(hits_at_k(ranks, k))


def median_rank(ranks: Int64[ndarray, " queries"]) -> float:
    """Median over queries of the first right candidate's place, counted from 1."""
    _require(len(ranks) > 0, "there are no queries to average")
    return float(np.median(ranks)) + 1


def mean_reciprocal_rank(ranks: Int64[ndarray, " queries"]) -> float:
    """Mean over queries of 1 / place of the first right candidate, counted from 1."""
    return _mean(1.0 / (ranks + 1))


def class_recall(hits: Float[ndarray, " items"], labels: Int64[ndarray, " items"]) -> ClassRecall:
    """Mean hit of each class; its own mean is mean per class recall, or balanced accuracy."""
    classes, member, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return ClassRecall(classes, np.bincount(member, weights=hits) / counts, counts)


def chance_at_k(
    right: Int64[ndarray, " queries"], candidates: Int64[ndarray, " queries"], k: int
) -> float:
    """Recall@k of a random order, exactly: the mean over queries of a hypergeometric probability.

    A query with r right ones among n candidates is hit with `1 - C(n - r, k) / C(n, k)`.

    Args:
        right: Right candidates per query, at least 1.
        candidates: Candidates per query.
        k: How many are looked at.
    """
    pairs, counts = np.unique(np.stack([right, candidates]), axis=1, return_counts=True)
    hit = [1.0 - _miss_probability(int(r), int(n), k) for r, n in pairs.T]
    return math.fsum(np.array(hit) * counts) / len(right)


def chance_median_rank(
    right: Int64[ndarray, " queries"], candidates: Int64[ndarray, " queries"]
) -> float:
    """Median place of the first right candidate in random order: the least k hit half the time."""
    low, high = 1, int(candidates.max())
    while low < high:
        middle = (low + high) // 2
        if chance_at_k(right, candidates, middle) >= 0.5:
            high = middle
        else:
            low = middle + 1
    return float(low)


def right_counts(
    query_labels: Int64[ndarray, " queries"], candidate_labels: Int64[ndarray, " candidates"]
) -> Int64[ndarray, " queries"]:
    """How many candidates carry each query's label."""
    labels, counts = np.unique(candidate_labels, return_counts=True)
    if len(labels) == 0:
        return np.zeros(len(query_labels), dtype=np.int64)
    place = np.minimum(np.searchsorted(labels, query_labels), len(labels) - 1)
    return np.where(labels[place] == query_labels, counts[place], 0)


def check_rows(rows: Float[ndarray, "rows dim"], name: str) -> None:
    """Refuse embeddings without a direction.

    Raises:
        ValueError: Rows hold NaN or infinity, or have length zero; names the first of them.
    """
    _refuse_rows(np.all(np.isfinite(rows), axis=1), name, NOT_FINITE)
    _refuse_rows(np.any(rows, axis=1), name, "are all zero")


NOT_FINITE = "hold NaN or infinity"
"""What a message says of embeddings that are not finite."""


def _refuse_rows(good: Bool[ndarray, " rows"], name: str, what: str) -> None:
    rows = np.flatnonzero(~good)
    if len(rows):
        listed = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        raise ValueError(
            f"{name} embeddings: {len(rows)} of {len(good)} rows {what}: rows {listed}"
        )


def _fixed_point(rows: Float[ndarray, "rows dim"], name: str) -> Float64[ndarray, "rows dim"]:
    """Unit rows in whole steps of 2^-26, each a function of that row alone."""
    check_rows(rows, name)
    exact = np.array(rows, dtype=np.float64, order="C")
    for block in _blocks(len(exact), 1024):  # in place and by parts: a second copy would be large
        some = exact[block]
        some /= np.abs(some).max(axis=1, keepdims=True)  # else squares could overflow or vanish
        some *= _STEPS / np.sqrt(np.sum(some * some, axis=1, keepdims=True))
        np.rint(some, out=some)
    return exact


def _best_right(
    left: Float64[ndarray, "queries dim"],
    right: Float64[ndarray, "candidates dim"],
    blocks: Iterable[tuple[Int64[ndarray, " some"], Int64[ndarray, " others"]]],
    excluded: Int64[ndarray, " queries"],
) -> tuple[Float64[ndarray, " queries"], Int64[ndarray, " queries"]]:
    """Exact score of each query's best right candidate, and how many right ones reach it."""
    best = np.full(len(left), -np.inf)
    reaching = np.zeros(len(left), dtype=np.int64)
    for query, candidate in blocks:
        scores = left[query] @ right[candidate].T
        scores[candidate == excluded[query, None]] = -np.inf
        before, top = best[query], scores.max(axis=1)
        equal = np.count_nonzero(scores == top[:, None], axis=1)
        reaching[query] = np.where(before >= top, reaching[query], 0)
        reaching[query] += np.where(top >= before, equal, 0)
        best[query] = np.maximum(before, top)
    return best, reaching


def _right_blocks(
    query_labels: Int64[ndarray, " queries"],
    candidate_labels: Int64[ndarray, " candidates"],
    tile: int,
) -> Iterator[tuple[Int64[ndarray, " some"], Int64[ndarray, " others"]]]:
    """Yield rows of queries and of candidates, at most `tile` of each, that share one label."""
    queries = np.argsort(query_labels, kind="stable")
    candidates = np.argsort(candidate_labels, kind="stable")
    labels, starts = np.unique(query_labels[queries], return_index=True)
    ends = [*starts[1:].tolist(), len(queries)]
    first = np.searchsorted(candidate_labels[candidates], labels, side="left").tolist()
    last = np.searchsorted(candidate_labels[candidates], labels, side="right").tolist()
    for start, end, low, high in zip(starts.tolist(), ends, first, last, strict=True):
        for some in _blocks(end - start, tile):
            for others in _blocks(high - low, tile):
                yield queries[start:end][some], candidates[low:high][others]


def _count_reaching(
    left: Float64[ndarray, "queries dim"],
    right: Float64[ndarray, "candidates dim"],
    threshold: Float64[ndarray, " queries"],
    tile: int,
) -> Int64[ndarray, " queries"]:
    """How many candidates of each query have at least the threshold's exact score.

    A float32 inner product of unit rows is off by less than `(dim + 4) * 2^-24` (Higham,
    Accuracy and Stability of Numerical Algorithms, 2002, section 3.1, and the rounding of the
    rows); scores that close to the threshold are computed exactly.
    """
    counts = np.zeros(len(left), dtype=np.int64)
    margin = np.float32((left.shape[1] + 8) * 2.0**-23)
    coarse_left = (left / _STEPS).astype(np.float32)
    coarse_right = (right / _STEPS).astype(np.float32)
    limit = (threshold / _STEPS**2).astype(np.float32)
    for rows in _blocks(len(left), tile):
        sure, close = limit[rows, None] + margin, limit[rows, None] - margin
        for columns in _blocks(len(right), tile):
            scores: Float32[ndarray, "some others"] = coarse_left[rows] @ coarse_right[columns].T
            counts[rows] += np.count_nonzero(scores >= sure, axis=1)
            undecided = (scores >= close) & (scores < sure)
            if np.count_nonzero(undecided) * 8 > undecided.size:  # nearly all equal: one product
                exact = left[rows] @ right[columns].T
                reached = undecided & (exact >= threshold[rows, None])
                counts[rows] += np.count_nonzero(reached, axis=1)
                continue
            query, candidate = np.divmod(np.flatnonzero(undecided), undecided.shape[1])
            query, candidate = query + rows.start, candidate + columns.start
            reached = _pair_scores(left, right, query, candidate) >= threshold[query]
            counts += np.bincount(query[reached], minlength=len(counts))
    return counts


def _pair_scores(
    left: Float64[ndarray, "queries dim"],
    right: Float64[ndarray, "candidates dim"],
    query: Int64[ndarray, " pairs"],
    candidate: Int64[ndarray, " pairs"],
) -> Float64[ndarray, " pairs"]:
    scores = np.empty(len(query))
    for block in _blocks(len(query), _PAIRS_AT_ONCE):
        scores[block] = np.einsum("pd,pd->p", left[query[block]], right[candidate[block]])
    return scores


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _miss_probability(right: int, candidates: int, k: int) -> float:
    """C(n - r, k) / C(n, k) = C(n - k, r) / C(n, r), by whichever product is shorter."""
    more, fewer = max(right, k), min(right, k)
    steps = np.arange(min(fewer, candidates))
    return float(np.prod(np.maximum(candidates - more - steps, 0) / (candidates - steps)))


def _mean(values: Float[ndarray, " items"]) -> float:
    _require(len(values) > 0, "there are no queries to average")
    return math.fsum(values) / len(values)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
