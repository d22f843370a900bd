"""Ranked lists of a batch of queries that grow without changing what they began with."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64
from numpy import ndarray

from eval.search.filters import Allowed
from eval.search.plan import Plan, Planner


class Ranking:
    """The best rows of each query, as deep as asked.

    An index may answer a longer list with another beginning. Here a list is first what it answers
    to `first` hits, then what is new in the answer to twice as many, and so on: the next page of a
    search never repeats a hit nor leaves one out that the page before would have had to hold.

    Args:
        planner: Answers the queries.
        queries: Unit length.
        first: Hits of the first page.
        allowed: Rows that may be found; None = all.
        banned: Per query the rows that may not be in its list.
        plan: How they are looked for.
    """

    def __init__(
        self,
        planner: Planner,
        queries: Float32[ndarray, "queries dim"],
        *,
        first: int,
        allowed: Allowed | None,
        banned: Sequence[Int64[ndarray, " _"]],
        plan: Plan,
    ) -> None:
        self._planner = planner
        self._queries = queries
        self._allowed = allowed
        self._banned = banned
        self._asked: Plan = plan
        self._most = planner.rows if allowed is None else allowed.count
        self._depth = 0
        self._first = first
        self.plan = "no rows to look through"
        self.rows: list[Int64[ndarray, " found"]] = [np.empty(0, np.int64) for _ in queries]
        self.scores: list[Float32[ndarray, " found"]] = [np.empty(0, np.float32) for _ in queries]

    @property
    def whole(self) -> bool:
        """Whether the lists hold all rows that may be found."""
        return self._depth >= self._most

    def deepen(self, depth: int) -> None:
        """Bring every list to this length at least, or to all rows that may be found."""
        depth = min(depth, self._most)
        while self._depth < depth and len(self._queries):
            step = 2 * self._depth or self._first
            # Exact search answers a longer list with the same beginning: no steps are needed.
            if (
                self._planner.choose(self._allowed, step, len(self._queries), self._asked)
                == "exact"
            ):
                step = max(step, depth)
            self._depth = min(step, self._most)
            self._extend()

    def _extend(self) -> None:
        most_banned = max(len(rows) for rows in self._banned)
        found = self._planner.answer(
            self._queries,
            min(self._depth + most_banned, self._most),
            self._allowed,
            self._asked,
        )
        self.plan = found.plan
        for query, (rows, scores) in enumerate(zip(found.rows, found.scores, strict=True)):
            good = np.flatnonzero((rows >= 0) & ~np.isin(rows, self._banned[query]))
            good = good[: self._depth]
            if len(self.rows[query]):
                good = good[~np.isin(rows[good], self.rows[query])]
            self.rows[query] = np.concatenate([self.rows[query], rows[good]])
            self.scores[query] = np.concatenate([self.scores[query], scores[good]])
